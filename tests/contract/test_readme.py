"""The commands of the README, run as they are written there."""

import asyncio
import re
import shlex
import sys
from pathlib import Path

from fake_engine import FakeEngine, last
from servers import serve_grpc

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
BIN = f"{Path(sys.executable).parent}/"


def commands_between(start: str, end: str) -> list[list[str]]:
    """Return the arguments of the indented commands between two sentences."""
    block = TEXT.partition(start)[2].partition(end)[0]
    commands = re.findall(r"^    \.venv/.+?(?=\n\n)", block, re.MULTILINE | re.DOTALL)
    dedented = (re.sub(r"^    ", "", command, flags=re.MULTILINE) for command in commands)
    return [shlex.split(command.replace("\\\n", " ")) for command in dedented]


async def test_the_three_ways_to_send_a_request_send_the_same_one() -> None:
    engine = FakeEngine(last("yes"))
    commands = commands_between("These three are the same request", "The last command prints")
    assert len(commands) == 3
    async with serve_grpc(engine) as address:
        for command in commands:
            arguments = [part.replace("127.0.0.1:50051", address).replace(".venv/bin/", BIN) for part in command]
            if arguments[1] == "generate":
                arguments += ["--address", address]
            process = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
            output, _ = await process.communicate()
            assert process.returncode == 0
            assert b"yes" in output
    first, *others = [(request.prompt, request.sampling) for request in engine.requests]
    assert others == [first, first]
    assert first[1].max_tokens == 32
    assert first[1].top_k == 1
