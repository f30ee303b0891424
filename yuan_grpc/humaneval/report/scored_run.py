"""A scored run as the report reads it from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from yuan_grpc.humaneval import scoring
from yuan_grpc.humaneval.dataset import ProblemError, read_rows
from yuan_grpc.humaneval.records import FILE, Record, Run, hash_records, read
from yuan_grpc.humaneval.report.statistics import Interval, pass_rate

HEADLINE = "rules"
"""The extraction of the headline and of the published scores."""


@dataclass(frozen=True)
class ScoredSample:
    """A sample, the program extracted from it, and its verdict."""

    record: Record
    extraction: str
    completion: str
    result: str
    kind: str
    lines: tuple[int, ...]
    """Lines of the program in the exception's traceback, outermost first."""

    @property
    def passed(self) -> bool:
        """Whether the tests passed."""
        return self.result == "passed"


@dataclass(frozen=True)
class ScoredRun:
    """A run with its samples and scores."""

    run: Run
    records: Sequence[Record]
    scores: dict[str, Any]
    samples: Sequence[ScoredSample] = ()
    """Samples of all extractions; empty if they were scored by a version that did not keep enough of the verdicts."""
    tests: Mapping[str, str] = field(default_factory=dict)
    """Tests by task ID."""

    @property
    def extractions(self) -> dict[str, dict[str, Any]]:
        """The scores by name of the extraction."""
        extractions: dict[str, dict[str, Any]] = self.scores["extractions"]
        return extractions

    @cached_property
    def rates(self) -> dict[str, Interval]:
        """The mean pass rate of one sample and its interval, by extraction."""
        return {name: pass_rate(scores["tasks"].values()) for name, scores in self.extractions.items()}

    @property
    def headline(self) -> Interval:
        """The pass rate with the published extraction."""
        return self.rates[HEADLINE]

    @property
    def name(self) -> str:
        """The adapter of the request, or the served model."""
        return str(self.run.request.get("model") or self.run.model.get("name") or "a model without a name")

    def task_rates(self, extraction: str = HEADLINE) -> dict[str, float]:
        """Return the pass rate of each task."""
        return {
            task_id: passed / count
            for task_id, (count, passed) in self.extractions[extraction]["tasks"].items()
            if count
        }


def read_samples(folder: Path) -> tuple[Run, list[Record]]:
    """Return a run and its samples.

    Raises:
        ProblemError: the run has no samples.
        RecordsError: the folder is not a run.
    """
    run, records = read(folder / FILE)
    if not records:
        raise ProblemError(f"{folder} has no samples: run `yuan-grpc humaneval generate {folder}` first")
    return run, records


def load(folder: Path) -> ScoredRun:
    """Read a scored run.

    Raises:
        ProblemError: the run has no samples, is not scored, or has changed since it was scored.
        RecordsError: the folder is not a run.
    """
    run, records = read_samples(folder)
    path = folder / scoring.SCORES
    scores = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if scores.get("samples") != hash_records(records):
        state = "has changed since it was scored" if scores else "is not scored yet"
        raise ProblemError(f"{folder} {state}: run `yuan-grpc humaneval score {folder}` first")
    problems = folder / scoring.PROBLEMS
    if not problems.exists():
        return ScoredRun(run, records, scores)
    tests = {row["task_id"]: row["test"] for _, row in read_rows(problems)}
    samples = [sample for name in scores["extractions"] for sample in _read_verdicts(folder / name, run, records)]
    return ScoredRun(run, records, scores, samples, tests)


def _read_verdicts(folder: Path, run: Run, records: Sequence[Record]) -> list[ScoredSample]:
    results = read_rows(folder / (scoring.SAMPLES + scoring.RESULTS_SUFFIX))
    verdicts = read_rows(folder / scoring.VERDICTS)
    try:
        return [
            ScoredSample(
                record, folder.name, row["completion"], row["result"], verdict["kind"], tuple(verdict["lines"])
            )
            for record, (_, row), (_, verdict) in zip(
                scoring.sort_records(run, records), results, verdicts, strict=True
            )
        ]
    except (KeyError, ValueError) as error:
        raise ProblemError(f"{folder} does not match the samples: run `yuan-grpc humaneval score` again") from error
