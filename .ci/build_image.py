"""The build stage of the Dockerfile without a container engine: `python .ci/build_image.py FOLDER`.

Runs the COPY and RUN instructions below FOLDER instead of /. It pulls no base image and uses the `python` in the path.
The second stage, which installs system packages, is not run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def build_stage() -> list[tuple[str, str]]:
    """Return the instructions of the first stage as (name, arguments) pairs."""
    stage = (REPOSITORY / "Dockerfile").read_text("utf-8").split("\nFROM ")[1]
    lines = stage.replace("\\\n", " ").splitlines()[1:]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line and not line.startswith("#")]


def copy(arguments: str, folder: Path) -> None:
    """Copy files of the repository, as COPY does."""
    *sources, target = arguments.split()
    for name in sources:
        source, destination = REPOSITORY / name, folder / target
        if source.is_dir():
            shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            destination.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, destination)


def build(root: Path) -> None:
    """Run the instructions below `root`."""
    environment = dict(os.environ)
    folder = root
    for name, arguments in build_stage():
        print(name, arguments, flush=True)
        if name in {"ARG", "ENV"}:
            key, has_value, value = arguments.partition("=")
            if name == "ENV" or (has_value and key not in environment):
                environment[key] = value
        elif name == "WORKDIR":
            folder = root / arguments.lstrip("/")
            folder.mkdir()
        elif name == "COPY":
            copy(re.sub(r"\$(\w+)", lambda match: environment[match[1]], arguments), folder)
        elif name == "RUN":
            command = re.sub(r"(?<![\w$.*/])/(venv|build|dist)\b", rf"{root}/\1", arguments)
            subprocess.run(["bash", "-euc", command], cwd=folder, env=environment, check=True)
        else:
            sys.exit(f"{name} is not supported here")


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
