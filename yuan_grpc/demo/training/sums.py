"""Simple sums: addition and subtraction up to 10, and multiplication up to 9 times 9."""

from collections.abc import Iterator
from random import Random

from yuan_grpc.demo.training.facts import Language

ADDENDS, FACTORS = range(11), range(10)
HELD_OUT_SHARE = 0.04
"""Share of the sums that are never trained on, to find out whether the model computes."""

WORDINGS: dict[str, dict[Language, tuple[str, ...]]] = {
    "+": {
        "zh": (
            "{}加{}等于几",
            "{}加{}是多少",
            "{}加{}",
            "{}+{}=",
            "{} + {}",
            "{}+{}等于多少",
            "计算{}加{}",
            "{}与{}的和是多少",
        ),
        "en": (
            "what is {} plus {}",
            "{} plus {}",
            "{}+{}=",
            "{} + {}",
            "how much is {} + {}",
            "add {} and {}",
            "what is {}+{}",
        ),
    },
    "-": {
        "zh": (
            "{}减{}等于几",
            "{}减{}是多少",
            "{}减{}",
            "{}-{}=",
            "{} - {}",
            "{}-{}等于多少",
            "计算{}减{}",
            "{}减去{}是多少",
        ),
        "en": ("what is {} minus {}", "{} minus {}", "{}-{}=", "{} - {}", "how much is {} - {}", "what is {}-{}"),
    },
    "*": {
        "zh": (
            "{}乘{}等于几",
            "{}乘{}是多少",
            "{}乘以{}",
            "{}*{}=",
            "{} * {}",
            "{}×{}等于多少",
            "计算{}乘{}",
            "{}乘{}",
        ),
        "en": ("what is {} times {}", "{} times {}", "{}*{}=", "{} * {}", "how much is {} x {}", "multiply {} by {}"),
    },
}
HELD_OUT: dict[str, dict[Language, tuple[str, ...]]] = {
    "+": {"zh": ("{}加上{}等于多少",), "en": ("how much is {} plus {}",)},
    "-": {"zh": ("{}减去{}等于多少",), "en": ("how much is {} minus {}",)},
    "*": {"zh": ("{}乘以{}等于多少",), "en": ("how much is {} times {}",)},
}


def all_sums() -> Iterator[tuple[int, str, int, int]]:
    """Yield each sum: first number, sign, second number, result."""
    for a in ADDENDS:
        for b in ADDENDS:
            yield a, "+", b, a + b
            if b <= a:
                yield a, "-", b, a - b
    for a in FACTORS:
        for b in FACTORS:
            yield a, "*", b, a * b


def split_sums() -> tuple[list[tuple[int, str, int, int]], list[tuple[int, str, int, int]]]:
    """Return the sums to train on, and the held-out ones."""
    sums = list(all_sums())
    held_out = set(Random(0).sample(sums, round(HELD_OUT_SHARE * len(sums))))
    return [one for one in sums if one not in held_out], sorted(held_out)


TRAINED, UNTRAINED = split_sums()


def ask(language: Language, random: Random) -> tuple[str, str]:
    """Return a question for a random sum, and its answer."""
    a, sign, b, result = random.choice(TRAINED)
    return random.choice(WORDINGS[sign][language]).format(a, b), answer(a, sign, b, result)


def answer(a: int, sign: str, b: int, result: int) -> str:
    """Return the answer, which is the same in both languages."""
    return f"{a} {sign} {b} = {result}"
