"""Links of the repository's Markdown files: `python docs/tools/links.py` lists the broken ones."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_LINK = re.compile(r"\]\((?P<path>[^)\s#]*)(?:#(?P<anchor>[^)\s]*))?\)")
_HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)


def markdown_files() -> list[Path]:
    """Return the tracked Markdown files."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def broken_links(file: Path) -> Iterator[str]:
    """Yield a line for each link of a file whose target or heading does not exist."""
    text = _CODE.sub("", _FENCE.sub("", file.read_text("utf-8")))
    for link in _LINK.finditer(text):
        if re.match(r"[a-z]+:", link["path"]):
            continue
        target = Path(os.path.normpath(file.parent / link["path"])) if link["path"] else file
        if not target.exists():
            yield f"{file.relative_to(ROOT)}: {link['path']} does not exist"
        elif link["anchor"] and target.suffix == ".md" and link["anchor"] not in anchors(target):
            yield f"{file.relative_to(ROOT)}: {link['path']} has no heading #{link['anchor']}"


@cache
def anchors(file: Path) -> frozenset[str]:
    """Return the anchors of a file's headings, as forges and the site make them."""
    return frozenset(anchor(heading) for heading in _HEADING.findall(_FENCE.sub("", file.read_text("utf-8"))))


def anchor(heading: str) -> str:
    """Return the anchor of a heading: lower case, with hyphens for spaces, without other signs."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def main() -> int:
    """List the broken links; return 1 if there are any."""
    found = [line for file in markdown_files() for line in broken_links(file)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
