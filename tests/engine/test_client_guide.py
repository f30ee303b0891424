"""The client's documentation, run against the demo model, and the client against a real engine."""

import asyncio
import doctest
from pathlib import Path

import pytest
from engine.conftest import Served

from yuan_grpc.client import AsyncClient, Client

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

DOCUMENT = Path(__file__).parents[2] / "docs" / "client.md"


async def test_the_documentations_examples_hold(address: str) -> None:
    failed, tried = await asyncio.to_thread(
        doctest.testfile,
        str(DOCUMENT),
        module_relative=False,
        globs={"ADDRESS": address},
        optionflags=doctest.REPORT_NDIFF,
        encoding="utf-8",
    )
    assert tried > 30
    assert not failed


async def test_many_answers_are_each_requests_own(address: str) -> None:
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
    await served.until_empty()
