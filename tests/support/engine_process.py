"""Runs the engine programs of this folder in separate processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_program(program: str, job: dict[str, Any], out: Path) -> Any:
    """Run a program with a job and return its result.

    Args:
        program: the program's file name in this folder.
        job: the program's input; paths are converted to strings.
        out: the file that the program writes its result to.
    """
    completed = subprocess.run(
        [sys.executable, Path(__file__).with_name(program), out],
        input=json.dumps(job, default=str),
        text=True,
        capture_output=True,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(out.read_text())
