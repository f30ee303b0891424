"""The lock files, the image's base, and the script that installs the locks."""

import hashlib
import os
import pty
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import tomllib

pytestmark = pytest.mark.timeout(60)  # pip and uv take seconds

REPOSITORY = Path(__file__).parents[2]
LOCKS = ("build", "cpu", "cuda", "dev", "docs", "proto", "release")
DEVELOPMENT = {"coverage", "hatchling", "hypothesis", "mypy", "pre-commit", "pytest", "ruff", "uv"}


def read_lock(name: str) -> dict[str, tuple[str, list[str]]]:
    """Return the version and the hashes of each package of a lock."""
    text = (REPOSITORY / f"requirements/{name}.txt").read_text()
    packages = {}
    for block in re.split(r"\n(?=\S)", re.sub(r"#.*\n", "", text)):
        package, version = re.match(r"([\w.-]+)==([\w.+!]+)", block).groups()  # type: ignore[union-attr]
        packages[package] = (version, re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block))
    return packages


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_a_version_and_hashes(lock: str) -> None:
    packages = read_lock(lock)
    assert packages
    assert not [package for package, (_, hashes) in packages.items() if not hashes]


@pytest.mark.parametrize("lock", ["cpu", "cuda"])
def test_the_server_needs_no_development_tool(lock: str) -> None:
    server, development = read_lock(lock), read_lock("dev")
    assert not DEVELOPMENT & server.keys()
    assert development.keys() >= DEVELOPMENT
    assert {name: server[name] for name in server.keys() & development.keys()} == {
        name: development[name] for name in server.keys() & development.keys()
    }


def test_the_build_backend_is_the_locked_one() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    (backend,) = project["build-system"]["requires"]
    assert backend == f"hatchling=={read_lock('build')['hatchling'][0]}"
    assert read_lock("dev")["hatchling"] == read_lock("build")["hatchling"]


def test_the_base_of_the_image_is_pinned_by_digest() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE=python:3\.\d+\.\d+-\S+@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${BASE}"}


def test_the_image_is_built_from_files_that_docker_is_given() -> None:
    stage = (REPOSITORY / "Dockerfile").read_text().split("\nFROM ")[1]
    sources = {
        name.partition("/")[0] for line in re.findall(r"^COPY (.+) \S+$", stage, re.MULTILINE) for name in line.split()
    }
    allowed = set(re.findall("^!(.+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE))
    assert sources == allowed


@pytest.fixture
def closed_port() -> int:
    """A port of loopback that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def write_wheel(folder: Path, name: str, version: str) -> str:
    """Write an empty wheel; return its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@contextmanager
def serve_files(folder: Path) -> Iterator[str]:
    """Serve a folder as a package index; yield its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def install(
    folder: Path, lock: str, *, pytorch: str = "", stdout: int = subprocess.PIPE, **pip: object
) -> subprocess.CompletedProcess[str]:
    """Run a copy of install.sh with a lock. pip resolves and downloads, but installs nothing."""
    (folder / "install.sh").write_bytes((REPOSITORY / "requirements/install.sh").read_bytes())
    (folder / "test.txt").write_text(lock)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTORCH_"))}
    options = {"DRY_RUN": 1, "IGNORE_INSTALLED": 1, "RETRIES": 1, "NO_CACHE_DIR": 1} | pip
    environment |= {f"PIP_{name}": str(value) for name, value in options.items()}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PYTORCH_INDEX_URL": pytorch or str(options.get("INDEX_URL"))}
    command = ["bash", str(folder / "install.sh"), sys.executable, "test"]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_indexes_that_cannot_be_reached_are_reported(tmp_path: Path, closed_port: int) -> None:
    index = f"http://127.0.0.1:{closed_port}/simple"
    completed = install(tmp_path, f"torch==9.0+cpu \\\n    --hash=sha256:{'0' * 64}\n", INDEX_URL=index)
    assert completed.returncode != 0
    configured, pytorch = completed.stderr.split("not installed from the configured source")
    for attempt in configured, pytorch:
        assert "Connection refused" in attempt
        assert "No matching distribution found for torch==9.0+cpu" in attempt
    assert completed.stderr.splitlines()[-1] == (
        f"torch==9.0+cpu is neither on the configured index nor on {index}: "
        "set PYTORCH_INDEX_URL to a mirror of the latter"
    )


def test_an_index_that_cannot_be_reached_names_the_variable_of_a_mirror(tmp_path: Path, closed_port: int) -> None:
    index = f"http://127.0.0.1:{closed_port}/simple"
    completed = install(tmp_path, f"locked==9.0 \\\n    --hash=sha256:{'0' * 64}\n", INDEX_URL=index)
    assert completed.returncode != 0
    assert "Connection refused" in completed.stderr
    assert completed.stderr.splitlines()[-1].endswith("set PIP_INDEX_URL to a mirror of it")


def test_a_mirror_of_the_index_of_torch_is_used(tmp_path: Path) -> None:
    digest = write_wheel(tmp_path / "mirror" / "torch", "torch", "9.0+cpu")
    lock = f"torch==9.0+cpu \\\n    --hash=sha256:{digest}\n"
    with serve_files(tmp_path / "mirror") as mirror:
        completed = install(tmp_path, lock, INDEX_URL="http://127.0.0.1:1/simple", pytorch=mirror)
    assert f"torch==9.0+cpu: installed from {mirror}\n" in completed.stdout


def test_a_terminal_shows_the_number_and_the_name_of_each_package(tmp_path: Path) -> None:
    digests = {name: write_wheel(tmp_path / "wheels", name, "9.0") for name in ("first", "second")}
    lock = "".join(f"{name}==9.0 \\\n    --hash=sha256:{digest}\n" for name, digest in digests.items())
    master, slave = pty.openpty()
    completed = install(tmp_path, lock, stdout=slave, NO_INDEX=1, FIND_LINKS=tmp_path / "wheels")
    os.close(slave)
    assert completed.returncode == 0, completed.stderr
    shown = os.read(master, 4096).decode()
    os.close(master)
    assert shown.startswith("installing 2 packages of ")
    assert re.findall(r"\[\d/2] \S+", shown) == [
        "[1/2] first-9.0-py3-none-any.whl",
        "[2/2] second-9.0-py3-none-any.whl",
    ]


@pytest.mark.parametrize("is_right", [True, False], ids=["right", "wrong"])
def test_a_file_is_installed_only_if_the_lock_has_its_hash(tmp_path: Path, is_right: bool) -> None:
    digest = write_wheel(tmp_path / "wheels", "locked", "9.0")
    hashes = "f" * 64, digest if is_right else "0" * 64
    lock = " \\\n".join(["locked==9.0", *(f"    --hash=sha256:{expected}" for expected in hashes)]) + "\n"
    completed = install(tmp_path, lock, NO_INDEX=1, FIND_LINKS=tmp_path / "wheels")
    assert (completed.returncode == 0) == is_right, completed.stderr
    assert ("DO NOT MATCH THE HASHES" in completed.stderr) != is_right


def test_a_package_without_a_hash_is_not_installed(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", "locked", "9.0")
    completed = install(tmp_path, "locked==9.0\n", NO_INDEX=1, FIND_LINKS=tmp_path / "wheels")
    assert completed.returncode != 0
    assert "Hashes are required" in completed.stderr
