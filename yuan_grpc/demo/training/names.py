"""Conversations in which someone gives a name and asks for it."""

from random import Random

from yuan_grpc.demo.training.facts import Language

SURNAMES, GIVEN_NAMES = "李王张刘陈杨赵黄周吴徐孙小", "明芳伟洋静帆磊丽杰刚红强玲华"

NEW_NAMES: dict[Language, tuple[str, ...]] = {
    "zh": ("小洋", "刘伟", "陈明", "王静"),
    "en": ("Nora", "Peter", "Ted", "Lucy"),
}
"""Names that the corpus does not have."""

NAMES: dict[Language, tuple[str, ...]] = {
    "zh": tuple(a + b for a in SURNAMES for b in GIVEN_NAMES if a + b not in NEW_NAMES["zh"]),
    "en": (
        "Alice",
        "Bob",
        "Carol",
        "David",
        "Emma",
        "Frank",
        "Grace",
        "Henry",
        "Irene",
        "Jack",
        "Kate",
        "Leo",
        "Mary",
        "Nick",
        "Olga",
        "Paul",
        "Rose",
        "Sam",
        "Tom",
        "Wendy",
        "Anna",
        "Ben",
        "Clara",
        "Dan",
        "Eva",
        "Fred",
        "Gina",
        "Hugo",
        "Ida",
        "John",
        "Karl",
        "Lisa",
        "Mark",
        "Nina",
        "Otto",
        "Rita",
        "Steve",
        "Tina",
        "Victor",
        "Zoe",
    ),
}
INTRODUCTIONS: dict[Language, tuple[str, ...]] = {
    "zh": ("我叫{}", "我是{}", "我的名字是{}", "你好，我叫{}", "你好，我是{}"),
    "en": ("my name is {}", "I am {}", "hello, I am {}", "hi, my name is {}", "call me {}"),
}
QUESTIONS: dict[Language, tuple[str, ...]] = {
    "zh": ("我叫什么", "我叫什么名字", "我是谁", "我的名字是什么", "你记得我的名字吗"),
    "en": ("what is my name", "who am I", "what am I called", "do you remember my name", "say my name"),
}
GREETINGS: dict[Language, str] = {"zh": "你好，{}！", "en": "Hello, {}!"}
ANSWERS: dict[Language, str] = {"zh": "你叫{}。", "en": "Your name is {}."}


def introduce(language: Language, random: Random) -> list[tuple[str, str]]:
    """Return one turn that gives a name, or two, the second of which asks for it."""
    name = random.choice(NAMES[language])
    turns = [
        (random.choice(INTRODUCTIONS[language]).format(name), GREETINGS[language].format(name)),
        (random.choice(QUESTIONS[language]), ANSWERS[language].format(name)),
    ]
    return turns[: random.choice((1, 2, 2))]
