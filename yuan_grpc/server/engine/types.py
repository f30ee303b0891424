"""What the service asks of an engine, in plain values: neither protobuf's nor vLLM's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

CONTEXT_TOKENS = 16
"""So many tokens before a text decide how it begins, with some to spare."""

INLINE_ENTRIES = 16_384
"""Tokens and log-probabilities whose conversion, some 20 ms, may hold up every stream; more go to a thread."""


@dataclass(frozen=True)
class LoraInfo:
    """What holds for LoRA adapters, where they are enabled. `can_load` says whether the folder to load from is set."""

    max_loras: int
    max_rank: int
    can_load: bool


@dataclass(frozen=True)
class ModelInfo:
    """What is served, and the limits requests are held to.

    Attributes:
        name: what responses call the model.
        max_model_len: the most tokens of prompt and answer together.
        vocab_size: how many token ids there are; the embedding's padding rows are not counted.
        max_logprobs: the most log-probabilities a position can have.
        end_token_ids: the tokens that end a text by themselves, `<eod>` first.
        revision: of a model from the hub; empty for a folder.
        vllm_version, dtype, quantization: in vLLM's words; an empty quantization is none.
        layers, hidden, heads, intermediate: the model's sizes.
        tensor_parallel, pipeline_parallel, data_parallel: ranks.
        max_num_seqs: how many choices are computed at a time.
        max_num_queued_reqs: how many may run and wait together; None for any number.
        priority_scheduling, prefix_caching: whether they are on.
        lora: None where LoRA is not enabled.
    """

    name: str
    max_model_len: int
    vocab_size: int
    max_logprobs: int
    end_token_ids: tuple[int, ...]
    revision: str = ""
    vllm_version: str = ""
    dtype: str = ""
    quantization: str = ""
    layers: int = 0
    hidden: int = 0
    heads: int = 0
    intermediate: int = 0
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    max_num_seqs: int = 1
    max_num_queued_reqs: int | None = None
    priority_scheduling: bool = False
    prefix_caching: bool = False
    lora: LoraInfo | None = None


@dataclass(frozen=True)
class Constraint:
    """What generated text must fulfil: one of vLLM's kinds, and its specification."""

    kind: Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]
    specification: str | bool | tuple[str, ...]


@dataclass(frozen=True)
class Repetition:
    """A choice whose last tokens are a pattern of these sizes, `min_count` times over, has ended."""

    max_pattern_size: int
    min_pattern_size: int
    min_count: int


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, in vLLM's names. `top_p` 0, which vLLM does not know, means what `top_k` 1 means."""

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    logprob_token_ids: Sequence[int] = ()
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    repetition_detection: Repetition | None = None
    structured_outputs: Constraint | None = None
    stream_interval: int | None = None
    skip_reading_prefix_cache: bool | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken, however that was asked for."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1


@dataclass(frozen=True)
class EngineRequest:
    """One request to an engine.

    Attributes:
        request_id: unlike that of any other job that runs.
        prompt: token ids, at least one.
        priority: lower goes first, where the engine schedules by it.
        cache_salt: shares cached prefixes only with jobs of the same one; empty for none.
        lora: the name of a loaded adapter; empty for none.
    """

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    priority: int = 0
    cache_salt: str = ""
    lora: str = ""


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search's own parameters, in Yuan's and vLLM 0.2's names; `width` was its `best_of`."""

    n: int
    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


class FinishReason(Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"
    DEADLINE = "deadline"


@dataclass(frozen=True)
class RankedToken:
    """A token with its log-probability (natural) and its place in the order of likelihood, from 1; 0 is not known."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class TokenLogprobs:
    """The token of one position, and those asked for beside it: the most likely ones first, or as they were given.

    A prompt's first token has no log-probability; its `top` is empty, and its rank 0.
    """

    chosen: RankedToken
    top: Sequence[RankedToken]


@dataclass(frozen=True)
class ChoiceDelta:
    """What is new of one choice. `stop_reason` is the stop string or the token that ended it."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def entries(self) -> int:
        """Tokens and log-probabilities in it."""
        return len(self.token_ids) + _entries(self.logprobs)


def _entries(positions: Sequence[TokenLogprobs]) -> int:
    return sum(1 + len(position.top) for position in positions)


@dataclass(frozen=True)
class Progress:
    """How far a search is whose choices come at its end.

    Attributes:
        tokens: generated so far, for each beam or, of `best_of`, over all choices.
        finished: choices that are.
        best_text, best_cumulative_logprob: of the best beam as it is now.
    """

    tokens: int
    finished: int
    best_text: str = ""
    best_cumulative_logprob: float | None = None


@dataclass(frozen=True)
class StepOutput:
    """What came at once.

    Attributes:
        pieces: of the choices that grew; none in the first step of a job, which says that it was accepted.
        cached_tokens: how many prompt tokens the prefix cache had.
        prompt_positions: the whole prompt's log-probabilities, once, before any piece.
        progress: of a search.
        discarded_tokens: generated for choices that were not among the best.
    """

    deltas: Sequence[ChoiceDelta] = ()
    cached_tokens: int = 0
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    progress: Progress | None = None
    discarded_tokens: int = 0

    @property
    def entries(self) -> int:
        """Tokens and log-probabilities in it."""
        return sum(delta.entries for delta in self.deltas) + _entries(self.prompt_logprobs)
