"""The program in a generated text: by the rules of the published evaluation, and by a plain cut.

Both take a prompt and what was generated for it. The rules are kept to the letter, oddities included: what they lose
the published numbers have lost too.
"""

from __future__ import annotations

import re
from collections.abc import Callable

FENCE = "```"
OPENING = "```python"
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
ENDS = ("\nprint", "\n# 示例", "\n```", "\n# 测试", "\n# 单元测试", "\n#", "\nif")
"""Where what belongs to the program ends, in the order in which they are looked for."""


def by_rules(prompt: str, generated: str) -> str:
    """The program as the published evaluation had it: rules 1 to 7."""
    text = replaced(after_opening(without_end_of_text(prompt + generated)))
    text = without_docstring(text)
    return cut_at_ends(without_second_function(up_to_block(text)))


def by_first_fence(prompt: str, generated: str) -> str:
    """The program as a reader would have it: all between the opening fence and the first closing one."""
    program = after_opening(without_end_of_text(prompt + generated))
    closing = re.search(rf"^{FENCE}", program, re.MULTILINE)
    return program[: closing.start()] if closing else program


EXTRACTIONS: dict[str, Callable[[str, str], str]] = {"rules": by_rules, "plain": by_first_fence}
"""The two ways, by the names that files and reports have for them."""


def with_fence(generated: str) -> str:
    """A text that ended at the closing fence, with that fence: without it, rule 6 destroys whole programs."""
    return generated if generated.endswith(FENCE) else generated + FENCE


def without_end_of_text(text: str) -> str:
    """Rule 1: a last `<eod>` is dropped, and with it one space at the very beginning: the one before it stays."""
    if not text.endswith(END_OF_TEXT):
        return text
    return text.removesuffix(END_OF_TEXT).removeprefix(" ")


def after_opening(text: str) -> str:
    """Rule 2: all after the first opening fence; the whole text where there is none, as in other sets."""
    return text.split(OPENING, 1)[-1]


def replaced(text: str) -> str:
    """Rule 3: all replacements, in order."""
    for old, new in REPLACEMENTS:
        text = text.replace(old, new)
    return text


def without_docstring(text: str) -> str:
    """Rule 4: without the first docstring, wherever its text occurs."""
    for quotes in QUOTES:
        if text.count(quotes) >= 2:
            first = text.find(quotes)
            second = text.find(quotes, first + 1)  # of four quotes in a row the second three
            return text.replace(text[first : second + len(quotes)], "")
    return text


def up_to_block(text: str) -> str:
    """Rule 5: what stands before the block, and the block."""
    fenced = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)
    block = fenced.group(1) if fenced else first_function(text)
    if block is None:
        return text
    return text[: text.find(block[:10])] + block


def first_function(text: str) -> str | None:
    """From the first line that starts with `def `, but for the very first line, to the empty line that ends it.

    To the end where there is no empty line, or another such line comes before it. None without such a line.
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


def without_second_function(text: str) -> str:
    """Rule 6: without all from the second function on, wherever that occurs, unless rule 7 cuts something off."""
    if text.count("\ndef") < 2 or any(mark in text for mark in ("\n```", "\n#", "\nif")):
        return text
    second = text.find("\ndef", text.find("\ndef") + 1)
    return text.replace(text[second:], "\n")


def cut_at_ends(text: str) -> str:
    """Rule 7: up to each of the ends in turn, unless it comes first of all."""
    for end in ENDS:
        at = text.find(end)
        if at > 0:
            text = text[:at]
    return text
