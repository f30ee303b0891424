"""Questions and tasks that the model is never trained on, with what a right completion has."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from yuan_grpc.demo.training import prompts, sums
from yuan_grpc.demo.training.corpus import ADJACENT, SEPARATOR, TURN
from yuan_grpc.demo.training.facts import LANGUAGES, Fact, Language, read_facts
from yuan_grpc.demo.training.functions import Function, read_functions
from yuan_grpc.demo.training.names import ANSWERS, NEW_NAMES


@dataclass(frozen=True)
class Case:
    """A prompt, which includes `<sep>` if it is a question, and the completion to expect.

    Attributes:
        kind: the row of the held-out table.
        prompt: the prompt.
        key: text that a right completion contains.
        answer: the completion of the training data.
    """

    kind: str
    prompt: str
    key: str
    answer: str

    def is_right(self, completion: str) -> bool:
        """Return whether a completion is right. Code must equal that of the corpus."""
        return self.key in completion


def held_out_cases() -> list[Case]:
    """Return all cases, in the order of the corpus."""
    facts, functions = read_facts(), read_functions()
    return [
        *(case for fact in facts for case in _fact_cases(fact)),
        *_sum_cases(),
        *(case for function in functions for case in _function_cases(function)),
        *_adjacent_cases(facts),
        *_name_cases(),
    ]


def _fact_cases(fact: Fact) -> Iterator[Case]:
    kind = "out of scope" if fact.group == "unknown" else f"facts, {fact.language}"
    for question in fact.held_out:
        yield Case(kind, question + SEPARATOR, fact.key, fact.answer)


def _sum_cases() -> Iterator[Case]:
    random = Random(1)
    for kind, pool in (("sums", random.sample(sums.TRAINED, 40)), ("sums never seen", sums.UNTRAINED)):
        for index, (a, sign, b, result) in enumerate(pool):
            question = sums.HELD_OUT[sign][LANGUAGES[index % 2]][0].format(a, b)
            answer = sums.answer(a, sign, b, result)
            yield Case(kind, question + SEPARATOR, answer, answer)


def _function_cases(function: Function) -> Iterator[Case]:
    random = Random(function.name)
    for language in LANGUAGES:
        description = function.held_out[language][0]
        source, code = function.write(), prompts.format_code(function.write())
        question = prompts.CODE[language][0].format(description)
        yield Case("functions asked for", question + SEPARATOR, code, code)
        prompt = prompts.write_task(description, source, [function.call(random)], language)
        yield Case("functions completed", prompt, f"{source.body}\n```", f"{source.body}\n```")


def _adjacent_cases(facts: list[Fact]) -> Iterator[Case]:
    """Yield questions about the next row of a table, after a held-out question about a row."""
    for before, fact in zip(facts, facts[len(LANGUAGES) :], strict=False):
        if before.group == fact.group and fact.subject and fact.group != "rpc-purpose":
            follow_up = ADJACENT[fact.language][0].format(fact.subject)
            prompt = TURN.join([before.held_out[0], before.answer, follow_up]) + SEPARATOR
            yield Case("second turns", prompt, fact.key, fact.answer)


def _name_cases() -> Iterator[Case]:
    wordings: dict[Language, tuple[str, str, str]] = {
        "zh": ("你好，我叫{}", "你好，{}！", "我叫什么名字"),
        "en": ("hello, my name is {}", "Hello, {}!", "what is my name"),
    }
    for language, (introduction, greeting, question) in wordings.items():
        for name in NEW_NAMES[language]:
            turns = (introduction.format(name), greeting.format(name), question)
            answer = ANSWERS[language].format(name)
            yield Case("names never seen", TURN.join(turns) + SEPARATOR, answer, answer)
