"""A light caller and a heavy one on the same engine."""

import asyncio

import pytest

from yuan_grpc.client import AsyncClient, ResourceExhaustedError

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]


async def test_a_light_caller_among_128_heavy_loops_gets_all_its_answers(address: str) -> None:
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    done, answers = asyncio.Event(), 0
    async with AsyncClient(address, options=own_connection) as heavy, AsyncClient(address, retries=0) as light:

        async def loop() -> None:
            nonlocal answers
            while not done.is_set():
                try:
                    await heavy.generate("山" * 20, max_tokens=8, ignore_eos=True, top_k=1)
                    answers += 1
                except ResourceExhaustedError:
                    await asyncio.sleep(0)

        loops = [asyncio.ensure_future(loop()) for _ in range(128)]
        texts = [(await light.generate("世界", max_tokens=4, ignore_eos=True, top_k=1)).text for _ in range(10)]
        done.set()
        for each in loops:
            each.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
    assert len(set(texts)) == 1
    assert answers
