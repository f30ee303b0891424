"""`yuan-grpc probe` as a process, as Docker and exec probes run it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fake_server import Options, fake_server
from ports import free_port

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a server."""
    port = free_port()
    with fake_server(port, Options(), stderr=subprocess.DEVNULL):
        yield port


def probe(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yuan_grpc", "probe", *arguments]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("YUAN_GRPC_")}
    return subprocess.run(command, env=variables | environment, capture_output=True, text=True)


@pytest.mark.parametrize("service", ["readiness", "liveness", "startup", "yuan.v1.YuanService", ""])
def test_a_service_that_serves_is_a_success(port: int, service: str) -> None:
    done = probe(service, "--address", f"127.0.0.1:{port}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "SERVING\n", "")


def test_the_port_comes_from_the_environment_of_the_server(port: int) -> None:
    assert probe(YUAN_GRPC_PORT=str(port)).returncode == 0


def test_an_unknown_service_is_a_failure(port: int) -> None:
    done = probe("unknown", "--address", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert "NOT_FOUND" in done.stderr


def test_a_server_that_does_not_answer_is_a_failure() -> None:
    address = f"127.0.0.1:{free_port()}"
    done = probe("--address", address, "--timeout", "0.5")
    assert done.returncode == 1
    assert f"{address} does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_address_is_wrong_usage() -> None:
    assert probe("--address", "nonsense").returncode == 2
