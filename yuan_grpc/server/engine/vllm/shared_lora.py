"""The adapters of an engine that several front ends share: the process that started the engine loads them for all."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from yuan_grpc.server.engine.vllm.args import EngineOptions
from yuan_grpc.server.engine.vllm.lora import Adapter, LoraEngine, LoraRegistry, registry_arguments


class SharedLoraRegistry(LoraRegistry):
    """The loaded adapters in a front end, and the number of its requests that use each.

    Args:
        options: the result of `parse_engine_flags`.
        folder: has a folder for each adapter; None if none can be loaded.
        load: loads an adapter in all front ends.
        unload: unloads an adapter in all front ends.
        release: reports that no request of this front end uses an adapter that has been unloaded, and waits until it
            is removed if no other one uses it.
    """

    def __init__(
        self,
        options: EngineOptions,
        folder: Path | None,
        load: Callable[[str], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
        release: Callable[[str], Awaitable[None]],
    ) -> None:
        super().__init__(folder, *registry_arguments(options))
        self._load_everywhere, self._unload_everywhere, self._release = load, unload, release

    async def load(self, engine: LoraEngine, name: str) -> None:
        """Load an adapter; see `Engine.load_lora`."""
        await self._load_everywhere(name)

    async def unload(self, engine: LoraEngine, name: str) -> None:
        """Unload an adapter; see `Engine.unload_lora`."""
        await self._unload_everywhere(name)

    def add(self, name: str, lora_request: LoRARequest) -> None:
        """Let requests use an adapter that the engine has loaded."""
        self._loaded[name] = Adapter(lora_request)

    async def discard(self, name: str) -> None:
        """Let no new request use an adapter, and release it when the running ones have ended."""
        if (adapter := self._loaded.pop(name, None)) is not None:
            await self._retire(_NO_ENGINE, adapter)

    async def _remove(self, engine: LoraEngine, lora_request: LoRARequest) -> None:
        # Shielded: the request that has ended may be cancelled again, and nothing else releases the adapter.
        await asyncio.shield(self._release(lora_request.lora_name))


class LoraLeader:
    """Loads and unloads the adapters of all front ends, and keeps each until no front end uses it.

    Args:
        registry: the adapters in the engine.
        engine: the engine.
    """

    def __init__(self, registry: LoraRegistry, engine: LoraEngine) -> None:
        self._registry = registry
        self._engine = engine
        self._users: dict[tuple[int, str], AsyncExitStack] = {}

    @property
    def lora_requests(self) -> dict[str, LoRARequest]:
        """vLLM's description of each loaded adapter, by the adapter's name."""
        return self._registry.lora_requests

    async def load(self, name: str) -> LoRARequest:
        """Load an adapter; see `Engine.load_lora`."""
        await self._registry.load(self._engine, name)
        return self._registry.lora_requests[name]

    async def unload(self, name: str) -> None:
        """Remove an adapter once all front ends have released it; see `Engine.unload_lora`."""
        await self._registry.unload(self._engine, name)

    async def acquire(self, front_end: int, name: str) -> None:
        """Keep an adapter until a front end has released it; do nothing if it has the adapter already."""
        lora_request = self._registry.lora_requests[name]
        if (user := (front_end, lora_request.lora_name)) not in self._users:
            stack = self._users[user] = AsyncExitStack()
            await stack.enter_async_context(self._registry.pin_lora(self._engine, name))

    async def release(self, front_end: int, lora_name: str) -> None:
        """Let an adapter be removed; `lora_name` is vLLM's name for it."""
        if stack := self._users.pop((front_end, lora_name), None):
            await stack.aclose()

    async def release_all(self, front_end: int) -> None:
        """Release the adapters of a front end that has died, also those that are loaded meanwhile."""
        while user := next((user for user in self._users if user[0] == front_end), None):
            await self.release(*user)


_NO_ENGINE: Any = None
"""Stands for the engine where the registry of a front end does not use it."""
