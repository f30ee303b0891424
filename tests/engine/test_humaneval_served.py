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
"""Tasks of which the second happens to make the demo model generate a fence, as token 49. This depends on rounding."""


async def test_samples_equal_the_servers_completions_and_end_at_the_fence(
    served: Served, address: str, published: Path, tmp_path: Path
) -> None:
    lines = (published / PROMPTS).read_bytes().splitlines(keepends=True)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"".join(line for line in lines if any(f'"{task}"'.encode() in line for task in TASKS)))
    run_folder = tmp_path / "run"
    arguments = ["humaneval", "generate", run_folder, "--prompts", prompts, "--target", address, "--max-tokens", 64]
    # In another process: the command handles signals, which only the main thread can do.
    command = [sys.executable, "-m", "yuan_grpc", *map(str, arguments)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    run, recorded = records.read(run_folder / records.FILE)
    by_task = {record.task_id: record for record in recorded}
    assert sorted(by_task) == TASKS
    for task, record in by_task.items():
        request = pb.GenerateRequest(prompt=run.prompts[task], max_tokens=64, top_k=1)
        text = (await served.generate(request)).choices[0].text
        body, fence, _ = text.partition(FENCE)
        assert record.text == body + fence
        assert (record.finish_reason, record.stop_token_id is None) == (("stop", False) if fence else ("length", True))
