"""Wordings of a question, written as one pattern with alternatives: `what is the [highest|tallest] mountain`."""

import itertools
import re
from collections.abc import Mapping, Sequence
from random import Random

CHOICE = re.compile(r"\[([^\]]*)\]")
WORD = re.compile(r"\{([a-z]+)\}")
COLUMN = re.compile(r"\{(\d)\}")


def choose(pattern: str, words: Mapping[str, Sequence[str]], random: Random) -> str:
    """Return one wording, with a random alternative in place of each choice, and a random word of each `{list}`."""
    text = CHOICE.sub(lambda match: random.choice(match[1].split("|")), pattern)
    return _tidy(WORD.sub(lambda match: random.choice(words[match[1]]), text))


def expand(pattern: str) -> list[str]:
    """Return every wording of a pattern without word lists."""
    parts = [part.split("|") if i % 2 else [part] for i, part in enumerate(CHOICE.split(pattern))]
    return [_tidy("".join(wording)) for wording in itertools.product(*parts)]


def fill(pattern: str, row: Sequence[str]) -> str:
    """Replace `{0}`, `{1}`, … by the columns of a row."""
    return COLUMN.sub(lambda match: row[int(match[1])], pattern)


def _tidy(text: str) -> str:
    return " ".join(text.split(" ")).replace("  ", " ").strip()
