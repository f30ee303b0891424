"""Property tests: every request gets a valid response or a valid error, and does not affect others.

Each part makes some 350 requests, which are the same in every run; `-s` prints a summary of their outcomes. Run other
and more requests with `FUZZ_FIRST=100 FUZZ_PARTS=40 make test ARGS="-s tests/engine/test_properties.py"`.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from engine.conftest import Served
from engine.test_generate import assert_freed
from google.protobuf.text_format import MessageToString
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from invariants import violations
from random_requests import Call, Outcome, calls, make_calls

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
PARTS = int(os.environ.get("FUZZ_PARTS", "9"))
ROUNDS = 10
"""Examples per part. In further examples hypothesis varies little."""
CALLS = 30
PLAIN = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=12, top_k=1, logprobs=0)


@pytest.fixture(scope="module")
def summary() -> Iterator[Counter[str]]:
    """Number of requests by outcome, printed at the end."""
    outcomes = Counter[str]()
    yield outcomes
    counts = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    print(f"\n{outcomes.total()} requests: {counts}")


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # raised for failures
@pytest.mark.parametrize("part", range(FIRST, FIRST + PARTS))
@settings(
    max_examples=ROUNDS,
    derandomize=True,  # the part number varies the requests
    deadline=None,
    phases=[Phase.generate],  # do not shrink: a failure may depend on concurrent calls
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
@given(made=st.lists(calls, min_size=CALLS, max_size=CALLS))
async def test_every_request_gets_a_valid_response_or_error(
    served: Served, summary: Counter[str], part: int, made: list[Call]
) -> None:
    expected = (await served.generate(PLAIN)).choices
    outcomes = await make_calls(served, made)
    summary.update(outcome.code.name for outcome in outcomes)
    failures = [(outcome, found) for outcome in outcomes if (found := violations(outcome))]
    assert not failures, "\n\n".join(_describe(*failure) for failure in failures)
    await assert_freed(served)
    assert (await served.generate(PLAIN)).choices == expected


def _describe(outcome: Outcome, found: list[str]) -> str:
    request: Any = MessageToString(outcome.request, as_utf8=True)
    return f"{outcome.call.rpc} {outcome.code.name}: {found}\n{request:.1500}"
