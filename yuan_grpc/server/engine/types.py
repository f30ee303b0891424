"""Plain values at the interface between the service and an engine, independent of protobuf and vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

CONTEXT_TOKENS = 16
"""Preceding tokens needed to decode the start of a text."""

INLINE_ENTRIES = 16_384
"""Tokens and log-probabilities to convert on the event loop, about 20 ms of work; more are converted in a thread."""


@dataclass(frozen=True)
class LoraInfo:
    """Limits on LoRA adapters, if they are enabled. `can_load` is true if there is a folder to load adapters from."""

    max_loras: int
    max_rank: int
    can_load: bool


@dataclass(frozen=True)
class ModelInfo:
    """The served model, and the limits on requests.

    Attributes:
        name: the model's name in responses.
        max_model_len: maximum number of prompt and generated tokens together.
        vocab_size: number of token ids, without the padding rows of the embedding.
        max_logprobs: maximum number of log-probabilities per position.
        end_token_ids: the tokens that end a text by themselves, `<eod>` first.
        max_token_characters: characters of the longest token; 0 if unknown.
        path: the folder of the model, or its id on the hub.
        revision: the revision of a model from the hub; empty for a folder.
        vllm_version, dtype, quantization: as vLLM names them; an empty quantization is none.
        layers, hidden, heads, intermediate: the model's sizes.
        tensor_parallel, pipeline_parallel, data_parallel: numbers of ranks.
        max_num_seqs: number of choices computed at a time.
        max_num_queued_reqs: maximum number of running and waiting choices; None for the server's default.
        cache_tokens: number of tokens that fit into the KV cache; 0 if unknown.
        priority_scheduling, prefix_caching: whether they are enabled.
        lora: None if LoRA is not enabled.
    """

    name: str
    max_model_len: int
    vocab_size: int
    max_logprobs: int
    end_token_ids: tuple[int, ...]
    max_token_characters: int = 0
    path: str = ""
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
    cache_tokens: int = 0
    priority_scheduling: bool = False
    prefix_caching: bool = False
    lora: LoraInfo | None = None


@dataclass(frozen=True)
class Constraint:
    """A constraint on generated text: a kind of structured output in vLLM, and its specification."""

    kind: Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]
    specification: str | bool | tuple[str, ...]


@dataclass(frozen=True)
class Repetition:
    """A repetition that ends a choice: the last tokens repeat a pattern of these sizes `min_count` times."""

    max_pattern_size: int
    min_pattern_size: int
    min_count: int


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters under vLLM's names. A `top_p` of 0, which vLLM rejects, is equivalent to a `top_k` of 1."""

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
        """Whether the most likely token is always chosen, by any of the parameters that request it."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1


@dataclass(frozen=True)
class EngineRequest:
    """One request to an engine.

    Attributes:
        request_id: unique among running requests.
        prompt: token ids, at least one.
        priority: lower values are scheduled first, if the engine schedules by priority.
        cache_salt: cached prefixes are shared only between requests with the same salt; empty for none.
        lora: the name of a loaded adapter; empty for none.
        trace_headers: the caller's `traceparent` and `tracestate`, for the engine's spans.
    """

    request_id: str
    prompt: Sequence[int]
    sampling: Sampling
    priority: int = 0
    cache_salt: str = ""
    lora: str = ""
    trace_headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BeamSearchParams:
    """Parameters of beam search, under the names in Yuan and vLLM 0.2, where `width` was `best_of`."""

    n: int
    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


class FinishReason(Enum):
    """The reason a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"
    DEADLINE = "deadline"


@dataclass(frozen=True)
class RankedToken:
    """A token with its natural log-probability and its 1-based rank by likelihood; 0 if the rank is unknown."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probabilities at one position.

    The first token of a prompt has none: its `top` is empty, and its rank 0.

    Attributes:
        chosen: the token at this position.
        top: the most likely tokens in order, or the tokens in `logprob_token_ids` in their order.
    """

    chosen: RankedToken
    top: Sequence[RankedToken]


@dataclass(slots=True)  # not frozen: one is made for each token, in a third of the time
class ChoiceDelta:
    """New output of one choice. `stop_reason` is the stop string or the token that ended it."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def num_entries(self) -> int:
        """Number of tokens and log-probabilities."""
        return len(self.token_ids) + (_num_logprobs(self.logprobs) if self.logprobs else 0)


def _num_logprobs(positions: Sequence[TokenLogprobs]) -> int:
    return sum(1 + len(position.top) for position in positions)


@dataclass(frozen=True)
class Progress:
    """Progress of a search that returns its choices at the end.

    Attributes:
        tokens: tokens generated so far: per beam in beam search, over all choices in best-of sampling.
        finished: number of finished choices.
        best_text, best_cumulative_logprob: of the best beam so far.
    """

    tokens: int
    finished: int
    best_text: str = ""
    best_cumulative_logprob: float | None = None


@dataclass(slots=True)  # not frozen: one is made for each token, in a third of the time
class StepOutput:
    """Output that an engine or a strategy yields at one time.

    Attributes:
        deltas: new output of the choices that grew. Empty in the first output, which reports that the request was
            accepted.
        cached_tokens: number of prompt tokens found in the prefix cache.
        prompt_logprobs: those of the whole prompt, in one output, before any delta.
        progress: progress of a search that returns its choices at the end.
        discarded_tokens: number of tokens generated for choices that are not returned.
        queue_seconds: time that the request waited for the engine, on the first output with tokens; None if unknown.
        prefill_seconds: time from the end of that wait to the first token, on the same output; None if unknown.
        first_token_seconds: time from the engine's acceptance of the request to its first token, on the same output;
            None if unknown.
    """

    deltas: Sequence[ChoiceDelta] = ()
    cached_tokens: int = 0
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    progress: Progress | None = None
    discarded_tokens: int = 0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    first_token_seconds: float | None = None

    @property
    def num_entries(self) -> int:
        """Number of tokens and log-probabilities."""
        return sum(delta.num_entries for delta in self.deltas) + _num_logprobs(self.prompt_logprobs)
