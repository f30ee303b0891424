"""The LoRA adapters of a server, loaded from one folder by name."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllm.lora.request import LoRARequest
from vllm.v1.engine.exceptions import EngineDeadError

from yuan_grpc.server.engine.model_names import model_not_found
from yuan_grpc.server.engine.vllm.args import EngineOptions
from yuan_grpc.server.errors import (
    DuplicateLoraError,
    InvalidRequestError,
    ModelNotFoundError,
    NotEnabledError,
    UnavailableError,
    Violation,
)

CONFIG = "adapter_config.json"

AdapterRequest = LoRARequest
"""vLLM's description of a loaded adapter, for modules that must not import vLLM."""


class LoraEngine(Protocol):
    """An object that loads adapters into an engine and removes them, such as `AsyncLLM`."""

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter; return whether all workers could."""

    async def remove_lora(self, lora_id: int) -> bool:
        """Remove an adapter; return whether it was loaded."""


@dataclass
class Adapter:
    """A loaded adapter.

    Attributes:
        pins: the number of running requests that use it.
        is_unloaded: whether it is to be removed once no request uses it.
    """

    lora_request: LoRARequest
    pins: int = 0
    is_unloaded: bool = False


class LoraRegistry:
    """The loaded adapters, and the number of running requests that use each.

    Requests can select an adapter only once the engine has loaded it. No more are loaded than the engine keeps in
    memory, and none is removed while a request uses it: vLLM would read the adapter's files again during a step, and
    die if they are missing or invalid.

    Args:
        folder: has a folder for each adapter; None if none can be loaded.
        capacity: number of adapters the engine keeps in memory; 0 if LoRA is not enabled.
        model: the served model's name.
    """

    def __init__(self, folder: Path | None, capacity: int, model: str) -> None:
        self._folder = folder
        self._capacity = capacity
        self._model = model
        self._loading: set[str] = set()
        self._loaded: dict[str, Adapter] = {}
        self._in_memory: dict[str, LoRARequest] = {}  # by vLLM's name for the adapter
        self._pinned: dict[str, Adapter] = {}  # by vLLM's name, too
        self._last_id = 0

    @property
    def can_load(self) -> bool:
        """Whether there is a folder to load from, and LoRA is enabled."""
        return self._folder is not None and self._capacity > 0

    @property
    def loaded(self) -> list[str]:
        """The names of loaded adapters."""
        return sorted(self._loaded)

    @property
    def lora_requests(self) -> dict[str, LoRARequest]:
        """vLLM's description of each loaded adapter, by the adapter's name."""
        return {name: adapter.lora_request for name, adapter in self._loaded.items()}

    @property
    def available(self) -> list[str]:
        """The names of adapters in the folder that can be loaded."""
        if self._folder is None or not self.can_load:
            return []
        names = (path.parent.name for path in self._folder.glob(f"*/{CONFIG}") if self._is_inside(path.parent))
        return sorted(name for name in names if _is_valid_name(name) and not self._is_taken(name))

    async def load(self, engine: LoraEngine, name: str) -> None:
        """Load an adapter; see `Engine.load_lora`."""
        folder = self._adapter_folder(name)
        if len(self._in_memory) >= self._capacity:
            raise NotEnabledError(
                f"at most {self._capacity} adapters can be loaded (--max-cpu-loras): unload one first"
            )
        self._last_id += 1
        # vLLM's prefix cache identifies an adapter by name and path, not by content, so each load gets a new name.
        # The slash keeps it different from every folder's name.
        lora_request = LoRARequest(f"{name}/{self._last_id}", self._last_id, str(folder.absolute()))
        self._in_memory[lora_request.lora_name] = lora_request
        self._loading.add(name)
        try:
            await _add(engine, lora_request, name)
        except BaseException:  # after a cancellation the engine may have loaded it
            await self._remove(engine, lora_request)
            raise
        finally:
            self._loading.discard(name)
        self._loaded[name] = Adapter(lora_request)

    async def unload(self, engine: LoraEngine, name: str) -> None:
        """Unload an adapter; see `Engine.unload_lora`."""
        if not self.can_load:
            raise _not_enabled()
        if (adapter := self._loaded.pop(name, None)) is None:
            raise ModelNotFoundError(f"`name` must be that of a loaded adapter, not {name:.256}")
        await self._retire(engine, adapter)

    async def _retire(self, engine: LoraEngine, adapter: Adapter) -> None:
        """Remove an adapter that has been unloaded, once no request uses it."""
        adapter.is_unloaded = True
        if not adapter.pins:
            await self._remove(engine, adapter.lora_request)

    @asynccontextmanager
    async def pin_lora(self, engine: LoraEngine, name: str) -> AsyncGenerator[LoRARequest, None]:
        """Keep an adapter in memory.

        Args:
            name: the name of a loaded adapter, or vLLM's name for a pinned one.

        Raises:
            ModelNotFoundError: the adapter is not loaded, or has been unloaded.
        """
        adapter = self._pinned.get(name) or self._loaded.get(name)
        if adapter is None:
            raise model_not_found(name, self._model)
        adapter.pins += 1
        self._pinned[adapter.lora_request.lora_name] = adapter
        try:
            yield adapter.lora_request
        finally:
            adapter.pins -= 1
            if not adapter.pins:
                del self._pinned[adapter.lora_request.lora_name]
                if adapter.is_unloaded:
                    await self._remove(engine, adapter.lora_request)

    def _is_taken(self, name: str) -> bool:
        return name in self._loaded or name in self._loading or name == self._model

    def _is_inside(self, folder: Path) -> bool:
        """Return whether an adapter's folder and its files have no symbolic link out of the folder of all adapters."""
        assert self._folder is not None
        root = self._folder.resolve()
        return all(path.resolve().is_relative_to(root) for path in (folder, *folder.iterdir()))

    def _adapter_folder(self, name: str) -> Path:
        if self._folder is None or not self.can_load:
            raise _not_enabled()
        if not _is_valid_name(name):
            description = "`name` must be the name of a folder, without a path or a leading dot"
            raise InvalidRequestError([Violation("name", description)])
        if self._is_taken(name):
            raise DuplicateLoraError(f"`name` must not be in use by a model or adapter, not {name}")
        folder = self._folder / name
        if not (folder / CONFIG).is_file() or not self._is_inside(folder):
            raise ModelNotFoundError(f"`name` must be that of an adapter in the server's folder, not {name}")
        return folder

    async def _remove(self, engine: LoraEngine, lora_request: LoRARequest) -> None:
        try:
            with suppress(EngineDeadError):
                await engine.remove_lora(lora_request.lora_int_id)
        finally:
            del self._in_memory[lora_request.lora_name]


