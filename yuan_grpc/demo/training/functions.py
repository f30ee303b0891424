"""Short Python functions, as answers to questions and as tasks in the shape of HumanEval's prompts.

A function of `corpus/functions.txt` begins with `# name|other_name(parameter|other_name: kind, …) -> type`, where kinds
are those of `ARGUMENTS`. Lines `zh`, `zh?`, `en` and `en?` describe it, as in `facts`; the rest is its body.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from yuan_grpc.demo.training.facts import FOLDER, Language
from yuan_grpc.demo.training.wordings import choose

HEADER = re.compile(r"(?P<names>[\w|]+)\((?P<parameters>.*)\) -> (?P<returns>\w+)")
NEUTRAL = ("compute", "run", "work", "task")
"""Names that say nothing, so that the description has to be read."""

WORDS = ("red", "green", "apple", "level", "Hello", "world", "tea", "river", "Yuan", "noon", "a", "banana")

ARGUMENTS: dict[str, tuple[str, Callable[[Random], Any]]] = {
    "int": ("int", lambda random: random.randint(-20, 40) if random.random() < 0.6 else random.randint(0, 12)),
    "small": ("int", lambda random: random.randint(1, 7)),
    "year": ("int", lambda random: random.choice([1900, 2000, 2024, 2023, 2100, 1996, random.randint(1800, 2200)])),
    "str": ("str", lambda random: " ".join(random.choices(WORDS, k=random.randint(1, 3)))),
    "letter": ("str", lambda random: random.choice("aelor")),
    "list": ("list", lambda random: random.choices(random.sample(range(-9, 20), k=5), k=random.randint(2, 5))),
    "words": ("list", lambda random: random.choices(WORDS, k=random.randint(2, 4))),
}
"""The type hint and a random value of each kind of argument."""


@dataclass(frozen=True)
class Parameter:
    """A parameter: its names, the first of which the body uses, and the kind of its values."""

    names: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Function:
    """A function with descriptions in both languages."""

    names: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    returns: str
    body: str
    patterns: dict[Language, list[str]]
    held_out: dict[Language, list[str]]

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    def describe(self, language: Language, random: Random) -> str:
        """Return a random description: what the function does, as an imperative."""
        return choose(random.choice(self.patterns[language]), {}, random)

    def write(self, random: Random | None = None) -> "Source":
        """Return the source: with random names and perhaps type hints, or with the first names and type hints."""
        name = random.choice((*self.names, random.choice(NEUTRAL))) if random else self.name
        chosen = [random.choice(each.names) if random else each.names[0] for each in self.parameters]
        has_hints = random.random() < 0.6 if random else True
        hints = [f"{new}: {ARGUMENTS[each.kind][0]}" for new, each in zip(chosen, self.parameters, strict=True)]
        arguments = ", ".join(hints if has_hints else chosen)
        body = self.body
        for new, parameter in zip(chosen, self.parameters, strict=True):
            body = re.sub(rf"\b{parameter.names[0]}\b(?!\()", new, body)
        return Source(name, f"def {name}({arguments}){f' -> {self.returns}' if has_hints else ''}:", body)

    def call(self, random: Random) -> tuple[str, str]:
        """Return the arguments of a call and its result, as Python writes them."""
        namespace: dict[str, Any] = {}
        source = self.write()
        exec(f"{source.head}\n{source.body}", namespace)
        arguments = [ARGUMENTS[each.kind][1](random) for each in self.parameters]
        return ", ".join(map(repr, arguments)), repr(namespace[self.name](*arguments))


@dataclass(frozen=True)
class Source:
    """The source of a function: its name, its first line and its body."""

    name: str
    head: str
    body: str


def read_functions() -> list[Function]:
    """Return the functions of the corpus."""
    blocks = (FOLDER / "functions.txt").read_text("utf-8").split("\n# ")[1:]
    return [_parse(*block.split("\n", 1)) for block in blocks]


def _parse(header: str, text: str) -> Function:
    match = HEADER.fullmatch(header)
    assert match, header
    lines = [line for line in text.splitlines() if line]

    def values(kind: str) -> list[str]:
        return [line.removeprefix(f"{kind} ") for line in lines if line.startswith(f"{kind} ")]

    return Function(
        names=tuple(match["names"].split("|")),
        parameters=tuple(_parse_parameter(text) for text in match["parameters"].split(", ")),
        returns={"year": "int", "words": "list"}.get(match["returns"], match["returns"]),
        body="\n".join(line for line in lines if line.startswith("    ")),
        patterns={"zh": values("zh"), "en": values("en")},
        held_out={"zh": values("zh?"), "en": values("en?")},
    )


def _parse_parameter(text: str) -> Parameter:
    names, _, kind = text.partition(": ")
    return Parameter(tuple(names.split("|")), kind)
