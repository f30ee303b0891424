"""`yuan-grpc humaneval generate` against the demo model."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from engine.conftest import Served

from yuan_grpc.humaneval import records
from yuan_grpc.humaneval.extraction import FENCE
from yuan_grpc.server.answers import Answers
from yuan_grpc.server.health import Health
from yuan_grpc.server.serve import build
from yuan_grpc.server.service import NAME, YuanService
from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPTS = "human-eval-gpt4-translation-fixed5.jsonl"
TASKS = ["HumanEval/39", "HumanEval/40", "HumanEval/41"]
"""By chance the demo's answer to the second has a closing fence, as its 49th token."""


@pytest_asyncio.fixture(loop_scope="session")
async def address(served: Served) -> AsyncIterator[str]:
    """The address of a server whose health is good, on the session's engine."""
    health = Health(NAME)
    server, port = await build(YuanService(Answers(served.engine)), health, "127.0.0.1:0")
    await server.start()
    await health.serving()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_samples_are_the_servers_answers_and_end_at_the_fence(
    served: Served, address: str, published: Path, tmp_path: Path
) -> None:
    lines = (published / PROMPTS).read_bytes().splitlines(keepends=True)
    few = tmp_path / "few.jsonl"
    few.write_bytes(b"".join(line for line in lines if any(f'"{task}"'.encode() in line for task in TASKS)))
    asked = ["humaneval", "generate", tmp_path / "run", "--prompts", few, "--target", address, "--max-tokens", 64]
    # In a process of its own: the command handles signals, which only a main thread may.
    command = [sys.executable, "-m", "yuan_grpc", *map(str, asked)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    run, kept = records.read(tmp_path / "run" / records.FILE)
    found = {record.task_id: record for record in kept}
    assert sorted(found) == TASKS
    for task, record in found.items():
        request = pb.GenerateRequest(prompt=run.prompts[task], max_tokens=64, top_k=1)
        text = (await served.generate(request)).choices[0].text
        whole, fence, _ = text.partition(FENCE)
        assert record.text == whole + fence
        assert (record.finish_reason, record.stop_token_id is None) == (("stop", False) if fence else ("length", True))
    assert found["HumanEval/40"].text.endswith(FENCE)
