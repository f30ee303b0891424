"""Failed samples, grouped by task and by program."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from yuan_grpc.humaneval.report.scored_run import HEADLINE, ScoredRun, ScoredSample

_SYNTAX_ERROR = re.compile(r"\(<string>, line (\d{1,9})\)$")


@dataclass(frozen=True)
class Failure:
    """A program that failed, with all samples of its task from which it was extracted."""

    samples: tuple[ScoredSample, ...]
    extractions: tuple[str, ...]
    """The extractions with which these samples fail; the program is that of the first."""
    expectation: str
    """The statement of the tests that failed; empty if the program did not reach one or ran out of time."""
    line: int | None
    """Line of the program's own code where the exception was raised."""

    @property
    def first(self) -> ScoredSample:
        """The first sample."""
        return self.samples[0]


@dataclass(frozen=True)
class FailedTask:
    """A task with failed samples."""

    task_id: str
    position: int
    """Position of the task in the run."""
    passed: dict[str, tuple[int, int]]
    """The number of samples and of passed samples, by extraction."""
    failures: tuple[Failure, ...]
    """Distinct programs that failed, those of the headline's extraction first, then the most frequent ones."""


def list_failed_tasks(scored: ScoredRun) -> list[FailedTask]:
    """Return the tasks with failed samples, in the order of the run."""
    failed: dict[str, dict[int, list[ScoredSample]]] = {}
    for sample in scored.samples:
        if not sample.passed:
            failed.setdefault(sample.record.task_id, {}).setdefault(sample.record.sample, []).append(sample)
    tasks = []
    for position, task_id in enumerate(scored.run.prompts):
        passed = {name: tuple(scores["tasks"].get(task_id, (0, 0))) for name, scores in scored.extractions.items()}
        if any(count > successes for count, successes in passed.values()):
            failures = _group(failed.get(task_id, {}).values(), scored.tests.get(task_id, ""))
            tasks.append(FailedTask(task_id, position, passed, failures))
    return tasks


def _group(failed: Iterable[list[ScoredSample]], test: str) -> tuple[Failure, ...]:
    """Return the failures of a task, whose failed samples are given with one entry per extraction."""
    programs: dict[tuple[str, ...], list[ScoredSample]] = {}
    for extractions in failed:
        first, names = extractions[0], tuple(sample.extraction for sample in extractions)
        programs.setdefault((first.completion, first.result, *names), []).append(first)
    groups = sorted(programs.items(), key=lambda item: (item[0][2] != HEADLINE, -len(item[1])))
    return tuple(_describe(tuple(samples), names, test) for (_, _, *names), samples in groups)


def _describe(samples: tuple[ScoredSample, ...], extractions: Iterable[str], test: str) -> Failure:
    """Return the failure of equal programs. The program's lines are the completion's, then those of the tests."""
    size = len(split_lines(samples[0].completion))
    test_lines = [line - size for line in samples[0].lines if size < line <= size + len(split_lines(test))]
    code_lines = [line for line in samples[0].lines if line <= size]
    if syntax_error := _SYNTAX_ERROR.search(samples[0].result):
        code_lines = [int(syntax_error[1])]
    expectation = find_statement(test, test_lines[-1]) if test_lines else ""
    return Failure(samples, tuple(extractions), expectation, code_lines[-1] if code_lines else None)


def split_lines(source: str) -> list[str]:
    """Return the lines as Python counts them."""
    return source.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def find_statement(source: str, line: int) -> str:
    """Return the source of the innermost statement at a line, or the line if it is not part of a statement."""
    lines = split_lines(source)
    text = lines[line - 1].strip() if line <= len(lines) else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    nodes = [node for node in nodes if node.lineno <= line <= (node.end_lineno or node.lineno)]
    if not nodes:
        return text
    return ast.get_source_segment(source, max(nodes, key=lambda node: (node.lineno, node.col_offset))) or text
