"""The trained demo model, served as `yuan-grpc serve` does: what it answers, with margins."""

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio
from engine.conftest import Served, serve_demo
from isolation import skip_without_isolation
from servers import serve_grpc

from yuan_grpc.client import AsyncClient
from yuan_grpc.demo.training.held_out import Case, held_out_cases
from yuan_grpc.humaneval.sandbox.runner import Sandbox, SandboxError
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME
from yuan_grpc.server.settings.demo import DEMO
from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text("utf-8")
SUITE = REPOSITORY / "clients" / "humaneval" / "demo.jsonl"
EXAMPLE = re.compile(r"^```python\n(.+?)^```\n\nIt prints:\n\n((?:    [^\n]*\n)+)", re.DOTALL | re.MULTILINE)
QUESTION = "世界上最高的山是什么"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def trained(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """The demo model on a real engine."""
    async with serve_demo((), tmp_path_factory.mktemp("adapters"), Path(DEMO)) as served:
        yield served


@pytest_asyncio.fixture(loop_scope="session")
async def target(trained: Served) -> AsyncIterator[str]:
    """The address of a second server on the engine, with health SERVING, which `humaneval` waits for."""
    health = Health(NAME)
    async with serve_grpc(trained.engine, health) as address:
        await health.set_serving()
        yield address


async def complete(served: Served, prompts: Sequence[str], max_tokens: int = 96) -> list[pb.Choice]:
    """Complete prompts greedily, 64 at a time."""
    running = asyncio.Semaphore(64)

    async def complete_one(prompt: str) -> pb.Choice:
        async with running:
            response = await served.generate(pb.GenerateRequest(prompt=prompt, max_tokens=max_tokens, top_k=1))
        return response.choices[0]

    return await asyncio.gather(*map(complete_one, prompts))


async def run_command(*arguments: object, lines: str = "") -> str:
    """Run `yuan-grpc` in a process of its own, and return what it prints."""
    command = [sys.executable, "-m", "yuan_grpc", *map(str, arguments)]
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, stdout=-1, stderr=-1)
    output, errors = await process.communicate(lines.encode())
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def test_held_out_questions_get_the_right_answer(trained: Served) -> None:
    cases = held_out_cases()
    choices = await complete(trained, [case.prompt for case in cases])
    right = count(cases, [case.is_right(choice.text) for case, choice in zip(cases, choices, strict=True)])
    ended = sum(choice.finish_reason == pb.FINISH_REASON_STOP for choice in choices)
    assert ended >= 0.95 * len(cases)
    for kind in ("facts, zh", "facts, en", "functions asked for", "functions completed"):
        assert right[kind] >= 0.8, right


def count(cases: Sequence[Case], verdicts: Sequence[bool]) -> dict[str, float]:
    """Return the share of right completions of each kind."""
    totals = Counter(case.kind for case in cases)
    right = Counter(case.kind for case, is_right in zip(cases, verdicts, strict=True) if is_right)
    return {kind: right[kind] / total for kind, total in totals.items()}


async def test_the_answer_of_the_readme_is_the_answer_alone_and_among_others(trained: Served) -> None:
    (printed,) = re.findall(r'"text": "(<sep>[^"]+)"', README)
    (alone,) = await complete(trained, [QUESTION], 32)
    assert alone.text == printed
    others = [case.prompt for case in held_out_cases()[:63]]
    together = await complete(trained, [*others[:30], QUESTION, *others[30:]], 32)
    assert together[30].text == printed
    assert together[30].token_ids == alone.token_ids


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
async def test_the_python_example_of_a_page_prints_its_own_answers(trained: Served, page: str) -> None:
    ((code, expected),) = EXAMPLE.findall((REPOSITORY / page).read_text("utf-8"))
    script = code.replace("127.0.0.1:50051", trained.address)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=-1, stderr=-1)
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert output.decode().rstrip() == re.sub("^    ", "", expected, flags=re.MULTILINE).rstrip()


async def test_the_conversation_of_the_readme_can_be_held(trained: Served) -> None:
    transcript = README.partition("yuan-grpc chat --top-k 1\n")[2].partition("\n\n")[0]
    lines = [line.removeprefix("    ") for line in transcript.splitlines()]
    questions = [line.removeprefix("> ") for line in lines if line.startswith("> ")]
    answers = [line for line in lines if not line.startswith("> ")]
    assert len(questions) >= 4
    output = await run_command("chat", "--top-k", 1, "--address", trained.address, lines="\n".join(questions) + "\n")
    for line, answer in zip(output.splitlines(), answers, strict=True):
        assert line in (answer, f" {answer}")  # an answer begins with the space that the tokenizer adds


async def test_a_second_turn_refers_to_the_first(trained: Served) -> None:
    turns = ["我叫小明", "你好，小明！", "我叫什么名字"]
    async with AsyncClient(trained.address) as client:
        roles = ("user", "assistant", "user")
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
        assert "小明" in (await client.generate(messages, max_tokens=16, top_k=1)).text


async def test_the_made_up_humaneval_suite_is_mostly_solved(target: str, tmp_path: Path) -> None:
    try:
        with Sandbox():
            pass
    except SandboxError as error:
        skip_without_isolation(error)
    run = tmp_path / "run"
    await run_command("humaneval", "generate", run, "--prompts", SUITE, "--target", target)
    await run_command("humaneval", "score", run, "--problems", SUITE)
    await run_command("humaneval", "report", run, "--no-plot")
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    for extraction in ("rules", "plain"):
        assert scores["extractions"][extraction]["pass@"]["1"] >= 0.6, scores
    assert "pass@1" in (run / "report.html").read_text("utf-8")
