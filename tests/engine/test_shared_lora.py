"""The adapters in a front end, released in the process that has loaded them."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]
NO_ENGINE: Any = None


class Leader:
    """Stands for the process that has loaded the adapters; releases one when `permission` is set."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.permission = asyncio.Event()
        self.released: list[str] = []

    async def release(self, name: str) -> None:
        self.asked.set()
        await self.permission.wait()
        self.released.append(name)


async def unused(name: str) -> None:
    raise AssertionError(name)


def registry_of(leader: Leader) -> Any:
    from vllm.lora.request import LoRARequest  # vLLM warns while it is imported

    from yuan_grpc.server.engine.vllm.shared_lora import SharedLoraRegistry

    config = SimpleNamespace(lora_config=None, model_config=SimpleNamespace(served_model_name="yuan"))
    options: Any = SimpleNamespace(config=config)
    registry = SharedLoraRegistry(options, Path("adapters"), unused, unused, leader.release)
    registry.add("style", LoRARequest("style/1", 1, "adapters/style"))
    return registry


async def hold(registry: Any, end: asyncio.Event) -> None:
    async with registry.pin_lora(NO_ENGINE, "style"):
        await end.wait()


async def test_a_request_ends_after_the_unloaded_adapter_that_it_used_has_been_released() -> None:
    leader, end = Leader(), asyncio.Event()
    registry = registry_of(leader)
    request = asyncio.ensure_future(hold(registry, end))
    await asyncio.sleep(0)
    await registry.discard("style")
    assert not leader.asked.is_set()
    end.set()
    await leader.asked.wait()
    assert not request.done()
    leader.permission.set()
    await request
    assert leader.released == ["style/1"]


async def test_a_request_that_is_cancelled_while_it_ends_releases_its_adapter() -> None:
    leader = Leader()
    registry = registry_of(leader)
    request = asyncio.ensure_future(hold(registry, asyncio.Event()))
    await asyncio.sleep(0)
    await registry.discard("style")
    request.cancel()
    await leader.asked.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    leader.permission.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert leader.released == ["style/1"]


class Engine:
    """Removes an adapter when `permission` is set."""

    def __init__(self) -> None:
        self.permission = asyncio.Event()
        self.permission.set()
        self.removed: list[int] = []

    async def add_lora(self, lora_request: Any) -> bool:
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        await self.permission.wait()
        self.removed.append(lora_id)
        return True


async def leader_of(engine: Engine, folder: Path, *names: str) -> Any:
    """Return the leader of an engine with adapters in a folder, which front end 0 uses."""
    from yuan_grpc.server.engine.vllm.lora import LoraRegistry
    from yuan_grpc.server.engine.vllm.shared_lora import LoraLeader

    leader = LoraLeader(LoraRegistry(folder, 4, "yuan"), engine)
    for name in names:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").touch()
        await leader.load(name)
        await leader.acquire(0, name)
    return leader


async def test_an_adapter_that_a_front_end_got_twice_is_removed_when_it_is_released(tmp_path: Path) -> None:
    engine = Engine()
    leader = await leader_of(engine, tmp_path, "style")
    await leader.acquire(0, "style")  # as a front end that is starting while the adapter is loaded
    await leader.unload("style")
    assert engine.removed == []
    await leader.release(0, "style/1")
    assert engine.removed == [1]


async def test_an_adapter_that_a_dead_front_end_gets_meanwhile_is_released_too(tmp_path: Path) -> None:
    engine = Engine()
    leader = await leader_of(engine, tmp_path, "style", "tone")
    await leader.release(0, "tone/2")
    await leader.unload("style")
    engine.permission.clear()
    releasing = asyncio.ensure_future(leader.release_all(0))
    await asyncio.sleep(0)
    await leader.acquire(0, "tone")
    engine.permission.set()
    await releasing
    await leader.unload("tone")
    assert engine.removed == [1, 2]
