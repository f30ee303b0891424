"""The pages as Markdown next to their HTML, and `llms.txt`, which lists them for language models."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

_TOCTREE = re.compile(r"^```\{toctree\}\n(?P<body>.*?)^```\n?", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->\s*", re.DOTALL)
_FENCE = re.compile(r"^```.*?^```\n?", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_OTHER_LANGUAGE = re.compile(r"\[(?:中文|中文文档|English)\]\([^)]*\)")
_SENTENCES = re.compile(r".{1,200}?(?:[.。](?= |$)|[。]|$)(?:.{1,80}?(?:[.。](?= |$)|[。]))?")


def write(source: Path, output: Path) -> None:
    """Copy each page of a folder, and write `llms.txt` in the order of the toctrees of `index.md`."""
    for page in pages(source):
        target = output / page.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, target)
    (output / "llms.txt").write_text(llms_txt(source), "utf-8")


def pages(source: Path) -> list[Path]:
    """Return the Markdown files of the site."""
    return [page for page in sorted(source.rglob("*.md")) if page.relative_to(source).parts[0] != "tools"]


def llms_txt(source: Path) -> str:
    """Return the list of pages: a section for each toctree, a line for each page with its title and first sentence."""
    index = (source / "index.md").read_text("utf-8")
    lines = [f"# {title(index)}", "", f"> {summary(index)}"]
    for caption, names in toctrees(source):
        lines += ["", f"## {caption}", ""]
        for name in names:
            text = (source / f"{name}.md").read_text("utf-8")
            lines.append(f"- [{title(text)}]({name}.md): {summary(text)}")
    return "\n".join(lines) + "\n"


def toctrees(source: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the caption and the pages of each toctree of `index.md`; a pattern stands for those not named before it."""
    for match in _TOCTREE.finditer((source / "index.md").read_text("utf-8")):
        lines = [line for line in match["body"].split("\n") if line]
        options = dict(line[1:].split(": ", 1) for line in lines if line.startswith(":") and ": " in line)
        names: list[str] = []
        for entry in (line for line in lines if not line.startswith(":")):
            found = sorted(str(page.relative_to(source).with_suffix("")) for page in source.glob(f"{entry}.md"))
            names += [name for name in found if name not in names] if "*" in entry else [entry]
        yield options.get("caption", ""), names


def title(text: str) -> str:
    """Return the first heading of a page."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else ""


def summary(text: str) -> str:
    """Return the first sentences of a page's introduction, or, if it has none, its headings."""
    introduction = re.split(r"^## ", _FENCE.sub("", _COMMENT.sub("", text)), maxsplit=1, flags=re.MULTILINE)[0]
    for block in introduction.split("\n\n"):
        line = " ".join(_LINK.sub(r"\1", _OTHER_LANGUAGE.sub("", block)).split())
        if re.match(r"[^\s#|>!<:{-]", block) and line and not line.endswith((":", "：")):
            return _SENTENCES.match(line)[0].strip()  # type: ignore[index]
    return "; ".join(re.findall(r"^##? (.+)$", text, re.MULTILINE)[-6:])
