"""The LoRA adapters of a server: loaded out of one folder, by name."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from yuan_grpc.server.errors import (
    DuplicateLoraError,
    InvalidRequestError,
    ModelNotFoundError,
    NotEnabledError,
    UnavailableError,
    Violation,
)

CONFIG = "adapter_config.json"


@dataclass
class _Adapter:
    request: LoRARequest
    holders: int = 0
    unloaded: bool = False


class LoraRegistry:
    """Knows which adapters are loaded, and which jobs run with them.

    Nobody can name an adapter before the engine has it, nothing is loaded beyond what the engine keeps in memory, and
    nothing is dropped from under a running job: vLLM would read the adapter's files in the midst of a step, and die if
    they are gone or wrong.

    Args:
        folder: has a folder for each adapter; None where none can be loaded.
        room: how many the engine keeps in memory; 0 where LoRA is not enabled.
        model: the served model's name.
    """

    def __init__(self, folder: Path | None, room: int, model: str) -> None:
        self._folder = folder
        self._room = room
        self._model = model
        self._loading: set[str] = set()
        self._loaded: dict[str, _Adapter] = {}
        self._in_memory: dict[str, LoRARequest] = {}  # by the name that vLLM knows it by
        self._held: dict[str, _Adapter] = {}  # by the same
        self._last_id = 0

    @property
    def can_load(self) -> bool:
        """Whether there is a folder to load from, and room."""
        return self._folder is not None and self._room > 0

    @property
    def loaded(self) -> list[str]:
        """The names of loaded adapters."""
        return sorted(self._loaded)

    @property
    def available(self) -> list[str]:
        """The names in the folder that could be loaded."""
        if self._folder is None or not self.can_load:
            return []
        names = (path.parent.name for path in self._folder.glob(f"*/{CONFIG}"))
        return sorted(name for name in names if self._may_be_named(name) and not self._is_taken(name))

    async def load(self, llm: AsyncLLM, name: str) -> None:
        """See `Engine.load_lora`."""
        folder = self._folder_of(name)
        if len(self._in_memory) >= self._room:
            raise NotEnabledError(f"there is room for {self._room} adapters (--max-cpu-loras): unload one first")
        self._last_id += 1
        # A name of its own each time: vLLM's prefix cache knows an adapter by name and path, not by what is in it. And
        # one with a slash, so that no folder's is the same.
        request = LoRARequest(f"{name}/{self._last_id}", self._last_id, str(folder.absolute()))
        self._in_memory[request.lora_name] = request
        self._loading.add(name)
        try:
            await _add(llm, request, name)
        except BaseException:  # cancelled too: then the engine may yet have got it
            await self._drop(llm, request)
            raise
        finally:
            self._loading.discard(name)
        self._loaded[name] = _Adapter(request)

    async def unload(self, llm: AsyncLLM, name: str) -> None:
        """See `Engine.unload_lora`."""
        if not self.can_load:
            raise _not_enabled()
        if (adapter := self._loaded.pop(name, None)) is None:
            raise ModelNotFoundError(f"`name` must be that of a loaded adapter, not {name:.256}")
        adapter.unloaded = True
        if not adapter.holders:
            await self._drop(llm, adapter.request)

    @asynccontextmanager
    async def pin_lora(self, llm: AsyncLLM, name: str) -> AsyncGenerator[LoRARequest, None]:
        """Keeps an adapter from being dropped.

        Args:
            name: that of a loaded one, or the one that vLLM knows a held one by.

        Raises:
            ModelNotFoundError: it has just been unloaded.
        """
        adapter = self._held.get(name) or self._loaded.get(name)
        if adapter is None:
            raise ModelNotFoundError(f"`model` must be the served model or a loaded LoRA adapter, not {name:.256}")
        adapter.holders += 1
        self._held[adapter.request.lora_name] = adapter
        try:
            yield adapter.request
        finally:
            adapter.holders -= 1
            if not adapter.holders:
                del self._held[adapter.request.lora_name]
                if adapter.unloaded:
                    await self._drop(llm, adapter.request)

    def _may_be_named(self, name: str) -> bool:
        return bool(name) and name[0] != "." and "/" not in name and name.isprintable() and len(name.encode()) <= 255

    def _is_taken(self, name: str) -> bool:
        return name in self._loaded or name in self._loading or name == self._model

    def _folder_of(self, name: str) -> Path:
        if self._folder is None or not self.can_load:
            raise _not_enabled()
        if not self._may_be_named(name):
            sentence = "`name` must be the name of a folder, without a path and without a dot in front"
            raise InvalidRequestError([Violation("name", sentence)])
        if self._is_taken(name):
            raise DuplicateLoraError(f"`name` must not be that of a loaded model or adapter, as {name} is")
        folder = self._folder / name
        if not (folder / CONFIG).is_file():
            raise ModelNotFoundError(f"`name` must be that of an adapter in the server's folder, not {name}")
        return folder

    async def _drop(self, llm: AsyncLLM, request: LoRARequest) -> None:
        try:
            with suppress(EngineDeadError):
                await llm.remove_lora(request.lora_int_id)
        finally:
            del self._in_memory[request.lora_name]


async def _add(llm: AsyncLLM, request: LoRARequest, name: str) -> None:
    try:
        if await llm.add_lora(request):
            return
        cause: Exception = ValueError("a worker could not load it")
    except EngineDeadError as error:
        raise UnavailableError("the engine was lost") from error
    except Exception as error:  # vLLM's workers tell no more of it than a text
        cause = error
    sentence = f"`name` must be that of an adapter that fits the model, not {name}; the server's log has more"
    raise InvalidRequestError([Violation("name", sentence)]) from cause


def _not_enabled() -> NotEnabledError:
    return NotEnabledError("LoRA adapters need a server that was started with --enable-lora and --lora-folder")
