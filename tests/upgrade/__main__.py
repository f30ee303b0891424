"""Commands for another version of vLLM: `python tests/upgrade table|next VERSION [PYTEST OPTION ...]`.

`next` prints the symbols that are gone or have changed, the requirements that are not met here, and the tests that
fail; it returns 1 if a symbol or a test is broken.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parents[1]))

from upgrade import overlay, table
from upgrade.source import VllmSource
from upgrade.symbols import Use, find_uses

REPOSITORY = Path(__file__).parents[2]
DOWNLOADS = REPOSITORY / "build" / "vllm-next"
TESTS = (
    "tests/unit/test_vllm_check.py",
    "tests/engine/test_attention_backend.py",
    "tests/engine/test_checkpoint_loader.py",
    "tests/engine/test_decode_kernel.py",
    "tests/engine/test_engine_help.py",
    "tests/engine/test_lfa_ops.py",
    "tests/engine/test_parity.py",
    "tests/engine/test_patches.py",
    "tests/engine/test_refusals.py",
    "tests/engine/test_skinny_gemm.py",
    "tests/engine/test_vllm_config.py",
)
"""Tests of imports, configuration, patches and kernels, and of the answers of the model."""


def main(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    match arguments:
        case ["table"]:
            (REPOSITORY / table.PATH).write_text(table.render(find_uses(REPOSITORY, installed_source())))
            return 0
        case ["next", number, *options]:
            return try_version(number, options)
    print(__doc__, file=sys.stderr)
    return 2


def installed_source() -> VllmSource:
    """Return the source of the installed vLLM, without importing it."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("vLLM is not installed: run `make setup`")
    return VllmSource(Path(spec.submodule_search_locations[0]))


def try_version(number: str, options: list[str]) -> int:
    """Compare the symbols, and run the tests with another version."""
    installed = installed_source()
    DOWNLOADS.mkdir(parents=True, exist_ok=True)
    target = overlay.build(number, DOWNLOADS, installed.folder)
    uses = find_uses(REPOSITORY, installed)
    is_broken = print_changes(uses, installed, VllmSource(target / "vllm"))
    print_list("requirements that are not met here", overlay.unmet_requirements(target))
    return max(is_broken, run_tests(number, target, options or list(TESTS)))


def print_changes(uses: list[Use], old: VllmSource, new: VllmSource) -> int:
    """Print the symbols that are gone or have changed; return 1 if one is gone."""
    gone, signatures, bodies = [], [], []
    for symbol in sorted({use.symbol for use in uses if use.kind != "add"}):
        before, after = old.find(symbol), new.find(symbol)
        if after is None:
            gone.append(symbol)
        elif before and before.signature != after.signature:
            signatures.append(f"{symbol}: {difference(before.signature, after.signature)}")
        elif before and before.digest != after.digest:
            bodies.append(symbol)
    for title, lines in (("gone", gone), ("other parameters or fields", signatures), ("other code", bodies)):
        print_list(f"{title}, {old.version} -> {new.version}", lines)
    return 1 if gone else 0


def difference(before: str, after: str) -> str:
    """Return the parameters or fields that are gone (-) or new (+); if there are none, those in their new order."""
    old, new = before.split(", "), after.split(", ")
    changes = [f"- {one}" for one in old if one not in new] + [f"+ {one}" for one in new if one not in old]
    return ", ".join(changes) or f"now in the order {after}"


def print_list(title: str, lines: list[str]) -> None:
    """Print lines below a title, after an empty line."""
    print(f"\n{title}:", *(f"  {line}" for line in lines or ["none"]), sep="\n")


def run_tests(number: str, target: Path, arguments: list[str]) -> int:
    """Run tests with the version in `target`, and print those that fail; return 1 if one does."""
    report = DOWNLOADS / f"{number}.xml"
    path = os.pathsep.join((str(target), str(REPOSITORY)))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *arguments]
    report.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": path, "TEST_UNPATCHED_VLLM": "1"}
    completed = subprocess.run(command, cwd=REPOSITORY, env=environment)
    if not report.is_file():
        return completed.returncode
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        fault = case.find("failure") if case.find("failure") is not None else case.find("error")
        if fault is not None:
            failed.append(f"{case.get('name')}: {(fault.get('message') or '').partition(chr(10))[0][:200]}")
    print_list(f"tests that fail with vLLM {number}", failed)
    return 1 if completed.returncode else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
