"""Turns to tokenize: long texts leave cores to others, and short ones wait for none."""

import asyncio

from fake_engine import FakeEngine

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.core.limits import MAX_INLINE_CHARACTERS


async def take_turn(service: GenerationService, characters: int) -> None:
    async with service.tokenization_permit(characters):
        pass


async def test_long_texts_wait_for_each_other_and_short_ones_do_not() -> None:
    service = GenerationService(FakeEngine())
    async with service.tokenization_permit(MAX_INLINE_CHARACTERS + 1):
        long = asyncio.create_task(take_turn(service, MAX_INLINE_CHARACTERS + 1))
        await asyncio.wait_for(take_turn(service, MAX_INLINE_CHARACTERS), 30)
        assert not long.done()
    await long
