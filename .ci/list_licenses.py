"""A list of the licenses of locked packages: `python .ci/list_licenses.py requirements/cpu.txt`.

Reads the metadata of the packages installed in the environment of this Python, and nothing else.
"""

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


def locked(lock: str) -> list[tuple[str, str]]:
    """Return the names and versions that a lock file pins."""
    return re.findall(r"^([a-z0-9][\w.-]*)==([^\s;]+)", Path(lock).read_text("utf-8"), re.MULTILINE)


def license_of(package: Distribution) -> str:
    """Return the license that the metadata names: an SPDX expression, classifiers, free text or the name of a file."""
    fields = package.metadata
    expression = (fields.get_all("License-Expression") or [""])[0]
    classifiers = [
        name.rpartition(" :: ")[2]
        for name in fields.get_all("Classifier") or ()
        if name.startswith("License :: ") and name != "License :: OSI Approved"
    ]
    text = (fields.get_all("License") or [""])[0].strip()
    files = ", ".join(fields.get_all("License-File") or ())
    return expression or " AND ".join(classifiers) or (text.splitlines()[0] if text else files and f"see {files}")


def main() -> int:
    """Print a Markdown table; return 1 if a package is missing, has another version or names no license."""
    problems = []
    print("| package | version | license |\n| --- | --- | --- |")
    for name, version in locked(sys.argv[1]):
        try:
            package = distribution(name)
        except PackageNotFoundError:
            problems.append(f"{name}=={version} is not installed")
            continue
        if package.version != version:
            problems.append(f"{name} must be version {version}, not {package.version}")
        if not (license_name := license_of(package)):
            problems.append(f"{name}=={version} names no license")
        print(f"| {name} | {version} | {license_name.replace('|', '/')} |")
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
