"""Property tests: every request gets a valid response or a valid error, and does not affect others.

Each part makes some 175 requests, which are the same in every run; `-s` prints a summary of their outcomes. Run other
and more requests with `FUZZ_FIRST=100 FUZZ_PARTS=40 make test ARGS="-s tests/engine/test_properties.py"`.
"""

import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from engine.conftest import FLAGS, Served, serve_demo
from engine.test_generate import assert_freed
from google.protobuf.text_format import MessageToString
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from invariants import violations
from random_requests import Call, Outcome, calls, make_calls

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
PARTS = int(os.environ.get("FUZZ_PARTS", "4"))
DRAFTING_PARTS = -(-PARTS // 4)
DRAFTS = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}'
ROUNDS = 5
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


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def drafting(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A server that drafts tokens."""
    async with serve_demo((*FLAGS, f"--speculative-config={DRAFTS}"), tmp_path_factory.mktemp("adapters")) as served:
        yield served


property_test = settings(
    max_examples=ROUNDS,
    derandomize=True,  # the part number varies the requests
    deadline=None,
    phases=[Phase.generate],  # do not shrink: a failure may depend on concurrent calls
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # raised for failures
@pytest.mark.parametrize("part", range(FIRST, FIRST + PARTS))
@property_test
@given(made=st.lists(calls, min_size=CALLS, max_size=CALLS))
async def test_every_request_gets_a_valid_response_or_error(
    served: Served, summary: Counter[str], part: int, made: list[Call]
) -> None:
    await check_calls(served, summary, made)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.parametrize("part", range(FIRST, FIRST + DRAFTING_PARTS))
@property_test
@given(made=st.lists(calls, min_size=CALLS, max_size=CALLS))
async def test_every_request_gets_a_valid_response_or_error_from_a_server_that_drafts(
    drafting: Served, summary: Counter[str], part: int, made: list[Call]
) -> None:
    await check_calls(drafting, summary, made)


async def check_calls(served: Served, summary: Counter[str], made: list[Call]) -> None:
    """Make calls concurrently, and check each outcome and that they free everything."""
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
