"""Programs of this folder that run an engine, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def result_of(program: str, job: dict[str, Any], out: Path) -> Any:
    """What the program makes of a job; paths in it become text.

    Args:
        program: its file's name, here.
        out: where it leaves the result.
    """
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(program), out],
        input=json.dumps(job, default=str),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())
