"""Both clients with one async interface, so that each test can run against either."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from yuan_grpc.client import AsyncClient, Client

_END = object()


class SyncClientAdapter:
    """The sync client with the interface of `AsyncClient`; every blocking call runs in a thread."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.client = Client(*arguments, **keywords)

    async def __aenter__(self) -> "SyncClientAdapter":
        return self

    async def __aexit__(self, *exit: Any) -> None:
        await asyncio.to_thread(self.client.__exit__, *exit)

    def stream(self, *arguments: Any, **keywords: Any) -> "SyncStreamAdapter":
        return SyncStreamAdapter(self.client.stream(*arguments, **keywords))

    def generate_many(self, *arguments: Any, **keywords: Any) -> AsyncIterator[Any]:
        return _iterate(self.client.generate_many(*arguments, **keywords))

    def __getattr__(self, name: str) -> Any:
        async def method(*arguments: Any, **keywords: Any) -> Any:
            return await asyncio.to_thread(getattr(self.client, name), *arguments, **keywords)

        return method


class SyncStreamAdapter:
    """A stream of the sync client with the interface of `AsyncStream`."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def __aenter__(self) -> "SyncStreamAdapter":
        self.stream.__enter__()
        return self

    async def __aexit__(self, *exit: Any) -> None:
        await asyncio.to_thread(self.stream.__exit__, *exit)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        delta = await asyncio.to_thread(next, self.stream, _END)
        if delta is _END:
            raise StopAsyncIteration
        assert isinstance(delta, str)
        return delta

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


async def _iterate(generator: Any) -> AsyncIterator[Any]:
    try:
        while (item := await asyncio.to_thread(next, generator, _END)) is not _END:
            yield item
    finally:
        await asyncio.to_thread(generator.close)


CLIENTS: list[Any] = [SyncClientAdapter, AsyncClient]
