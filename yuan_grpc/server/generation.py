"""What the service asks of an engine, in plain values: neither protobuf's nor vLLM's."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

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
        context: the most tokens of prompt and answer together.
        tokens: how many token ids there are; the embedding's padding rows are not counted.
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
    context: int
    tokens: int
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
class Job:
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
class Beam:
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
class Position:
    """The token of one position, and those asked for beside it: the most likely ones first, or as they were given.

    A prompt's first token has no log-probability; its `top` is empty, and its rank 0.
    """

    chosen: RankedToken
    top: Sequence[RankedToken]


@dataclass(frozen=True)
class Piece:
    """What is new of one choice. `stopped_by` is the stop string or the token that ended it."""

    index: int
    text: str
    token_ids: Sequence[int]
    positions: Sequence[Position] = ()
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stopped_by: str | int | None = None

    @property
    def entries(self) -> int:
        """Tokens and log-probabilities in it."""
        return len(self.token_ids) + _entries(self.positions)


def _entries(positions: Sequence[Position]) -> int:
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
class Step:
    """What came at once.

    Attributes:
        pieces: of the choices that grew; none in the first step of a job, which says that it was accepted.
        cached_tokens: how many prompt tokens the prefix cache had.
        prompt_positions: the whole prompt's log-probabilities, once, before any piece.
        progress: of a search.
        discarded_tokens: generated for choices that were not among the best.
    """

    pieces: Sequence[Piece] = ()
    cached_tokens: int = 0
    prompt_positions: Sequence[Position] = ()
    progress: Progress | None = None
    discarded_tokens: int = 0

    @property
    def entries(self) -> int:
        """Tokens and log-probabilities in it."""
        return sum(piece.entries for piece in self.pieces) + _entries(self.prompt_positions)


class Engine(Protocol):
    """The one door to whatever generates."""

    async def start(self) -> None:
        """Returns when a request would be answered at once.

        Raises:
            Exception: it cannot be started.
        """

    async def lost(self) -> None:
        """Returns when the started engine has died."""

    def stop(self) -> None:
        """Ends it, whatever it is doing, starting included."""

    @property
    def info(self) -> ModelInfo:
        """What is served. Known once the engine is ready."""

    @property
    def ready(self) -> bool:
        """Whether a request can be accepted now."""

    async def tokenize(self, text: str) -> list[int]:
        """Text to token ids."""

    async def tokenize_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        """Text to tokens: id, piece, and the stretch it stands for, from and to, in characters."""

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""

    def conversation(self, turns: Sequence[str]) -> str:
        """The turns of a conversation as the model was trained to see them, up to where its answer begins."""

    def continuation(self, job: Job, token_ids: Sequence[int], *, ended: bool) -> tuple[str, str | None]:
        """The text that tokens add behind a job's prompt, just as `generate` would give it.

        Args:
            ended: whether the last token is one that ends a choice.

        Returns:
            The text, up to the first of the job's stop strings; and that string, or None.
        """

    @property
    def loras(self) -> Sequence[str]:
        """The names of loaded adapters."""

    @property
    def available_loras(self) -> Sequence[str]:
        """The names of adapters that could be loaded."""

    async def load_lora(self, name: str) -> None:
        """Loads an adapter.

        Raises:
            ServiceError: it is loaded, not there, not one for this model, or LoRA is not enabled.
        """

    async def unload_lora(self, name: str) -> None:
        """Forgets an adapter; jobs that run with it go on.

        Raises:
            ServiceError: it is not loaded, or LoRA is not enabled.
        """

    def holding(self, lora: str) -> AbstractAsyncContextManager[str]:
        """Keeps an adapter for several jobs, whether it is unloaded meanwhile or not.

        Yields what the jobs are to name it.

        Raises:
            ModelNotFoundError: it is not loaded.
        """

    def generate(self, job: Job, *, stream: bool, cut: asyncio.Event | None = None) -> AsyncGenerator[Step, None]:
        """Generates, yielding pieces as they come or, unless `stream`, all of every choice in one step.

        The first step, which has no pieces, says that the job was accepted. Closing the generator, or cancelling the
        task that waits for it, frees the job at once.

        Args:
            cut: once it is set, the job ends with what there is: a last step has all that was not yielded yet, and ends
                every choice that has not ended with `DEADLINE`.

        Raises:
            InvalidRequestError: what only the engine can tell.
            UnavailableError: the engine is lost, or gave the request up.
            OverloadedError: it has as many requests as it may.
        """
