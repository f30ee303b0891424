"""The examples in other languages, run as their pages in `docs/call` say, against a real server with a fake engine.

`make examples` installs what they need, builds them and runs these tests, which are otherwise skipped.
"""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from certificates import Authority
from fake_engine import FakeEngine, last, more
from proxies import run_proxy
from servers import serve_grpc

from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.errors import OverloadedError
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME
from yuan_grpc.server.security.authentication import Authenticator
from yuan_grpc.server.security.certificates import Certificates
from yuan_grpc.server.security.identity import Scope
from yuan_grpc.server.security.tokens import TokenFile, create_token, format_line

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "clients" / "examples"
PAGES = ROOT / "docs" / "call"
BUF = str(Path(sys.executable).with_name("buf"))
TEXT = "abc"
INVALID = "INVALID_REQUEST temperature: `temperature` must be between 0 and 2, not -1"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


class ExampleEngine(FakeEngine):
    """An engine that completes short requests with `TEXT`, and long ones never."""

    def __init__(self) -> None:
        super().__init__()
        self.info = replace(self.info, max_model_len=4096)

    def script_for(self, request: EngineRequest) -> tuple[Sequence[StepOutput | Exception], bool]:
        if request.sampling.max_tokens > 100:
            return [more(TEXT[0])], True
        return [*map(more, TEXT[:-1]), last(TEXT[-1])], False


class BusyEngine(ExampleEngine):
    """An engine that is full when the first request of each example arrives."""

    def script_for(self, request: EngineRequest) -> tuple[Sequence[StepOutput | Exception], bool]:
        return super().script_for(request) if self.requests else ([OverloadedError("the queue is full")], False)


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the examples for Node.js, with its packages."""
    if not (shutil.which("node") and (EXAMPLES / "node" / "node_modules").is_dir()):
        pytest.skip("Node.js 20 or the packages of the example are missing: make examples-node")
    subprocess.run([BUF, "generate"], cwd=EXAMPLES / "node", check=True)
    return EXAMPLES / "node"


@pytest.fixture(params=["go", "grpc.js", "connect.js", "cpp"])
def command(request: pytest.FixtureRequest) -> list[str]:
    """The command of an example."""
    if request.param in ("go", "cpp"):
        program = EXAMPLES / request.param / "example"
        return [str(program)] if program.exists() else pytest.skip(f"not built: make examples-{request.param}")
    return ["node", str(request.getfixturevalue("node_folder") / request.param)]


async def run(command: list[str], address: str, **variables: str) -> dict[str, str]:
    """Run an example; return its lines by their first word."""
    env = os.environ | {"YUAN_GRPC_ADDRESS": address} | variables
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    lines = (line.partition(": ") for line in output.decode().splitlines())
    return {name: text for name, _, text in lines}


def normalize(text: str) -> str:
    """Return the name of a status as gRPC's own: languages spell it DeadlineExceeded, or with its number."""
    name = text.removeprefix("status ").split()[0]
    numbers = {"1": "CANCELLED", "3": "INVALID_ARGUMENT", "4": "DEADLINE_EXCEEDED", "Canceled": "CANCELLED"}
    return numbers.get(name) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()


