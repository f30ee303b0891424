"""`yuan-grpc humaneval generate` against the demo model."""

import asyncio
import sys
from pathlib import Path

import pytest
from engine.conftest import Served

from yuan_grpc.humaneval import records
from yuan_grpc.humaneval.extraction import FENCE
from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPTS = "human-eval-gpt4-translation-fixed5.jsonl"
TASKS = ["HumanEval/39", "HumanEval/40", "HumanEval/41"]
"""By chance the demo's answer to the second has a closing fence, as its 49th token, where sums come out as here."""


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
