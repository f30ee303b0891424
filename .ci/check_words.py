"""A lint of the words and sentences that CONTRIBUTING.md asks for: `python .ci/check_words.py [FILE ...]`.

Reads every tracked text file unless files are named. The rules and the exceptions are in words.txt next to this file.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {".md", ".proto", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}
RULES = Path(__file__).with_name("words.txt")


def read_rules() -> tuple[list[tuple[re.Pattern[str], str]], set[tuple[str, str]]]:
    """Return the patterns with what to write instead, and the exceptions as (file, text) pairs."""
    rules, exceptions = [], set()
    for line in RULES.read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        kind, _, rest = line.partition(" ")
        left, _, right = rest.partition(" => ")
        if kind == "allow":
            exceptions.add((left, right))
        else:
            rules.append((re.compile(left, re.IGNORECASE if kind == "word" else 0), right))
    return rules, exceptions


def tracked_files() -> list[str]:
    """Return the names of all tracked files that hold prose or code written here."""
    names = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout.split("\0")
    skipped = ("yuan_grpc/v1/", "yuan_grpc/demo/", "requirements/", "protos/released", "LICENSE", ".ci/words.txt")
    return [name for name in names if name and Path(name).suffix in SUFFIXES and not name.startswith(skipped)]


def findings(names: list[str]) -> Iterator[str]:
    """Yield one line for each use of a listed word."""
    rules, exceptions = read_rules()
    for name in names:
        if not Path(name).is_file():
            continue
        for number, line in enumerate(Path(name).read_text("utf-8").splitlines(), start=1):
            if any(name == file and text in line for file, text in exceptions):
                continue
            for pattern, instead in rules:
                if match := pattern.search(line):
                    yield f"{name}:{number}: {match[0]!r}: write {instead}"


def main() -> int:
    """Print the findings; return 1 if there are any."""
    found = list(findings(sys.argv[1:] or tracked_files()))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
