"""The client commands against the demo model."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import pytest
from engine.conftest import Served

from yuan_grpc.__main__ import main
from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "世界上最高的山是什么"


async def run(served: Served, *arguments: str) -> int:
    """Run a command against the server and return the exit status."""
    return await asyncio.to_thread(main, [*arguments, "--address", served.address])


async def text_of(served: Served, prompt: str) -> str:
    response = await served.generate(pb.GenerateRequest(prompt=prompt, max_tokens=16, top_k=1))
    return response.choices[0].text


async def test_generate_prints_the_same_text_as_the_api(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    expected = await text_of(served, PROMPT)
    assert await run(served, "generate", PROMPT, "--max-tokens", "16", "--top-k", "1") == 0
    assert capsys.readouterr().out == f"{expected}\n"


async def test_a_prompt_file_is_completed_in_order(
    served: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = [PROMPT, "def add(a, b):", "床前明月光，"] * 8
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ("--max-tokens", "16", "--top-k", "1", "--concurrency", "16", "--json")
    assert await run(served, "generate", "--file", str(path), *options) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(result["index"], result["prompt"]) for result in results] == list(enumerate(prompts))
    assert [result["text"] for result in results] == [await text_of(served, prompt) for prompt in prompts[:3]] * 8


async def test_set_applies_a_structured_output_constraint(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    constraint = 'structured_outputs={"choice": ["正面", "负面"]}'
    assert await run(served, "generate", PROMPT, "--set", constraint) == 0
    assert capsys.readouterr().out in ("正面\n", "负面\n")


async def test_a_beam_search_returns_n_choices(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--use-beam-search", "--best-of", "4", "-n", "2", "--max-tokens", "8", "--json")
    assert await run(served, "generate", PROMPT, *options) == 0
    choices = json.loads(capsys.readouterr().out)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert choices[0]["cumulative_logprob"] <= 0


async def test_an_interrupted_request_leaves_nothing_in_the_engine(served: Served) -> None:
    command = (sys.executable, "-m", "yuan_grpc", "generate", PROMPT, "--address", served.address)
    process = await asyncio.create_subprocess_exec(
        *command, "--max-tokens=2000", "--ignore-eos", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout
    await process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, stderr = await process.communicate()
    assert (process.returncode, stderr.decode()) == (130, "yuan-grpc: cancelled\n")
    await served.wait_for_unfinished(0)
    await served.wait_until_empty()


async def test_bench_counts_the_requested_tokens(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--prompt-tokens", "16", "--max-tokens", "8", "--requests", "6", "--concurrency", "1,3")
    assert await run(served, "bench", "--json", *sizes) == 0
    levels = json.loads(capsys.readouterr().out)["levels"]
    assert [(level["requests"], level["output_tokens"], level["errors"]) for level in levels] == [(6, 48, {})] * 2
    assert all(level["ttft_seconds"]["p50"] > 0 for level in levels)
