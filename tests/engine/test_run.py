"""`yuan-grpc run` and `yuan_grpc.offline`: results without a server equal a server's."""

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest
from engine.conftest import Served

from yuan_grpc.server.settings.demo import DEMO_FLAGS
from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

DOCUMENT = Path(__file__).parents[2] / "docs" / "call" / "offline.md"
PROMPTS = ("大学生写简历有哪些思路建议和注意事项", "请以人工智能四个字写一首诗", "世界上最高的山是什么")
"""Prompts of the original Yuan 2.0 examples."""


async def test_run_returns_the_same_texts_as_a_server(served: Served) -> None:
    options = ("--json", "--max-tokens=24", "--temperature=0.8", "--top-p=0.95", "--seed=7", "--stop=<eod>")
    engine = ("--model", str(served.demo), "--", *DEMO_FLAGS, "--max-num-seqs", "2")
    command = (sys.executable, "-m", "yuan_grpc", "run", *PROMPTS, *options, *engine)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    texts = [json.loads(line)["text"] for line in output.decode().splitlines()]
    sampling = pb.GenerateRequest(max_tokens=24, temperature=0.8, top_p=0.95, seed=7, stop=["<eod>"])
    for prompt, text in zip(PROMPTS, texts, strict=True):
        request = pb.GenerateRequest(prompt=prompt)
        request.MergeFrom(sampling)
        assert text == (await served.generate(request)).choices[0].text != ""


async def test_the_script_in_the_documentation_returns_the_same_text_as_a_server(
    served: Served, tmp_path: Path
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    script = tmp_path / "script.py"
    flags = ", ".join(f'"{flag}"' for flag in DEMO_FLAGS)
    script.write_text(
        code.replace("/models/Yuan2-2B-hf", str(served.demo)).replace('"--dtype=bfloat16"', flags), "utf-8"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    request = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=32, top_k=1)
    before, _, after = output.decode().partition((await served.generate(request)).choices[0].text + "\n")
    assert before == ""
    assert after.strip()
