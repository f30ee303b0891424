"""Limits on what callers have running and waiting, and the order of their turns."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from fake_engine import INFO

from yuan_grpc.server.core.admission import Admission, Cost, Limits, limits_of, min_output_tokens, request_cost
from yuan_grpc.server.core.pace import Pace
from yuan_grpc.server.errors import DeadlineTooShortError, OverloadedError
from yuan_grpc.server.security.identity import ANONYMOUS, Identity, calling_as, current_share
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1.yuan_pb2 import GenerateRequest as Request

ONE = Cost(1, 10)
WIDE = Limits(Cost(1000, 1_000_000), None)


def num_admitted(admission: Admission, stack: ExitStack, caller: str, limits: Limits, cost: Cost = ONE) -> int:
    """Admit requests until one is refused; return their number."""
    for count in range(10_000):
        try:
            stack.enter_context(admission.admit(caller, cost, limits))
        except OverloadedError:
            return count
    raise AssertionError("nothing is refused")


async def test_a_queue_has_its_limit_exactly_and_is_free_again_afterwards() -> None:
    admission, limits = Admission(), Limits(Cost(4, 10**6), None)
    for _ in range(2):
        with ExitStack() as stack:
            assert num_admitted(admission, stack, "a", limits) == 4
            with pytest.raises(OverloadedError, match=r"the request queue is full \(limit 4\)"):
                stack.enter_context(admission.admit("b", ONE, limits))
    with admission.admit("a", Cost(5, 10), limits):  # validation rejects it, because it never fits
        pass


async def test_tokens_are_limited_too() -> None:
    admission, limits = Admission(), Limits(Cost(1000, 45), None)
    with ExitStack() as stack:
        assert num_admitted(admission, stack, "a", limits) == 4
        with pytest.raises(OverloadedError, match=r"the queue of tokens is full \(limit 45\)"):
            stack.enter_context(admission.admit("a", ONE, limits))


async def test_heavy_callers_leave_a_part_for_others() -> None:
    admission, limits = Admission(), Limits(Cost(900, 10**9), None)
    with ExitStack() as stack:
        first = num_admitted(admission, stack, "first", limits)
        second = num_admitted(admission, stack, "second", limits)
        third = num_admitted(admission, stack, "third", limits)
        assert first == 800
        assert second > 80
        assert third > 0
        with pytest.raises(OverloadedError, match="has no more for this caller"):
            stack.enter_context(admission.admit("first", ONE, limits))


async def test_shares_become_equal_as_requests_end() -> None:
    admission, limits = Admission(), Limits(Cost(170, 10**9), None)
    running: dict[str, list[ExitStack]] = {"a": [], "b": []}

    def admit(caller: str) -> None:
        stack = ExitStack()
        try:
            stack.enter_context(admission.admit(caller, ONE, limits))
        except OverloadedError:
            return
        running[caller].append(stack)

    for _ in range(200):
        admit("a")
    for _ in range(400):
        for caller in ("a", "b"):
            if len(running["a"]) + len(running["b"]) > 100 and running[caller]:
                running[caller].pop(0).close()
            admit(caller)
            admit(caller)
    assert abs(len(running["a"]) - len(running["b"])) < 10
    for stack in running["a"] + running["b"]:
        stack.close()


async def until(condition: Callable[..., bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of any test
        await asyncio.sleep(0)


@asynccontextmanager
async def running(
    admission: Admission, limits: Limits, caller: str, started: list[str], cost: Cost = ONE
) -> AsyncIterator[asyncio.Event]:
    """Yield an event that ends a request, which adds its caller to `started` at its turn."""
    may_end = asyncio.Event()

    async def run() -> None:
        with admission.admit(caller, cost, limits) as ticket:
            if not admission.try_start(ticket, limits):
                await admission.wait_for_turn(ticket)
            started.append(caller)
            await may_end.wait()

    task = asyncio.ensure_future(run())
    await asyncio.sleep(0)
    yield may_end
    may_end.set()
    await task


async def finish_in_order(admission: Admission, limits: Limits, arrivals: list[tuple[str, Cost]]) -> list[str]:
    """Return the callers in the order of their turns, if each request ends right after its turn."""
    started: list[str] = []

    async def run(caller: str, cost: Cost) -> None:
        with admission.admit(caller, cost, limits) as ticket:
            if not admission.try_start(ticket, limits):
                await admission.wait_for_turn(ticket)
            started.append(caller)
            await asyncio.sleep(0)

    await asyncio.gather(*(run(caller, cost) for caller, cost in arrivals))
    return started


async def test_a_light_caller_does_not_wait_for_all_requests_of_a_heavy_one() -> None:
    limits = Limits(Cost(1000, 10**9), Cost(2, 10**9))
    arrivals = [("heavy", Cost(1, 500))] * 128 + [("light", Cost(1, 20))] * 5
    order = await finish_in_order(Admission(), limits, arrivals)
    assert len(order) == 133
    assert max(index for index, caller in enumerate(order) if caller == "light") < 10


async def test_callers_with_equal_requests_take_turns() -> None:
    limits = Limits(Cost(1000, 10**9), Cost(1, 10**9))
    order = await finish_in_order(Admission(), limits, [("a", ONE)] * 20 + [("b", ONE)] * 20)
    assert order[2:40].count("a") == 19
    assert all(set(order[index : index + 2]) == {"a", "b"} for index in range(2, 38, 2))


async def test_the_engine_has_no_more_than_its_sequences_and_tokens() -> None:
    for limit in (Cost(3, 10**9), Cost(100, 30)):
        admission, limits, started = Admission(), Limits(WIDE.queue, limit), list[str]()
        async with (
            running(admission, limits, "a", started) as first,
            running(admission, limits, "a", started),
            running(admission, limits, "a", started),
            running(admission, limits, "b", started),
        ):
            assert started == ["a"] * 3
            first.set()
            await until(lambda started=started: started == ["a", "a", "a", "b"])


async def test_a_large_request_does_not_wait_for_an_empty_engine() -> None:
    admission, limits, started = Admission(), Limits(WIDE.queue, Cost(3, 10**9)), list[str]()
    async with (
        running(admission, limits, "small", started) as first,
        running(admission, limits, "large", started, Cost(128, 10)) as second,
        running(admission, limits, "next", started),
    ):
        assert started == ["small", "large"]
        first.set()
        await asyncio.sleep(0)
        assert started == ["small", "large"]
        second.set()
        await until(lambda: started == ["small", "large", "next"])


async def test_a_cancelled_request_gives_its_place_up() -> None:
    admission, limits, started = Admission(), Limits(WIDE.queue, ONE), list[str]()
    async with running(admission, limits, "a", started) as first:

        async def wait() -> None:
            with admission.admit("b", ONE, limits) as ticket:
                assert not admission.try_start(ticket, limits)
                await admission.wait_for_turn(ticket)

        waiting = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with running(admission, limits, "c", started):
            first.set()
            await until(lambda: started == ["a", "c"])
    with ExitStack() as stack:
        assert num_admitted(admission, stack, "d", Limits(Cost(4, 10**6), ONE)) == 4


async def test_a_partial_result_needs_no_turn() -> None:
    admission, limits, deadline = Admission(), Limits(WIDE.queue, ONE), asyncio.Event()
    async with running(admission, limits, "a", []):
        with admission.admit("b", ONE, limits) as ticket:
            deadline.set()
            await admission.wait_for_turn(ticket, deadline)
            assert not ticket.has_engine


async def test_a_request_that_cannot_finish_before_its_deadline_is_refused_or_gives_its_turn_to_the_next() -> None:
    admission, limits, started = Admission(), Limits(WIDE.queue, ONE), list[str]()
    admission.pace.observe(tokens=10, seconds=1.0)
    with pytest.raises(DeadlineTooShortError, match="100 tokens take at least 10 s, and 9 s are left"):
        admission.admit("a", ONE, limits, min_tokens=100, remaining=9).__enter__()
    async with running(admission, limits, "a", started) as first:

        async def wait() -> None:
            with admission.admit("b", ONE, limits, min_tokens=10, remaining=5) as ticket:
                await admission.wait_for_turn(ticket)

        late = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        admission.pace._seconds = 1.0  # the engine has become slower meanwhile
        async with running(admission, limits, "c", started):
            first.set()
            with pytest.raises(DeadlineTooShortError):
                await late
            await until(lambda: started == ["a", "c"])


def test_the_pace_is_that_of_the_fastest_request() -> None:
    pace = Pace()
    assert pace.min_seconds(100) == 0
    for tokens, seconds in ((10, 1.0), (100, 1.0), (10, 5.0), (0, 1.0)):
        pace.observe(tokens, seconds)
    assert pace.min_seconds(50) == 0.5


async def test_an_estimate_from_a_slow_time_does_not_refuse_forever() -> None:
    admission, refusals = Admission(), 0
    admission.pace.observe(tokens=1, seconds=10.0)
    for _ in range(100):
        try:
            with admission.admit("a", ONE, WIDE, min_tokens=10, remaining=30):
                break
        except DeadlineTooShortError:
            refusals += 1
    assert 1 < refusals < 20


@pytest.mark.parametrize(
    ("request_", "cost"),
    [
        (Request(prompt="A" * 20), Cost(1, 26)),
        (Request(prompt="A" * 20, n=3, temperature=0.5), Cost(3, 78)),
        (Request(prompt="A" * 20, n=3, temperature=0), Cost(1, 26)),
        (Request(prompt="A" * 20, n=2, best_of=5, temperature=0.5), Cost(5, 130)),
        (Request(prompt="A" * 20, best_of=8, use_beam_search=True), Cost(8, 208)),
        (Request(prompt_token_ids=pb.TokenIds(ids=[1] * 7), max_tokens=3), Cost(1, 10)),
        (Request(prompt="A" * 10**6, max_tokens=2**31 - 1), Cost(1, 128)),
        (Request(messages=[pb.Message(content="A" * 8)] * 2, max_tokens=0), Cost(1, 8)),
    ],
    ids=["prompt", "choices", "greedy choices", "best of", "beams", "token ids", "too large", "messages"],
)
def test_the_cost_multiplies_choices_and_beams(request_: Request, cost: Cost) -> None:
    assert request_cost(request_, INFO) == cost


def test_tokens_that_a_request_has_at_least() -> None:
    expected = [
        (Request(), 1),
        (Request(min_tokens=5), 5),
        (Request(ignore_eos=True, max_tokens=9), 9),
        (Request(max_tokens=0), 0),
        (Request(min_tokens=99), 16),
        (Request(ignore_eos=True, max_tokens=50, prompt="A" * 60), 4),
        (Request(ignore_eos=True, max_tokens=50, prompt="A" * 999), 1),
    ]
    assert [min_output_tokens(request, INFO) for request, _ in expected] == [tokens for _, tokens in expected]


def test_limits_follow_the_cache_and_the_sequences_of_the_engine() -> None:
    info = replace(INFO, max_num_seqs=256, max_model_len=4096, cache_tokens=300_000)
    assert limits_of(info) == Limits(Cost(2048, 4_800_000), Cost(288, 600_000))
    assert limits_of(replace(info, max_num_queued_reqs=100)).queue.sequences == 100
    assert limits_of(replace(info, data_parallel=2)).queue.sequences == 4096
    assert limits_of(replace(info, priority_scheduling=True)).engine is None


@pytest.mark.parametrize(
    ("name", "peer", "share"),
    [
        ("alice", "ipv4:10.0.0.1:5000", "name:alice"),
        ("", "ipv4:10.0.0.1:5000", "ipv4:10.0.0.1"),
        ("", "ipv6:%5Bfd00::1%5D:5000", "ipv6:%5Bfd00::1%5D"),
        ("", "http:10.0.0.1:5000", "http:10.0.0.1"),
        ("", "ipv4:127.0.0.1:5000", "ipv4:127.0.0.1:5000"),
        ("", "ipv6:%5B::1%5D:5000", "ipv6:%5B::1%5D:5000"),
        ("", "unix:", "unix"),
    ],
    ids=["name", "IPv4", "IPv6", "HTTP", "loopback IPv4", "loopback IPv6", "unix socket"],
)
def test_callers_share_by_name_by_host_or_by_local_connection(name: str, peer: str, share: str) -> None:
    with calling_as(Identity(name) if name else ANONYMOUS, peer):
        assert current_share() == share
