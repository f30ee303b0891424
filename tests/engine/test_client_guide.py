"""The examples of the client's guide, run against the demo model, and the clients against a real engine."""

import asyncio
import doctest
from pathlib import Path

import pytest
from engine.conftest import Served

from yuan_grpc.client import AsyncClient, Client

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

DOCUMENT = Path(__file__).parents[2] / "docs" / "call" / "python.md"


async def test_the_examples_of_the_guide_run(address: str) -> None:
    failures, attempts = await asyncio.to_thread(
        doctest.testfile,
        str(DOCUMENT),
        module_relative=False,
        globs={"ADDRESS": address},
        optionflags=doctest.REPORT_NDIFF,
        encoding="utf-8",
    )
    assert attempts > 30
    assert not failures


async def test_generate_many_gives_each_prompt_its_own_text(address: str) -> None:
    prompts = [f"{number}的平方是" for number in range(40)]
    async with AsyncClient(address) as client:
        alone = [(await client.generate(prompt, max_tokens=8, top_k=1)).text for prompt in prompts[:3]]
        many = [result.text async for result in client.generate_many(prompts, max_tokens=8, top_k=1)]
    assert many[:3] == alone
    assert len(many) == len(prompts)


async def test_leaving_a_stream_frees_the_engine(served: Served, address: str) -> None:
    def leave() -> None:
        with Client(address) as client, client.stream("从前", max_tokens=200, ignore_eos=True) as stream:
            next(stream)

    await asyncio.to_thread(leave)
    await served.wait_until_empty()
