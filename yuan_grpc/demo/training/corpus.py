"""The training corpus: an endless stream of samples, drawn from facts, sums, functions and conversations by a seed."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from yuan_grpc.demo.training import prompts, sums
from yuan_grpc.demo.training.facts import LANGUAGES, Fact, Language, read_facts
from yuan_grpc.demo.training.functions import Function, read_functions
from yuan_grpc.demo.training.names import introduce

SEPARATOR, TURN = "<sep>", "<n>"

WEIGHTS = {"fact": 42, "conversation": 20, "function": 10, "task": 13, "sum": 11, "name": 4}
"""Share of each kind of sample, in percent."""

TABLE_WEIGHT = 0.45
"""Weight of a row of a table, relative to a fact of its own: rows share their wordings."""

FREQUENT = {"unknown": 8.0, "rpc-purpose": 0.7}
"""Weights of facts that differ from these."""

ADJACENT = {"zh": ("那{}呢", "{}呢", "那么{}呢"), "en": ("and {}", "what about {}", "how about {}", "and of {}")}
REPEAT = {
    "zh": ("再说一遍", "请再说一遍", "重复一下", "请重复", "再说一次"),
    "en": ("say that again", "please repeat", "repeat that", "once more please", "can you repeat that"),
}
TRANSLATE = {  # by the language of the request
    "zh": ("用英文说", "请用英文回答", "用英语回答", "英文怎么说", "翻译成英文"),
    "en": ("in Chinese please", "say it in Chinese", "answer in Chinese", "please answer in Chinese", "and in Chinese"),
}


@dataclass(frozen=True)
class Sample:
    """A prompt and its completion, which begins with `<sep>` unless it continues code. `<eod>` follows."""

    kind: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Turn:
    """A question as written, with the answer; `fact` is set if it asks for one."""

    question: str
    answer: str
    fact: Fact | None = None


class Corpus:
    """A generator of samples."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self.facts: list[Fact] = read_facts()
        self.functions: list[Function] = read_functions()
        self._by_language = {one: [fact for fact in self.facts if fact.language == one] for one in LANGUAGES}
        self._weights = {one: [weight_of(fact) for fact in facts] for one, facts in self._by_language.items()}
        self._tables: dict[tuple[str, Language], list[Fact]] = defaultdict(list)
        for fact in self.facts:
            self._tables[fact.group, fact.language].append(fact)
        self._counterparts = {(fact.name, fact.language): fact for fact in self.facts}
        self._follow_ups = self._pair_follow_ups()

    def sample(self) -> Sample:
        """Return the next sample."""
        (kind,) = self._random.choices([*WEIGHTS], [*WEIGHTS.values()])
        makers: dict[str, Callable[[Language], Sample]] = {
            "fact": self._fact,
            "conversation": self._conversation,
            "function": self._function,
            "task": self._task,
            "sum": self._sum,
            "name": self._name,
        }
        return makers[kind](self._random.choice(LANGUAGES))

    def _fact(self, language: Language) -> Sample:
        return self._join("fact", [self._ask_fact(language)])

    def _ask_fact(self, language: Language) -> Turn:
        (fact,) = self._random.choices(self._by_language[language], self._weights[language])
        return self._ask(fact)

    def _ask(self, fact: Fact) -> Turn:
        return Turn(prompts.phrase(fact.question(self._random), fact.language, self._random), fact.answer, fact)

    def _ask_sum(self, language: Language) -> Turn:
        question, answer = sums.ask(language, self._random)
        return Turn(prompts.phrase(question, language, self._random), answer)

    def _sum(self, language: Language) -> Sample:
        return self._join("sum", [self._ask_sum(language)])

    def _ask_function(self, language: Language) -> Turn:
        function = self._random.choice(self.functions)
        question = prompts.ask_for_code(function.describe(language, self._random), language, self._random)
        return Turn(prompts.phrase(question, language, self._random), prompts.format_code(function.write()))

    def _function(self, language: Language) -> Sample:
        return self._join("function", [self._ask_function(language)])

    def _task(self, language: Language) -> Sample:
        function = self._random.choice(self.functions)
        source = function.write(self._random)
        calls = [function.call(self._random) for _ in range(self._random.choice((1, 1, 2)))]
        description = function.describe(language, self._random)
        return Sample("task", prompts.write_task(description, source, calls, language), f"{source.body}\n```")

    def _name(self, language: Language) -> Sample:
        return self._join("name", [Turn(*turn) for turn in introduce(language, self._random)])

    def _conversation(self, language: Language) -> Sample:
        turns = [self._any_turn(language)]
        for _ in range(self._random.choice((1, 1, 1, 2))):
            turns.append(self._next_turn(turns[-1], language))
        return self._join("conversation", turns)

    def _any_turn(self, language: Language) -> Turn:
        kind = self._random.random()
        if kind < 0.1:
            return self._ask_sum(language)
        return self._ask_function(language) if kind < 0.15 else self._ask_fact(language)

    def _next_turn(self, previous: Turn, language: Language) -> Turn:
        """Return a turn that refers to the previous one, or one that does not."""
        kind = self._random.random()
        if previous.fact and kind < 0.5:
            options = [self._translate, self._translate, self._repeat, self._ask_adjacent, self._ask_adjacent]
            if turn := self._random.choice([*options, self._ask_follow_up, self._ask_follow_up])(previous.fact):
                return turn
        return self._any_turn(language)

    def _repeat(self, fact: Fact) -> Turn:
        return Turn(self._phrase_short(REPEAT[fact.language], fact.language), fact.answer, fact)

    def _translate(self, fact: Fact) -> Turn:
        other = self._counterparts[fact.name, "en" if fact.language == "zh" else "zh"]
        return Turn(self._phrase_short(TRANSLATE[fact.language], fact.language), other.answer, other)

    def _ask_adjacent(self, fact: Fact) -> Turn | None:
        if not fact.subject or len(self._tables[fact.group, fact.language]) < 2:
            return None
        other = self._random.choice(self._tables[fact.group, fact.language])
        question = self._random.choice(ADJACENT[fact.language]).format(other.subject)
        return Turn(self._phrase_short((question,), fact.language), other.answer, other)

    def _ask_follow_up(self, fact: Fact) -> Turn | None:
        other = self._follow_ups.get((fact.name, fact.language))
        if other is None:
            return None
        return Turn(self._phrase_short((other.follow_up(self._random),), fact.language), other.answer, other)

    def _phrase_short(self, options: Sequence[str], language: Language) -> str:
        return prompts.punctuate(self._random.choice(options), language, self._random)

    def _pair_follow_ups(self) -> dict[tuple[str, Language], Fact]:
        pairs = {}
        for facts in self._by_language.values():
            for before, fact in pairwise(facts):
                if fact.follow_ups:
                    pairs[before.name, before.language] = fact
        return pairs

    def _join(self, kind: str, turns: Sequence[Turn]) -> Sample:
        """Return the sample that trains the answer of the last turn."""
        space = self._random.choice(("", " "))  # clients send an answer back with or without the space it begins with
        before = [text for turn in turns[:-1] for text in (turn.question, space + turn.answer)]
        return Sample(kind, TURN.join([*before, turns[-1].question]), SEPARATOR + turns[-1].answer)


def weight_of(fact: Fact) -> float:
    """Return how often to ask for a fact, relative to one that is not a row of a table."""
    return FREQUENT.get(fact.group, TABLE_WEIGHT if fact.subject else 1.0)
