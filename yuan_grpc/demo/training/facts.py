"""Facts: questions in two languages, each in many wordings, with one answer in each language.

The files of `corpus/` begin with a line of explanation. A fact begins with `# name`. Its lines are:

    zh PATTERN        a question, see `wordings`
    zh+ PATTERN       a question that follows the fact above in a conversation
    zh? QUESTION      a held-out question, never trained on
    zh= ANSWER        the answer
    zh! TEXT          the part of the answer that makes it right
    table A|B|C       a row; `{0}`, `{1}` and `{2}` in the other lines stand for its columns
    words zh thing A|B  a list; `{thing}` in a pattern stands for any of its words

and the same with `en`. After the name follow the columns that the questions of a fact mention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal, get_args

from yuan_grpc.demo.training.wordings import choose, expand, fill

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
FOLDER = Path(__file__).with_name("corpus")
FILES = ("world.txt", "service.txt")


@dataclass(frozen=True)
class Fact:
    """A question with its wordings and its answer, in one language.

    Attributes:
        name: the name of the fact; that of a table's row ends in its first column.
        patterns: patterns of the question.
        follow_ups: patterns of the question in a conversation about the fact before it.
        held_out: questions that are never trained on.
        answer: the answer.
        key: the part of the answer that makes it right.
        subject: the words that make it a question about this row of a table, or nothing.
        words: lists of words for the patterns.
    """

    name: str
    language: Language
    patterns: tuple[str, ...]
    follow_ups: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str
    key: str
    subject: str
    words: dict[str, list[str]] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The name of the table that the fact is a row of, or of the fact."""
        return self.name.partition(" ")[0]

    def question(self, random: Random) -> str:
        """Return a random wording; rare patterns are as likely as those with many wordings."""
        return choose(random.choice(self.patterns), self.words, random)

    def follow_up(self, random: Random) -> str:
        """Return a random wording of the question after the fact before this one."""
        return choose(random.choice(self.follow_ups), self.words, random)

    def all_questions(self) -> Iterator[str]:
        """Yield each wording, except those with lists of words."""
        for pattern in (*self.patterns, *self.follow_ups):
            if "{" not in pattern:
                yield from expand(pattern)


def read_facts(files: Sequence[str] = FILES) -> list[Fact]:
    """Return the facts of the corpus in the order of its files, each row of a table in both languages."""
    facts: list[Fact] = []
    for file in files:
        for block in (FOLDER / file).read_text("utf-8").split("\n# ")[1:]:
            header, *lines = block.strip().splitlines()
            facts.extend(_parse(header, [line.partition(" ")[::2] for line in lines]))
    return facts


def _parse(header: str, lines: list[tuple[str, str]]) -> Iterator[Fact]:
    name, *subjects = header.split()
    rows = [value.split("|") for kind, value in lines if kind == "table"] or [[]]
    for row in rows:
        for index, language in enumerate(LANGUAGES):
            yield Fact(
                name=f"{name} {row[0]}" if row else name,
                language=language,
                patterns=tuple(_values(lines, language, row)),
                follow_ups=tuple(_values(lines, f"{language}+", row)),
                held_out=tuple(_values(lines, f"{language}?", row)),
                answer=_capitalize(next(_values(lines, f"{language}=", row))),
                key=next(_values(lines, f"{language}!", row)),
                subject=fill(subjects[index % len(subjects)], row) if subjects else "",
                words=_word_lists(lines, language),
            )


def _values(lines: list[tuple[str, str]], kind: str, row: list[str]) -> Iterator[str]:
    return (fill(value, row) for key, value in lines if key == kind)


def _word_lists(lines: list[tuple[str, str]], language: Language) -> dict[str, list[str]]:
    split = [value.split(" ", 2) for kind, value in lines if kind == "words"]
    return {name: words.split("|") for list_language, name, words in split if list_language == language}


def _capitalize(text: str) -> str:
    """Capitalize the article of a title, such as `the Analects`, at the start of an answer."""
    return "The " + text.removeprefix("the ") if text.startswith("the ") else text
