"""Beam search with a LoRA adapter: all requests of a search use the adapter it began with."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from unit.test_beam_search import TableEngine, all_outputs, random_table

from yuan_grpc.server.core.beam_search import BeamSearch
from yuan_grpc.server.engine.types import BeamSearchParams, EngineRequest, Sampling


class PinningEngine(TableEngine):
    """Names a pinned adapter differently, and records which are pinned at each request."""

    def __init__(self) -> None:
        super().__init__(random_table(0, 5), 5)
        self.pins: list[str] = []

    @asynccontextmanager
    async def pin_lora(self, lora: str) -> AsyncGenerator[str, None]:
        self.pins.append(lora)
        yield f"pinned {lora}"
        assert self.running == 0
        self.pins.append("end")


async def search(lora: str) -> PinningEngine:
    engine = PinningEngine()
    request = EngineRequest("id", (1, 2), Sampling(max_tokens=4, ignore_eos=True), lora=lora)
    await all_outputs(BeamSearch(engine, request, BeamSearchParams(2, 3)))
    return engine


async def test_a_search_pins_its_adapter_from_the_first_request_to_the_last() -> None:
    engine = await search("style")
    assert engine.pins == ["style", "end"]
    assert len(engine.requests) > 3
    assert {request.lora for request in engine.requests} == {"pinned style"}


async def test_a_search_without_an_adapter_pins_none() -> None:
    engine = await search("")
    assert engine.pins == []
    assert {request.lora for request in engine.requests} == {""}
