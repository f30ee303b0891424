"""Links of a page to files of the repository that are not pages."""

import os
import re
from pathlib import Path

_LINK = re.compile(r"(?<!!)(?P<text>\[[^\]\n]*\])\((?P<target>(?:\.\./)+[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")


def rewrite(text: str, page: Path, root: Path, home: str) -> str:
    """Return the text of a page with links that leave `docs/` changed to addresses in the repository.

    Args:
        page: the file of the page.
        root: the folder of the repository.
        home: the repository's address; without it, such a link becomes its text and the path, as it would lead nowhere.
    """

    def replace(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match["target"]))
        if target.is_relative_to(root / "docs") and target != root / "docs":
            return match[0]
        path = str(target.relative_to(root))
        if home:
            return f"{match['text']}({home}/blob/main/{path}{match['anchor'] or ''})"
        text = match["text"][1:-1]
        return text if path in text else f"{text} (`{path}`)"

    return _LINK.sub(replace, text)
