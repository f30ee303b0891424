"""The interface of every engine."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from yuan_grpc.server.engine.load import EngineLoad
from yuan_grpc.server.engine.types import EngineRequest, ModelInfo, StepOutput


class Engine(Protocol):
    """The server's only interface to a model."""

    async def start(self) -> None:
        """Load the model, and return when requests are answered without delay.

        Raises:
            Exception: the engine cannot be started.
        """

    async def wait_until_dead(self) -> None:
        """Wait until the started engine has died."""

    def stop(self) -> None:
        """Stop the engine in any state, including during its start."""

    @property
    def info(self) -> ModelInfo:
        """The served model. Known once the engine is ready."""

    @property
    def is_ready(self) -> bool:
        """Whether the engine accepts requests now."""

    @property
    def is_busy(self) -> bool:
        """Whether the engine has requests that have not ended."""

    @property
    def progress(self) -> int:
        """A number that changes whenever the engine has computed something, for any request."""

    @property
    def loads(self) -> Sequence[EngineLoad]:
        """The load of each data-parallel rank at its last step; empty if the engine keeps no statistics."""

    async def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    async def tokenize_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        """Return the tokens of a text: id, piece, and the start and end of its span, in characters."""

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool) -> bytes:
        """Return the bytes that a token adds to a text; none for a token that is skipped."""

    @property
    def tokenizer_info(self) -> Mapping[str, Any]:
        """The tokenizer's special tokens and chat template, under the names of `tokenizer_config.json`."""

    def apply_chat_template(self, turns: Sequence[str]) -> str:
        """Return a conversation in the model's format, up to the point where its answer begins."""

    def decode_continuation(
        self, request: EngineRequest, token_ids: Sequence[int], *, ended: bool
    ) -> tuple[str, str | None]:
        """Return the text that tokens add to a request's prompt, identical to the text `generate` yields for them.

        Args:
            ended: whether the last token ends the choice.

        Returns:
            The text, up to the first of the request's stop strings; and that string, or None.
        """

    @property
    def loras(self) -> Sequence[str]:
        """The names of loaded adapters."""

    @property
    def available_loras(self) -> Sequence[str]:
        """The names of adapters that can be loaded."""

    async def load_lora(self, name: str) -> None:
        """Load an adapter.

        Raises:
            ServiceError: the adapter is loaded, missing or unsuitable for the model, or LoRA is not enabled.
        """

    async def unload_lora(self, name: str) -> None:
        """Unload an adapter. Running requests keep it until they end.

        Raises:
            ServiceError: the adapter is not loaded, or LoRA is not enabled.
        """

    def pin_lora(self, lora: str) -> AbstractAsyncContextManager[str]:
        """Keep an adapter in memory for several requests, even if it is unloaded meanwhile.

        Yields the name by which these requests select it.

        Raises:
            ModelNotFoundError: the adapter is not loaded.
        """

    def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        """Yield new output as it comes or, unless `stream`, the complete choices in one output.

        The first output has no deltas and reports that the request was accepted. Closing the generator, or cancelling
        the task that waits for it, frees the request at once.

        Args:
            deadline: when set, the request ends with partial output: a last output has everything that was not yielded
                yet, and ends every unfinished choice with `DEADLINE`.

        Raises:
            InvalidRequestError: the engine found the request invalid.
            UnavailableError: the engine died, or dropped the request.
            OverloadedError: the request queue is full.
        """
