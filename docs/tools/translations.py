"""The Chinese pages and their English originals: `python docs/tools/translations.py [--accept PAGE ...]`.

The first line of a translation names its original, with the hash of the text that was translated. The command lists
the translations whose original has changed since, and exits with 1 if there are any. `--accept` records that a page was
brought up to date.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_MARK = re.compile(r"\A<!-- (?P<original>\S+\.md) (?P<hash>[0-9a-f]{12}) -->\n")


@dataclass(frozen=True)
class Translation:
    """A translated page.

    Attributes:
        page: its file.
        original: the file of the English page.
        translated: the hash of the text that was translated.
    """

    page: Path
    original: Path
    translated: str

    @property
    def is_outdated(self) -> bool:
        """Whether the original has changed since."""
        return fingerprint(self.original) != self.translated

    def accept(self) -> None:
        """Record that the page has all of the original as it is now."""
        text = self.page.read_text("utf-8")
        mark = f"<!-- {self.original.relative_to(ROOT)} {fingerprint(self.original)} -->\n"
        self.page.write_text(_MARK.sub(mark, text), "utf-8")


def fingerprint(page: Path) -> str:
    """Return a hash of the words of a page, which a new line break leaves as it is."""
    return hashlib.sha256(" ".join(page.read_text("utf-8").split()).encode()).hexdigest()[:12]


def translated_files() -> list[Path]:
    """Return the files in Chinese."""
    return [ROOT / "README.zh.md", *sorted((ROOT / "docs/zh").glob("*.md"))]


def translations() -> list[Translation]:
    """Return the translations. A page without an original, such as the index, is none."""
    found = [(page, _MARK.match(page.read_text("utf-8"))) for page in translated_files()]
    return [Translation(page, ROOT / mark["original"], mark["hash"]) for page, mark in found if mark]


def main(arguments: Sequence[str]) -> int:
    """List the translations that are outdated, or record some as up to date."""
    if arguments[:1] == ["--accept"]:
        names = {(ROOT / name).resolve() for name in arguments[1:]}
        for translation in translations():
            if translation.page.resolve() in names:
                translation.accept()
        return 0
    outdated = [translation for translation in translations() if translation.is_outdated]
    for translation in outdated:
        page, original = translation.page.relative_to(ROOT), translation.original.relative_to(ROOT)
        print(f"{page} is older than {original}: bring it up to date, then make docs-check ARGS='--accept {page}'")
    return 1 if outdated else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