async def test_an_example_generates_streams_and_explains_errors(command: list[str]) -> None:
    engine = ExampleEngine()
    async with serve_grpc(engine) as address:
        lines = await run(command, address)
        await engine.freed.wait()
    assert list(lines) == ["generate", "stream", "deadline", "error", "cancel"]
    assert (lines["generate"], lines["stream"]) == (TEXT, TEXT)
    statuses = [normalize(lines[name]) for name in ("deadline", "error", "cancel")]
    assert statuses == ["DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "CANCELLED"]
    assert INVALID in lines["error"]
    assert engine.running == 0


async def test_an_example_calls_a_server_with_tls_and_tokens(command: list[str], tmp_path: Path) -> None:
    token = create_token()
    (tmp_path / "tokens").write_text(format_line("example", [Scope.GENERATE], token) + "\n")
    (tmp_path / "tokens").chmod(0o600)
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    certificates = Certificates(*authority.write(tmp_path))
    authenticator = Authenticator(TokenFile(tmp_path / "tokens"))
    async with serve_grpc(ExampleEngine(), certificates=certificates, authenticator=authenticator) as address:
        lines = await run(command, address, YUAN_CA=str(tmp_path / "ca.pem"), YUAN_GRPC_TOKEN=token)
    assert lines["stream"] == TEXT
    assert INVALID in lines["error"]


@pytest.mark.parametrize("command", ["go", "grpc.js"], indirect=True)
async def test_an_example_repeats_a_request_that_the_server_refused(command: list[str]) -> None:
    async with serve_grpc(BusyEngine()) as address:
        lines = await run(command, address, GRPC_GO_RETRY="on")
    assert lines["generate"] == TEXT


SOURCES = {
    "go.md": ("go/main.go",),
    "node.md": ("node/grpc.js", "node/connect.js"),
    "cpp.md": ("cpp/main.cc",),
}
"""The programs that the code of each page is from."""


@pytest.mark.parametrize("page", SOURCES)
def test_the_code_of_a_page_is_the_tested_code(page: str) -> None:
    sources = [(EXAMPLES / source).read_text("utf-8") for source in SOURCES[page]]
    blocks = re.findall(r"^```(?:go|js|cpp)\n(.*?)^```$", (PAGES / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        assert any(block in source for source in sources), block


def shell_commands() -> list[list[str]]:
    """Return the commands of the page for shells, without those of `grpcurl`."""
    text = (PAGES / "grpcurl.md").read_text("utf-8")
    return [shlex.split(block.replace("\\\n", " ")) for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)]


async def output_of(command: list[str], port: str, address: str) -> tuple[str, str]:
    """Run a command of the page at another address; return what it prints."""
    program = BUF if command[0] == "buf" else command[0]
    arguments = [argument.replace(f"127.0.0.1:{port}", address) for argument in command[1:]]
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, error = await process.communicate()
    return output.decode(), error.decode()


async def test_the_commands_for_shells_do_what_their_page_says() -> None:
    generate, stream, deadline, invalid, _ = shell_commands()
    async with serve_grpc(ExampleEngine()) as address:
        whole, deltas, refused = await asyncio.gather(
            *(output_of(command, "50051", address) for command in (generate, stream, invalid))
        )
        for seconds in ("1s", "4s", "16s"):  # on a slow machine, the start of `buf` and the reflection take the first
            command = [argument.replace("1s", seconds) for argument in deadline]
            late = await output_of(command, "50051", address)
            if "failed to find service" not in late[1]:
                break
    assert json.loads(whole[0])["choices"][0]["text"] == TEXT
    assert re.findall(r'"text": "(.)"', deltas[0]) == list(TEXT)
    assert "deadline_exceeded" in late[1]
    error = json.loads(refused[1])
    assert error["code"] == "invalid_argument"
    assert [detail["type"] for detail in error["details"]] == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]


async def test_curl_calls_through_envoy(tmp_path: Path) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is missing: apt-get install curl")
    health = Health(NAME)
    async with serve_grpc(ExampleEngine(), health) as server:
        await health.set_serving()
        starting = run_proxy("envoy", [server], tmp_path)
        proxy = await asyncio.to_thread(starting.__enter__)
        try:
            text = "no healthy upstream"
            while "no healthy upstream" in text:  # until the first health check
                text, _ = await output_of(shell_commands()[-1], "8080", proxy.address)
        finally:
            await asyncio.to_thread(starting.__exit__, None, None, None)
    assert json.loads(text)["choices"][0]["text"] == TEXT


def test_buf_generates_code_for_every_language(tmp_path: Path) -> None:
    template = yaml.safe_load((ROOT / "buf.gen.yaml").read_text("utf-8"))
    programs = [plugin.get("local", "protoc") for plugin in template["plugins"]]
    missing = [program for program in programs if not (shutil.which(program) or (ROOT / program).exists())]
    if missing:
        pytest.skip(f"{', '.join(missing)} is missing: make examples, and protobuf-compiler-grpc-java-plugin of Debian")
    subprocess.run([BUF, "generate", "-o", tmp_path], cwd=ROOT, check=True)
    for path in ("go/yuan/v1/yuan_grpc.pb.go", "ts/yuan/v1/yuan_pb.ts", "java/yuan/v1/YuanServiceGrpc.java"):
        assert (tmp_path / "build/gen" / path).stat().st_size > 1000
    assert (tmp_path / "build/gen/cpp/yuan/v1/yuan.grpc.pb.cc").exists()
