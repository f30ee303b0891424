"""An engine by hand, for what a real one cannot be made to do on demand."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from yuan_grpc.server.generation import FinishReason, ModelInfo, Piece, Sampling, Step

INFO = ModelInfo(name="fake", context=64, tokens=0x110000, max_logprobs=20)


def last(text: str = "!") -> Step:
    """A step that ends a choice."""
    return Step([Piece(0, text, [ord(c) for c in text], finish_reason=FinishReason.LENGTH)], cached_tokens=0)


def more(text: str) -> Step:
    """A step after which there is more to come."""
    return Step([Piece(0, text, [ord(c) for c in text])], cached_tokens=0)


class FakeEngine:
    """Plays a script to every request: steps to yield, exceptions to raise, and then, if told so, nothing for ever.

    A token is a character. Its start fails with `failure`, or lasts until `may_start` is set; `dies` loses it.
    """

    def __init__(self, *script: Step | Exception, hangs: bool = False, ready: bool = True) -> None:
        self.script = script
        self.hangs = hangs
        self.ready = ready
        self.info = INFO
        self.asked: list[tuple[Sequence[int], Sampling]] = []
        self.failure: Exception | None = None
        self.may_start = asyncio.Event()
        self.dies = asyncio.Event()
        self.stopped = self.freed_before_it_stopped = False
        self.began = asyncio.Event()
        self.freed = asyncio.Event()

    async def start(self) -> None:
        if self.failure:
            raise self.failure
        await self.may_start.wait()

    async def lost(self) -> None:
        await self.dies.wait()

    def stop(self) -> None:
        self.stopped = True
        self.freed_before_it_stopped = self.freed.is_set()

    async def tokenize(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))

    async def generate(
        self, request_id: str, prompt: Sequence[int], sampling: Sampling, *, stream: bool
    ) -> AsyncGenerator[Step, None]:
        self.asked.append((prompt, sampling))
        self.began.set()
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                yield step
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.freed.set()
