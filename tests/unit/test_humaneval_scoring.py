"""Extraction and scoring of a run's samples, without a sandbox."""

from __future__ import annotations

import pytest

from yuan_grpc.humaneval.dataset import Problem, ProblemError
from yuan_grpc.humaneval.records import Record, Run
from yuan_grpc.humaneval.sandbox.runner import Sandbox, Verdict
from yuan_grpc.humaneval.scoring import Sample, build_program, extract_samples, score


def test_a_sample_of_an_unknown_task_is_rejected_before_any_program_runs() -> None:
    with pytest.raises(ProblemError, match="no problem 'x/1'"):
        score([Sample("x/1", "", {})], {}, Sandbox(), workers=1)


def test_equal_programs_run_once() -> None:
    programs: list[str] = []

    class CountingSandbox(Sandbox):
        def run(self, program: str) -> Verdict:
            programs.append(program)
            return Verdict("passed", "passed")

    problem = Problem("a", "f", "def check(f): pass")
    calls: list[None] = []
    samples = [Sample("a", "x", {})] * 5
    scored = score(samples, {"a": problem}, CountingSandbox(), workers=2, on_verdict=lambda: calls.append(None))
    assert (programs, len(calls), scored.counts()) == ([build_program(problem, "x")], 5, {"a": (5, 5)})


def test_samples_are_extracted_in_task_order_with_their_fences() -> None:
    run = Run({}, {"stop_token_ids": [28956]}, 2, 0, {"b": "```python\ndef f():\n", "a": "```python\ndef g():\n"})
    recorded = [Record("a", 1, "    1\n", stop_token_id=28956), Record("a", 0, error={"code": "X", "message": ""})]
    recorded += [Record("b", 1, "    2"), Record("b", 0, "    3\n```", stop_token_id=28956)]
    samples = extract_samples(run, recorded, "plain")
    assert [(sample.task_id, sample.completion) for sample in samples] == [
        ("b", "\ndef f():\n    3\n"),
        ("b", "\ndef f():\n    2"),
        ("a", ""),
        ("a", "\ndef g():\n    1\n"),
    ]
