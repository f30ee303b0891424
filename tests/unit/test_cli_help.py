"""The help of the commands, at a terminal of 80 columns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yuan_grpc.__main__ import main
from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common.install import PIP_CPU, PIP_CUDA, UV_CPU

PAGE = 66
"""Lines of a page."""
HUMANEVAL = ("generate", "score", "report")


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let argparse wrap its help as at a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_the_help_of_serve_fits_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of("serve", capsys)
    assert len(lines) <= PAGE
    assert "yuan-grpc serve --help=all" in "\n".join(lines)


@pytest.mark.parametrize("command", ["", *SUMMARIES])
def test_help_fits_80_columns_and_names_no_command_that_may_be_missing(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = help_of(command, capsys)
    assert max(map(len, lines)) <= 80
    assert "vllm serve" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("vllm", ["serve"]),
        ("grpc_health", ["serve"]),
        ("vllm", ["serve", "--help=all"]),
        ("vllm", ["run", "a"]),
    ],
)
def test_a_missing_package_is_reported_with_the_commands_that_install_it(
    module: str, arguments: list[str], tmp_path: Path
) -> None:
    program = f"import sys; sys.modules[{module!r}] = None; from yuan_grpc.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    last_line = done.stderr.splitlines()[-1]
    assert f"the server is not installed ({module} is missing): " in last_line
    assert all(f"`{line}`" in last_line for line in (PIP_CPU, UV_CPU, PIP_CUDA))


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "run", *(f"humaneval {name}" for name in HUMANEVAL)])
def test_a_command_with_notes_can_be_quiet(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert any("--quiet" in line for line in help_of(command, capsys))
