"""The forms of questions and of tasks, in both languages."""

from collections.abc import Sequence
from random import Random

from yuan_grpc.demo.training.facts import Language
from yuan_grpc.demo.training.functions import Source

BEFORE: dict[Language, tuple[str, ...]] = {
    "zh": ("请问", "请问，", "你好，请问", "我想知道", "告诉我，", "请告诉我", "问一下，", "请回答：", "你知道"),
    "en": (
        "please tell me, ",
        "tell me: ",
        "can you tell me ",
        "I want to know ",
        "I would like to know, ",
        "question: ",
        "hi, ",
        "hello, ",
        "do you know ",
        "excuse me, ",
        "so, ",
    ),
}
AFTER: dict[Language, tuple[str, ...]] = {
    "zh": ("？", "？", "？", "?", "呢", "呢？", "啊", "。", "，谢谢"),
    "en": ("?", "?", "?", "?", " ?", ".", "? thanks", ", please", "？"),
}
CODE: dict[Language, tuple[str, ...]] = {
    "zh": (
        "写一个函数，{}",
        "写一个Python函数，{}",
        "用Python{}",
        "怎么用Python{}",
        "请写一个Python函数：{}",
        "帮我写个函数，{}",
        "请写代码{}",
        "写一段Python代码，{}",
        "编写一个函数：{}",
        "用Python写一个函数来{}",
    ),
    "en": (
        "write a function to {}",
        "write a Python function to {}",
        "write Python code to {}",
        "how do I {} in Python",
        "please write a function: {}",
        "give me a function to {}",
        "{} in Python",
        "a Python function to {}",
        "I need a function to {}",
        "can you write code to {}",
    ),
}


def phrase(question: str, language: Language, random: Random) -> str:
    """Return a question as someone may type it: with or without an introduction and a question mark."""
    if random.random() < 0.3:
        question = random.choice(BEFORE[language]) + question
    return punctuate(question, language, random)


def punctuate(question: str, language: Language, random: Random) -> str:
    """Return a question with or without a capital letter and an ending. Half of them have none of both."""
    if random.random() < 0.45:
        question += random.choice(AFTER[language])
    if random.random() < 0.5:
        question = question[0].upper() + question[1:]
    elif random.random() < 0.1:
        question = question.lower()
    return question


def ask_for_code(description: str, language: Language, random: Random) -> str:
    """Return a question for a function."""
    return random.choice(CODE[language]).format(description)


def format_code(source: Source) -> str:
    """Return a function as an answer."""
    return f"```python\n{source.head}\n{source.body}\n```"


def write_task(description: str, source: Source, calls: Sequence[tuple[str, str]], language: Language) -> str:
    """Return a task in the shape of the published HumanEval prompts; it ends after the line with `def`."""
    examples = "\n".join(f">>> {source.name}({arguments})\n{result}" for arguments, result in calls)
    if language == "zh":
        return (
            f"问题描述：{description}。\n示例：\n{examples}\n完成上述任务要求的Python代码。\n代码如下：\n"
            f"```python\n{source.head}\n"
        )
    return (
        f"Problem: {description[0].upper() + description[1:]}.\nExample:\n{examples}\n"
        f"Complete the Python code for this task.\nThe code:\n```python\n{source.head}\n"
    )
