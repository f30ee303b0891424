"""Valid requests with a lot of work harm nobody but the caller who sends them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from engine.conftest import Served
from neighbor import neighbor_gaps

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "写一份年度报告"
ATTEMPTS = 3
"""A gap of another process's making is in one attempt, a caller's in each."""


async def send_batch(served: Served) -> None:
    """Generate 256 choices in one batch."""
    request = pb.GenerateRequest(prompt=PROMPT, n=128, max_tokens=4, ignore_eos=True)
    items = [pb.GenerateBatchRequest(request=request)] * 2
    stub: Any = served.stub
    assert [result async for result in stub.GenerateBatch(iter(items))]


async def send_beam_searches(served: Served) -> None:
    """Search with 128 beams, in eight calls at once."""
    request = pb.GenerateRequest(prompt=PROMPT, best_of=128, use_beam_search=True, max_tokens=2, ignore_eos=True)
    calls = [served.stub.Generate(request) for _ in range(8)]
    await asyncio.gather(*calls, return_exceptions=True)  # some are refused: the queue of this server is short


@pytest.mark.parametrize("send", [send_batch, send_beam_searches])
async def test_much_work_of_one_caller_does_not_hold_up_the_tokens_of_another(
    session_server: Served, send: Callable[[Served], Awaitable[None]]
) -> None:
    for _ in range(ATTEMPTS):
        async with neighbor_gaps(session_server.stub) as gaps:
            await send(session_server)
        if gaps.is_largest_acceptable:
            return
    pytest.fail(str(gaps))
