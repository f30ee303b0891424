"""Constraints that cost too much harm nobody but the caller who sends them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial

import grpc
import psutil
import pytest
import pytest_asyncio
from engine.conftest import Served
from neighbor import neighbor_gaps

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "世界上最高的山是什么"
ATTEMPTS = "abc"
"""Ends of constraints. A gap of another process's making is in one attempt, a constraint's in each."""
SECONDS = 1
"""Processor time to compile an expensive constraint in these tests. Cheap ones need a hundredth."""


def properties(count: int, **keywords: object) -> str:
    declared = {f"p{i}": {"type": "integer"} for i in range(count)}
    return json.dumps({"type": "object", "properties": declared, **keywords})


def regexes(pattern: str, count: int, end: str) -> list[pb.StructuredOutputs]:
    return [pb.StructuredOutputs(regex=pattern + end * (index + 1)) for index in range(count)]


ATTACKS: dict[str, Callable[[str], list[pb.StructuredOutputs]]] = {
    "alternatives": partial(regexes, "((a|ab|abc|b|bc)*(a|b)*)*" * 40, 3),
    "nested stars": partial(regexes, "(" * 100 + "a*" + ")*" * 100, 3),
    "nested counts": partial(regexes, "((a{0,100}){0,100}){0,100}", 3),
    "after a prefix": partial(regexes, "x{60}" + "(" * 100 + "a*" + ")*" * 100, 3),
    "many stars": partial(regexes, ".*" * 500, 2),
    "counted properties": lambda end: [
        pb.StructuredOutputs(json=properties(600, minProperties=300, maxProperties=500, title=end))
    ],
    "some properties": lambda end: [pb.StructuredOutputs(json=properties(200, minProperties=1, title=end))],
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def budgeted(session_server: Served) -> AsyncIterator[Served]:
    """The session's server with a small budget for constraints, whose compiling process has started."""
    from yuan_grpc.server.engine.vllm.constraints.compiler import ConstraintCompiler  # vLLM warns while it is imported

    engine = session_server.engine
    constraints = ConstraintCompiler(engine._describe_grammars, SECONDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_constraints", constraints)
        await session_server.generate(constrained(pb.StructuredOutputs(regex="a")))
        yield session_server
    constraints.stop()


def constrained(outputs: pb.StructuredOutputs) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=PROMPT, max_tokens=200, structured_outputs=outputs, temperature=1)


def compiling(served: Served) -> psutil.Process:
    """Return the process that compiles constraints; each of its children compiles one."""
    return psutil.Process(served.engine._constraints._process._process.pid)


async def wait_for_compilations(served: Served, count: int = 1) -> None:
    """Return when constraints are being compiled, or none for 0; the test's timeout is the limit."""
    while min(len(compiling(served).children()), 1) != count:  # noqa: ASYNC110 - psutil has no event for it
        await asyncio.sleep(0.01)


async def error_of(served: Served, outputs: pb.StructuredOutputs) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await served.generate(constrained(outputs))
    return raised.value


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
async def test_an_expensive_constraint_is_rejected_and_does_not_slow_a_neighbor(
    budgeted: Served, attack: Callable[[str], list[pb.StructuredOutputs]]
) -> None:
    for end in ATTEMPTS:
        async with neighbor_gaps(budgeted.stub) as gaps:
            errors = await asyncio.gather(*(error_of(budgeted, outputs) for outputs in attack(end)))
        for error, outputs in zip(errors, attack(end), strict=True):
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"`structured_outputs.{outputs.WhichOneof('constraint')}` must be one" in (error.details() or "")
        if gaps.is_largest_acceptable and gaps.is_mean_acceptable:
            return
    pytest.fail(str(gaps))


async def test_a_slow_constraint_does_not_delay_another_one(budgeted: Served) -> None:
    slow = [asyncio.ensure_future(error_of(budgeted, outputs)) for outputs in regexes(".*" * 500, 3, "d")]
    await wait_for_compilations(budgeted)
    response = await budgeted.generate(constrained(pb.StructuredOutputs(regex="[01]{4}")))
    assert len(response.choices[0].text) == 4
    assert not any(task.done() for task in slow)
    await asyncio.gather(*slow)


async def test_a_constraint_that_was_too_expensive_is_rejected_without_compiling_it(
    budgeted: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = pb.StructuredOutputs(regex=".*" * 500)
    first = await error_of(budgeted, outputs)
    monkeypatch.delattr(type(budgeted.engine._constraints._process), "run")
    assert (await error_of(budgeted, outputs)).details() == first.details()


@pytest.mark.parametrize("timeout", [None, 1], ids=["cancelled", "deadline"])
async def test_the_end_of_the_last_call_ends_the_compilation(
    budgeted: Served, monkeypatch: pytest.MonkeyPatch, timeout: float | None
) -> None:
    constraints, before = budgeted.engine._constraints, compiling(budgeted).cpu_times().children_user
    monkeypatch.setattr(constraints, "_lanes", constraints._lanes[1:])
    request = constrained(pb.StructuredOutputs(regex=".*" * 500 + f"e{timeout}"))
    calls = [budgeted.stub.Generate(request), budgeted.stub.Generate(request, timeout=timeout)]
    await wait_for_compilations(budgeted)
    calls[0].cancel()
    if timeout is None:
        assert len(compiling(budgeted).children()) == 1
        calls[1].cancel()
    assert await calls[1].code() is (grpc.StatusCode.DEADLINE_EXCEEDED if timeout else grpc.StatusCode.CANCELLED)
    await wait_for_compilations(budgeted, count=0)
    assert compiling(budgeted).cpu_times().children_user - before < SECONDS
    assert not constraints._compilations


async def test_many_plain_properties_compile(served: Served) -> None:
    response = await served.generate(constrained(pb.StructuredOutputs(json=properties(200))))
    assert response.choices


async def test_a_lost_process_is_started_again(budgeted: Served) -> None:
    compiling(budgeted).kill()
    while budgeted.engine._constraints._process._process:  # noqa: ASYNC110 - the test's timeout is the limit
        await asyncio.sleep(0.01)
    assert (await budgeted.generate(constrained(pb.StructuredOutputs(regex="b")))).choices[0].text == "b"
