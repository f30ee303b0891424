"""Both clients behind one shape, so that what is true of one is tested of the other."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from yuan_grpc.client import AsyncClient, Client

_OVER = object()


class Threaded:
    """The client for threads, called from threads: with methods to await, and iterators to iterate asynchronously."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.client = Client(*arguments, **keywords)

    async def __aenter__(self) -> "Threaded":
        return self

    async def __aexit__(self, *exit: Any) -> None:
        await asyncio.to_thread(self.client.__exit__, *exit)

    def stream(self, *arguments: Any, **keywords: Any) -> "ThreadedStream":
        return ThreadedStream(self.client.stream(*arguments, **keywords))

    def generate_many(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        return _iterated(self.client.generate_many(*arguments, **keywords))

    def __getattr__(self, name: str) -> Any:
        async def method(*arguments: Any, **keywords: Any) -> Any:
            return await asyncio.to_thread(getattr(self.client, name), *arguments, **keywords)

        return method


class ThreadedStream:
    """The stream of a `Threaded`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def __aenter__(self) -> "ThreadedStream":
        self.stream.__enter__()
        return self

    async def __aexit__(self, *exit: Any) -> None:
        await asyncio.to_thread(self.stream.__exit__, *exit)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        piece = await asyncio.to_thread(next, self.stream, _OVER)
        if piece is _OVER:
            raise StopAsyncIteration
        assert isinstance(piece, str)
        return piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


async def _iterated(generator: Any) -> AsyncIterator[Any]:
    try:
        while (item := await asyncio.to_thread(next, generator, _OVER)) is not _OVER:
            yield item
    finally:
        await asyncio.to_thread(generator.close)


CLIENTS: list[Any] = [Threaded, AsyncClient]