def create_registry(options: EngineOptions, folder: Path | None) -> LoraRegistry:
    """Return the registry of an engine, without adapters."""
    return LoraRegistry(folder, *registry_arguments(options))


def registry_arguments(options: EngineOptions) -> tuple[int, str]:
    """Return the number of adapters that an engine keeps in memory, and the served model's name."""
    lora, name = options.config.lora_config, str(options.config.model_config.served_model_name)
    return (lora.max_cpu_loras or 0) if lora else 0, name


def _is_valid_name(name: str) -> bool:
    return bool(name) and name[0] != "." and "/" not in name and name.isprintable() and len(name.encode()) <= 255


async def _add(engine: LoraEngine, lora_request: LoRARequest, name: str) -> None:
    try:
        if await engine.add_lora(lora_request):
            return
        cause: Exception = ValueError("a worker could not load it")
    except EngineDeadError as error:
        raise UnavailableError("the engine was lost") from error
    except Exception as error:  # vLLM's workers return errors as text only
        cause = error
    description = f"`name` must be that of an adapter that fits the model, not {name}; see the server's log"
    raise InvalidRequestError([Violation("name", description)]) from cause


def _not_enabled() -> NotEnabledError:
    return NotEnabledError("LoRA adapters need a server that was started with --enable-lora and --lora-folder")
