"""Extraction of a program from generated text, by the rules of the published evaluation or by a plain cut.

Both ways take a prompt and the text generated for it. The published rules are reproduced exactly, with their bugs: the
published pass rates include the programs that those bugs destroy.
"""

from __future__ import annotations

import re
from collections.abc import Callable

FENCE = "```"
OPENING_FENCE = "```python"
END_OF_TEXT = "<eod>"
REPLACEMENTS = (
    ('\nFIX = """\nAdd more test cases.\n"""', ""),
    ("\n\n\ndef", "\ndef"),
    ("\n    \n\n    ", "\n    \n    "),
    ("\n\n    ", "\n    "),
    ("\n\n\n", "\n\n"),
    ('"""\n        ', '"""\n    '),
    ("\n```python", ""),
)
QUOTES = ('"""', "'''")
END_MARKERS = ("\nprint", "\n# 示例", "\n```", "\n# 测试", "\n# 单元测试", "\n#", "\nif")
"""Text that ends the program, in the order of the search."""


def extract_by_rules(prompt: str, generated: str) -> str:
    """Return the program as the published evaluation extracts it, by rules 1 to 7."""
    text = apply_replacements(drop_before_code(strip_end_of_text(prompt + generated)))
    text = remove_docstring(text)
    return cut_at_end_markers(remove_second_function(keep_up_to_block(text)))


def extract_first_block(prompt: str, generated: str) -> str:
    """Return the text between the opening fence and the first closing fence."""
    program = drop_before_code(strip_end_of_text(prompt + generated))
    closing = re.search(rf"^{FENCE}", program, re.MULTILINE)
    return program[: closing.start()] if closing else program


EXTRACTIONS: dict[str, Callable[[str, str], str]] = {"rules": extract_by_rules, "plain": extract_first_block}
"""Extraction functions by their names in files and reports."""


def ensure_closing_fence(generated: str) -> str:
    """Append a closing fence unless the text ends with one. Without it, rule 6 destroys correct programs."""
    return generated if generated.endswith(FENCE) else generated + FENCE


def strip_end_of_text(text: str) -> str:
    """Apply rule 1: drop a final `<eod>` and, with it, one space at the start of the text.

    A space before `<eod>` stays.
    """
    if not text.endswith(END_OF_TEXT):
        return text
    return text.removesuffix(END_OF_TEXT).removeprefix(" ")


def drop_before_code(text: str) -> str:
    """Apply rule 2: keep the text after the first opening fence, or all of it if there is no fence."""
    return text.split(OPENING_FENCE, 1)[-1]


def apply_replacements(text: str) -> str:
    """Apply rule 3: make all replacements, in order."""
    for old, new in REPLACEMENTS:
        text = text.replace(old, new)
    return text


def remove_docstring(text: str) -> str:
    """Apply rule 4: remove the first docstring and every other occurrence of the same text."""
    for quotes in QUOTES:
        if text.count(quotes) >= 2:
            first = text.find(quotes)
            second = text.find(quotes, first + 1)  # in a row of four quotes, this finds the last three
            return text.replace(text[first : second + len(quotes)], "")
    return text


def keep_up_to_block(text: str) -> str:
    """Apply rule 5: keep the code block and the text before it."""
    fenced = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    block = fenced.group(1) if fenced else find_first_function(text)
    if block is None:
        return text
    return text[: text.find(block[:10])] + block


def find_first_function(text: str) -> str | None:
    """Return the text from the first `def ` line, other than line 1, to the next empty line.

    The result extends to the end of the text if no empty line follows, or if another `def ` line precedes it. None if
    there is no such `def ` line.
    """
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if i and line.startswith("def ")), None)
    if start is None:
        return None
    for i in range(start + 1, len(lines)):
        if lines[i].startswith("def "):
            break
        if not lines[i]:
            return "\n".join(lines[start:i]) + "\n"
    return "\n".join(lines[start:])


def remove_second_function(text: str) -> str:
    """Apply rule 6: remove the text from the second function on, wherever it occurs.

    A text with an end marker other than `print` stays unchanged: rule 7 cuts it.
    """
    if text.count("\ndef") < 2 or any(marker in text for marker in ("\n```", "\n#", "\nif")):
        return text
    second = text.find("\ndef", text.find("\ndef") + 1)
    return text.replace(text[second:], "\n")


def cut_at_end_markers(text: str) -> str:
    """Apply rule 7: cut at each end marker in turn, unless the text starts with it."""
    for marker in END_MARKERS:
        position = text.find(marker)
        if position > 0:
            text = text[:position]
    return text
