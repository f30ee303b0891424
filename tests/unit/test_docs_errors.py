"""The page of error texts: each quoted text is in the source, and each cause of a failed start is on the page."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)  # parses all modules

REPOSITORY = Path(__file__).parents[2]
PAGES = ("docs/troubleshooting.md", "docs/zh/troubleshooting.md")
_ROW = re.compile(r"^\| (?P<fence>`+)(?P<text>.+?)(?P=fence)(?P<origin> \(gRPC\))?[^|\n]* \|", re.MULTILINE)
_GAP, _END = "\0", "\1"
"""Characters that stand for a value in the text of an f-string, and for the end of a text."""


@cache
def source_texts() -> str:
    """Return all texts of the source, with a gap for each value."""
    files = sorted((REPOSITORY / "yuan_grpc").rglob("*.py"))
    return _END.join(text for file in files for text in texts_of(file.read_text("utf-8")))


def texts_of(source: str) -> list[str]:
    """Return the texts of a module; those of an f-string as one."""
    return [text for node in ast.walk(ast.parse(source)) if (text := text_of(node))]


def text_of(node: ast.AST | None) -> str:
    """Return the text of a literal, or the empty text for another node."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else _GAP for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def quoted_errors(page: str) -> list[str]:
    """Return the error texts of a page's tables, without those of gRPC itself and of what no server says."""
    text = (REPOSITORY / page).read_text("utf-8")
    tables = re.findall(r"^\| (?:error|报错) \|.*?\n\n", text, re.MULTILINE | re.DOTALL)
    return [row["text"].strip() for table in tables for row in _ROW.finditer(table) if not row["origin"]]


def to_pattern(quoted: str) -> re.Pattern[str]:
    """Return a pattern of the texts that a quoted one stands for, whose … is any value."""
    parts = [re.escape(part) for part in quoted.strip("… :").split("…")]
    return re.compile(f"[^{_END}]*".join(parts))


@pytest.mark.parametrize("page", PAGES)
def test_each_quoted_error_is_in_the_source(page: str) -> None:
    errors = quoted_errors(page)
    assert len(errors) > 30
    unknown = [error for error in errors if not to_pattern(error).search(source_texts())]
    assert not unknown


def start_errors() -> list[str]:
    """Return the texts of all causes of a failed start that are found before vLLM is imported."""
    found = []
    for file in sorted((REPOSITORY / "yuan_grpc/preflight").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "StartError":
                found += [text_of(argument) for argument in node.args]
    return [text for text in found if len(text.replace(_GAP, "")) > 10]


def test_each_cause_of_a_failed_start_is_on_the_page() -> None:
    causes, patterns = start_errors(), [to_pattern(error) for error in quoted_errors(PAGES[0])]
    assert len(causes) > 30
    assert not [cause for cause in causes if not any(pattern.search(cause) for pattern in patterns)]
