"""A check of the environment that the image contains: run it with the Python of that environment.

The server's command must start, and nothing that only developers need may be installed.
"""

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

DEVELOPMENT = {"coverage", "hatchling", "hypothesis", "import-linter", "mypy", "pre-commit", "pytest", "ruff", "uv"}


def main() -> None:
    """Exit with an error if the environment is not what the image should contain."""
    installed = {package.metadata["Name"].lower().replace("_", "-") for package in distributions()}
    if development := sorted(installed & DEVELOPMENT):
        sys.exit(f"the environment must not have {', '.join(development)}")
    command = Path(sys.executable).with_name("yuan-grpc")
    subprocess.run([command, "serve", "--help"], check=True, stdout=subprocess.DEVNULL)
    print(f"{command} serve works, {len(installed)} packages, none for development only")


if __name__ == "__main__":
    main()
