"""What the service asks of an engine, in plain values: neither protobuf's nor vLLM's."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


@dataclass(frozen=True)
class ModelInfo:
    """What is served, and the limits requests are held to.

    Attributes:
        name: what responses call the model.
        context: the most tokens of prompt and answer together.
        tokens: how many token ids there are; the embedding's padding rows are not counted.
        max_logprobs: the most log-probabilities a position can have.
    """

    name: str
    context: int
    tokens: int
    max_logprobs: int


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, in vLLM's names. `top_p` 0, which vLLM does not know, means what `top_k` 1 means."""

    n: int = 1
    max_tokens: int = 16
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

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken, however that was asked for."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1


class FinishReason(Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class RankedToken:
    """A token with its log-probability (natural) and its place in the order of likelihood, from 1."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class Position:
    """The chosen token of one position, and the most likely ones there, most likely first."""

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


@dataclass(frozen=True)
class Step:
    """The pieces that came at once, and how many prompt tokens the prefix cache had."""

    pieces: Sequence[Piece]
    cached_tokens: int


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

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""

    def generate(
        self, request_id: str, prompt: Sequence[int], sampling: Sampling, *, stream: bool
    ) -> AsyncGenerator[Step, None]:
        """Generates, yielding pieces as they come or, unless `stream`, all of every choice in one step.

        Closing the generator, or cancelling the task that waits for it, frees the request at once.

        Raises:
            UnavailableError: the engine is lost, or gave the request up.
            OverloadedError: it has as many requests as it may.
        """
