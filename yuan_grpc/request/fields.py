"""The table of request fields with options or rules: type, range and command-line option of each.

Validation, the conversion to sampling parameters and the command-line options are made from this table. Tests check
that the contract's comments, the client's parameters and the README match it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MAX_CHOICES = 128
"""Choices of one request, and beams of one search."""
MAX_SEED = 2**63 - 1 - MAX_CHOICES
"""Largest seed: vLLM adds a choice's index and keeps the sum in a signed 64-bit integer; it reads -1 as no seed."""
MAX_IDS = 1024
"""Capacity in vLLM's V2 model runner for `logit_bias`, and for `allowed_token_ids`."""


@dataclass(frozen=True)
class Field:
    """A field of `GenerateRequest` with an option or a rule.

    Attributes:
        name: the field's name, also in vLLM's `SamplingParams` if `is_sampling`.
        type: the type of the value, or of an item in a list; for `logit_bias`, of a bias; dict for a protobuf message.
        minimum, maximum: inclusive range of a number; None for no bound.
        special: numbers outside the range that are valid too.
        special_meaning: the meaning of the special numbers in error messages.
        max_items: limit on the length of a list; 0 for a field that is not a list.
        max_length: limit on the characters of a text, or of a text in a list.
        beam_search: accepted values with beam search; empty if the field must be absent; None for any value.
        is_sampling: whether the engine gets the field as a sampling parameter.
        help: the help text of the command-line option; empty if there is no option but `--set`.
    """

    name: str
    type: type[int | float | bool | str | dict[str, object]]
    minimum: float | None = None
    maximum: float | None = None
    special: tuple[int, ...] = ()
    special_meaning: str = ""
    max_items: int = 0
    max_length: int = 0
    beam_search: tuple[float, ...] | None = None
    is_sampling: bool = True
    help: str = ""

    @property
    def is_list(self) -> bool:
        """Whether the field has several values."""
        return self.max_items > 0

    @property
    def has_range(self) -> bool:
        """Whether the field is a number with a range."""
        return self.minimum is not None

    @property
    def rule(self) -> str:
        """The range as error messages say it, after "must"."""
        if self.maximum is not None:
            return f"be between {self.minimum} and {self.maximum}"
        return f"be at least {self.minimum}{self.special_meaning}"

    def allows(self, value: float) -> bool:
        """Return whether a number is in range. NaN never is."""
        is_below = self.minimum is not None and not value >= self.minimum
        is_above = self.maximum is not None and not value <= self.maximum
        return value in self.special or not (is_below or is_above)


FIELDS = (
    Field("n", int, 1, MAX_CHOICES, help="number of choices (default: 1)"),
    Field("max_tokens", int, 0, help="maximum number of generated tokens"),
    Field("min_tokens", int, 0, help="minimum number of generated tokens"),
    Field("temperature", float, 0, 2, beam_search=(0,), help="sampling temperature, 0 to 2; 0 is greedy (default: 1)"),
    Field(
        "top_k",
        int,
        1,
        special=(-1, 0),
        special_meaning=", or 0 or -1 for all tokens",
        beam_search=(-1, 0),
        help="sample from the N most likely tokens",
    ),
    Field("top_p", float, 0, 1, beam_search=(1,), help="nucleus sampling: total probability to keep"),
    Field("min_p", float, 0, 1, beam_search=(0,), help="minimum probability, relative to the likeliest token"),
    Field("seed", int, 0, MAX_SEED, help="random seed, for repeatable sampling"),
    Field("presence_penalty", float, -2, 2, beam_search=(0,), help="penalty for tokens already generated, -2 to 2"),
    Field(
        "frequency_penalty", float, -2, 2, beam_search=(0,), help="penalty per occurrence of a generated token, -2 to 2"
    ),
    Field(
        "repetition_penalty",
        float,
        0.001,
        1000,
        beam_search=(1,),
        help="above 1: penalize tokens of the prompt and the output",
    ),
    Field("best_of", int, 1, MAX_CHOICES, is_sampling=False, help="generate N choices, return the best; beam width"),
    Field("use_beam_search", bool, is_sampling=False, help="use beam search with a width of --best-of"),
    Field("length_penalty", float, -10, 10, is_sampling=False, help="beam search: above 0 favors longer output"),
    Field("stop", str, max_items=64, max_length=1024, help="stop at this text; repeatable"),
    Field("stop_token_ids", int, max_items=1024),
    Field("ignore_eos", bool, help="continue after the end-of-text token"),
    Field("include_stop_str_in_output", bool),
    Field("skip_special_tokens", bool),
    Field("echo", bool, is_sampling=False, help="include the prompt in the output"),
    Field("logprobs", int),
    Field("prompt_logprobs", int),
    Field("logprob_token_ids", int, max_items=128, beam_search=()),
    Field("logit_bias", float, -100, 100, max_items=MAX_IDS, beam_search=()),
    Field("allowed_token_ids", int, max_items=MAX_IDS, beam_search=()),
    Field("bad_words", str, max_items=64, max_length=256, beam_search=()),
    Field("structured_outputs", dict, beam_search=(), is_sampling=False),
    Field("repetition_detection", dict, beam_search=(), is_sampling=False),
    Field("stream_interval", int, 1),
    Field("skip_reading_prefix_cache", bool),
    Field(
        "truncate_prompt_tokens",
        int,
        1,
        special=(-1,),
        special_meaning=", or -1 for as many as fit",
        is_sampling=False,
    ),
    Field("cache_salt", str, max_length=1024, is_sampling=False),
)
"""All request fields with options or rules. The model limits `logprobs` and `prompt_logprobs`. The protobuf messages
`structured_outputs` and `repetition_detection` have rules for each of their fields."""

BY_NAME: Mapping[str, Field] = {field.name: field for field in FIELDS}
