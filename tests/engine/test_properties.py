"""Whatever message a caller sends, it is served or told why not, and harms nobody.

Each part is some 350 requests, always the same; `-s` shows what came of them. Others, and more of them:
`FUZZ_FIRST=100 FUZZ_PARTS=40 make test ARGS="-s tests/engine/test_properties.py"`.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from calls import Call, Outcome, calls, outcomes_of
from engine.conftest import Served
from engine.test_generate import assert_freed
from google.protobuf.text_format import MessageToString
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from promises import broken

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
PARTS = int(os.environ.get("FUZZ_PARTS", "9"))
ROUNDS = 10
"""Beyond these hypothesis changes little from one round to the next."""
CALLS = 30
PLAIN = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=12, top_k=1, logprobs=0)


@pytest.fixture(scope="module")
def counted() -> Iterator[Counter[str]]:
    """Requests by what came of them; printed at the end, which `-s` shows."""
    outcomes = Counter[str]()
    yield outcomes
    told = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    print(f"\n{outcomes.total()} requests: {told}")


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of what failed
@pytest.mark.parametrize("part", range(FIRST, FIRST + PARTS))
@settings(
    max_examples=ROUNDS,
    derandomize=True,  # other parts are other requests
    deadline=None,
    phases=[Phase.generate],  # what fails in company may not fail alone: all that failed is told, and nothing shrunk
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(made=st.lists(calls, min_size=CALLS, max_size=CALLS))
async def test_any_message_is_answered_or_told_why_not(
    served: Served, counted: Counter[str], part: int, made: list[Call]
) -> None:
    expected = (await served.generate(PLAIN)).choices
    outcomes = await outcomes_of(served, made)
    counted.update(outcome.code.name for outcome in outcomes)
    failures = [(outcome, problems) for outcome in outcomes if (problems := broken(outcome))]
    assert not failures, "\n\n".join(_told(*failure) for failure in failures)
    await assert_freed(served)
    assert (await served.generate(PLAIN)).choices == expected


def _told(outcome: Outcome, problems: list[str]) -> str:
    request: Any = MessageToString(outcome.request, as_utf8=True)
    return f"{outcome.call.rpc} {outcome.code.name}: {problems}\n{request:.1500}"
