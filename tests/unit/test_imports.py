"""The modules that a command or the client imports. They decide how long it takes to start."""

import json
import subprocess
import sys

import pytest

OWN = "yuan_grpc"
SLOW = {"asyncio", "email", "importlib.metadata", "inspect", "ipaddress", "logging", "ssl", "zipfile"}
"""Slow modules of the standard library. gRPC itself imports some of them."""

PROGRAM = """
import json, sys
before = set(sys.modules)
try:
    exec(sys.argv.pop(1))
except SystemExit as exit:
    assert not exit.code, exit.code
print(json.dumps(sorted(set(sys.modules) - before)))
"""
MAIN = "from yuan_grpc.__main__ import main; main(sys.argv[1:])"


def imported_by(statement: str, *arguments: str) -> set[str]:
    """Return the modules that a statement imports in a fresh interpreter."""
    command = [sys.executable, "-c", PROGRAM, statement, *arguments]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(json.loads(output.splitlines()[-1]))


def installed_packages(modules: set[str]) -> set[str]:
    """Return the packages of modules that neither Python nor this project has."""
    return {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {OWN}


def test_help_imports_no_command_and_no_package() -> None:
    modules = imported_by(MAIN, "--help")
    parts = ("", ".__main__", ".cli", ".cli.commands", ".cli.common", ".cli.common.suggestions")
    assert {module for module in modules if module.startswith(OWN)} == {OWN + part for part in parts}
    assert not installed_packages(modules)
    assert not modules & SLOW


def test_the_version_needs_no_command() -> None:
    modules = imported_by(MAIN, "--version")
    assert not installed_packages(modules)
    assert "importlib.metadata" in modules


@pytest.mark.parametrize("arguments", [["serve", "--help"], ["serve", "--port", "x"]], ids=" ".join)
def test_the_help_and_the_usage_of_serve_need_no_package(arguments: list[str]) -> None:
    statement = f"try:\n  {MAIN}\nexcept SystemExit: pass"
    assert not installed_packages(imported_by(statement, *arguments))


def test_the_client_imports_only_grpc_and_protobuf() -> None:
    modules = imported_by("import yuan_grpc.client") - imported_by("import grpc")
    own = {module.split(".")[1] for module in modules if module.startswith(f"{OWN}.")}
    assert own == {"client", "request", "v1"}
    assert installed_packages(modules) == {"google", "grpc"}
    assert not modules & SLOW


def test_a_command_imports_no_other_command() -> None:
    modules = imported_by(MAIN, "chat", "--help")
    assert f"{OWN}.cli.chat" in modules
    assert not modules & {f"{OWN}.cli.{name}" for name in ("bench", "humaneval", "serve", "run")}
