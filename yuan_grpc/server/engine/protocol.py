"""The interface that every engine implements."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from yuan_grpc.server.engine.types import EngineRequest, ModelInfo, StepOutput


class Engine(Protocol):
    """The one door to whatever generates."""

    async def start(self) -> None:
        """Returns when a request would be answered at once.

        Raises:
            Exception: it cannot be started.
        """

    async def wait_until_dead(self) -> None:
        """Returns when the started engine has died."""

    def stop(self) -> None:
        """Ends it, whatever it is doing, starting included."""

    @property
    def info(self) -> ModelInfo:
        """What is served. Known once the engine is ready."""

    @property
    def is_ready(self) -> bool:
        """Whether a request can be accepted now."""

    async def tokenize(self, text: str) -> list[int]:
        """Text to token ids."""

    async def tokenize_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        """Text to tokens: id, piece, and the stretch it stands for, from and to, in characters."""

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""

    def apply_chat_template(self, turns: Sequence[str]) -> str:
        """The turns of a conversation as the model was trained to see them, up to where its answer begins."""

    def decode_continuation(
        self, request: EngineRequest, token_ids: Sequence[int], *, ended: bool
    ) -> tuple[str, str | None]:
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

    def pin_lora(self, lora: str) -> AbstractAsyncContextManager[str]:
        """Keeps an adapter for several jobs, whether it is unloaded meanwhile or not.

        Yields what the jobs are to name it.

        Raises:
            ModelNotFoundError: it is not loaded.
        """

    def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
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
