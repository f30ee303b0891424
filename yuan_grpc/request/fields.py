"""The table of sampling fields: type, range and default of each, and its command-line option.

Validation, the conversion to sampling parameters and the command line are made from this table. The comments in
`yuan.proto`, the client's keywords and the README are held against it by tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MAX_CHOICES = 128
"""Choices of one request, and beams of one search."""

MAX_SEED = 2**63 - 1 - MAX_CHOICES
"""vLLM adds the choice's index to the seed, keeps the sum as a signed 64-bit integer and reads -1 as no seed."""


@dataclass(frozen=True)
class Field:
    """A field of `GenerateRequest` that says how to generate.

    Attributes:
        name: the field's name, also in vLLM's `SamplingParams` where `is_sampling`.
        type: type of the value, or of one item of a list.
        minimum, maximum: inclusive range of a number; None where it has no bound of its own.
        special: values outside the range that have a meaning of their own.
        rule: the range in words, where it is more than a range.
        max_items: limit on the items of a list; None for a field that is no list.
        max_length: limit on the characters of a text, or of each text in a list.
        beam_search: values that beam search allows besides absence; None for any.
        is_sampling: whether the engine gets it as a sampling parameter of the same name.
        help: text of the command-line option; empty where only `--set` sets the field.
    """

    name: str
    type: type[int | float | bool | str]
    minimum: float | None = None
    maximum: float | None = None
    special: tuple[int, ...] = ()
    rule: str = ""
    max_items: int | None = None
    max_length: int | None = None
    beam_search: tuple[float, ...] | None = None
    is_sampling: bool = True
    help: str = ""

    @property
    def is_list(self) -> bool:
        """Whether the field has several values."""
        return self.max_items is not None

    @property
    def has_range(self) -> bool:
        """Whether the table bounds the number."""
        return self.minimum is not None or self.maximum is not None

    @property
    def range_in_words(self) -> str:
        """The rule that a number must follow, as error messages say it."""
        if self.rule:
            return self.rule
        return (
            f"be at least {self.minimum}" if self.maximum is None else f"be between {self.minimum} and {self.maximum}"
        )

    def allows(self, value: float) -> bool:
        """Return whether a number is in range; NaN never is."""
        low = value >= self.minimum if self.minimum is not None else True
        high = value <= self.maximum if self.maximum is not None else True
        return (low and high) or value in self.special


FIELDS = (
    Field("n", int, 1, MAX_CHOICES, help="number of choices to generate"),
    Field("max_tokens", int, 1, help="maximum number of tokens per choice"),
    Field("min_tokens", int, 0, help="minimum number of tokens before a choice may end"),
    Field(
        "temperature",
        float,
        0,
        2,
        beam_search=(0.0,),
        help="0 to 2; 0 always takes the most likely token (default: 1)",
    ),
    Field(
        "top_p", float, 0, 1, beam_search=(1.0,), help="sample from the most likely tokens with this total probability"
    ),
    Field(
        "top_k",
        int,
        1,
        special=(-1, 0),
        rule="be at least 1, or 0 or -1 for all tokens",
        beam_search=(-1, 0),
        help="sample from this many most likely tokens",
    ),
    Field(
        "min_p",
        float,
        0,
        1,
        beam_search=(0.0,),
        help="sample from tokens at least this fraction as likely as the most likely one",
    ),
    Field("presence_penalty", float, -2, 2, beam_search=(0.0,), help="-2 to 2, once for each token already generated"),
    Field(
        "frequency_penalty",
        float,
        -2,
        2,
        beam_search=(0.0,),
        help="-2 to 2, for each time a token was already generated",
    ),
    Field(
        "repetition_penalty",
        float,
        0.001,
        1000,
        beam_search=(1.0,),
        help="above 1 discourages tokens of the prompt and of the text so far",
    ),
    Field("seed", int, 0, MAX_SEED, help="make sampling repeatable"),
    Field("stop", str, max_items=64, max_length=1024, help="end a choice at this text; can be repeated"),
    Field("stop_token_ids", int, max_items=1024),
    Field("ignore_eos", bool, help="continue past the end-of-text token"),
    Field("include_stop_str_in_output", bool),
    Field("skip_special_tokens", bool),
    Field("logprobs", int, 0),
    Field("prompt_logprobs", int, 0),
    Field("logprob_token_ids", int, max_items=128, beam_search=()),
    Field("logit_bias", float, -100, 100, max_items=1024, beam_search=()),
    Field("allowed_token_ids", int, max_items=1024, beam_search=()),
    Field("bad_words", str, max_items=64, max_length=256, beam_search=()),
    Field("stream_interval", int, 1),
    Field("skip_reading_prefix_cache", bool),
    Field("echo", bool, is_sampling=False, help="put the prompt before the text of each choice"),
    Field(
        "use_beam_search",
        bool,
        is_sampling=False,
        help="search for the most likely continuations; --best-of is the width",
    ),
    Field(
        "best_of",
        int,
        1,
        MAX_CHOICES,
        is_sampling=False,
        help="generate this many choices and return the best; the width of a beam search",
    ),
    Field("length_penalty", float, -10, 10, is_sampling=False, help="of beam search: above 0 favors long choices"),
    Field(
        "truncate_prompt_tokens",
        int,
        1,
        special=(-1,),
        rule="be at least 1, or -1 for as many as fit",
        is_sampling=False,
    ),
    Field("cache_salt", str, max_length=1024, is_sampling=False),
)

BY_NAME: Mapping[str, Field] = {field.name: field for field in FIELDS}
