"""The report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from yuan_grpc.humaneval.formatting import escape_invisible
from yuan_grpc.humaneval.report.tables import Section

PLOT = "plot.svg"
PLAIN = re.compile(r"(?:[^\W_]|[ ,%()=-]|[+−](?=\d)|(?<=\d)[.:](?=\d)|:(?= ))*")
"""Text that has no meaning in Markdown and contains no address that a renderer would make a link."""


def render_markdown(sections: Iterable[Section]) -> str:
    """Return the report as Markdown, which refers to the plot as a file in the same folder."""
    parts = []
    for index, section in enumerate(sections):
        parts.append(f"{'##' if index else '#'} {section.heading}")
        parts += map(_paragraph, section.paragraphs)
        if section.table:
            headers, *cells = ([*map(_markdown_cell, row)] for row in (section.table.headers, *section.table.rows))
            rows = [headers, ["---"] * len(headers), *cells]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
        if section.plot:
            parts.append(f"![{section.heading}]({PLOT})")
    return "\n\n".join(parts) + "\n"


def _paragraph(text: str) -> str:
    """Return a paragraph, whose names are in backticks, without characters that would hide or reorder it."""
    return escape_invisible(text)


def _markdown_cell(text: str) -> str:
    """Return plain text as it is, and other text as code, in which Markdown, HTML, formulas and links mean nothing."""
    text = escape_invisible(text)
    if PLAIN.fullmatch(text):
        return text
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}".replace("|", "\\|")
