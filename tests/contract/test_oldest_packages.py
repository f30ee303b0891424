"""The client with the oldest supported grpcio and protobuf, in the environment of `make proto`, against this server."""

import asyncio
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomllib
from fake_engine import FakeEngine, last, more
from servers import serve_grpc

REPOSITORY = Path(__file__).parents[2]
OLDEST_PYTHON = REPOSITORY / ".venv-proto/bin/python"
PROJECT: Any = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
MINIMUM = dict(requirement.split(">=") for requirement in PROJECT["project"]["dependencies"])

CALLS = """
import sys
from importlib.metadata import version
from yuan_grpc.client import Client
with Client(sys.argv[1], timeout=60) as client:
    assert client.generate("A").text == "yes", client.generate("A")
    assert "".join(client.stream("A")) == "yes"
    assert [answer.text for answer in client.generate_many(["A", "B"])] == ["yes", "yes"]
print(version("grpcio"), version("protobuf"))
"""


def test_the_oldest_versions_are_the_same_everywhere() -> None:
    pins = [f"{name}=={version}" for name, version in MINIMUM.items()]
    assert set(pins) <= set(PROJECT["dependency-groups"]["proto"])
    locked = re.findall(r"^(?:grpcio|protobuf)==\S+", (REPOSITORY / "requirements/proto.txt").read_text(), re.MULTILINE)
    assert locked == pins
    for file in (".github/workflows/ci.yml", "docs/releasing.md"):
        assert " ".join(pins) in (REPOSITORY / file).read_text("utf-8"), file


async def test_the_client_works_with_the_oldest_versions(tmp_path: Path) -> None:
    if not OLDEST_PYTHON.exists() or installed_versions() != MINIMUM:
        pytest.skip("needs .venv-proto with the locked packages: make proto-check")
    metadata = tmp_path / "yuan_grpc-0.dist-info" / "METADATA"  # of a package that is not installed there
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: yuan-grpc\nVersion: 0\n")
    paths = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    async with serve_grpc(FakeEngine(more("y"), last("es"))) as address:
        process = await asyncio.create_subprocess_exec(
            *(OLDEST_PYTHON, "-W", "error", "-c", CALLS, address),
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
        )
        output, _ = await process.communicate()
    assert process.returncode == 0
    assert output.decode().split() == list(MINIMUM.values())


def installed_versions() -> dict[str, str]:
    """Return the versions in the environment of `make proto`."""
    code = "from importlib.metadata import version; print(version('grpcio'), version('protobuf'))"
    output = subprocess.run([OLDEST_PYTHON, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(zip(MINIMUM, output.split(), strict=True))
