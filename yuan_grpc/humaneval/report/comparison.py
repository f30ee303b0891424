"""Comparison of a run with the published scores and with another run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from yuan_grpc.humaneval.dataset import ProblemError
from yuan_grpc.humaneval.pass_at_k import PUBLISHED
from yuan_grpc.humaneval.records import hash_prompts
from yuan_grpc.humaneval.report.scored_run import ScoredRun
from yuan_grpc.humaneval.report.statistics import Interval, paired_difference

PUBLISHED_PROMPTS = "cb67e0beb366fab00285a9aab7b4860c051e7759d37f5f3d037cc36358f341c8"
"""SHA-256 of the published prompts, as `hash_prompts` computes it."""
HUMANEVAL = {f"HumanEval/{i}" for i in range(164)}
"""Task IDs of HumanEval."""
VARIANTS = ("Janus", "Februa")
_SIZE = re.compile(r"(?<![\d.])(2|51|102)b(?![a-z0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Comparison:
    """Difference between two runs on the tasks that both have samples of."""

    name: str
    tasks: int
    rate: float
    """Pass rate of the baseline."""
    difference: Interval
    better: tuple[str, ...]
    """Tasks whose pass rate is higher than in the baseline."""
    worse: tuple[str, ...]


def find_published(name: str) -> str | None:
    """Return the published model that a served name such as `yuan2-2B-Janus-hf` refers to, if it names one."""
    if not (size := _SIZE.search(name)):
        return None
    variant = next((variant for variant in VARIANTS if variant.lower() in name.lower()), "")
    model = f"Yuan2.0-{size[1]}B {variant}".strip()
    return model if model in PUBLISHED else None


def is_comparable(scored: ScoredRun) -> bool:
    """Return whether the run has samples of all 164 tasks of HumanEval, and no other tasks."""
    return set(scored.task_rates()) == HUMANEVAL


def has_other_tasks(scored: ScoredRun) -> bool:
    """Return whether the run has tasks that are not HumanEval's."""
    return not set(scored.run.prompts) <= HUMANEVAL


def list_deviations(scored: ScoredRun) -> list[str]:
    """Return how the run deviates from the published evaluation, one sentence each."""
    run, records = scored.run, scored.records
    failed = sum(1 for record in records if record.error)
    truncated = sum(1 for record in records if record.finish_reason == "length")
    deviations = {
        "The tasks are not the 164 of HumanEval, so the published scores do not apply.": not is_comparable(scored),
        "The prompts are not the published ones.": hash_prompts(run.prompts) != PUBLISHED_PROMPTS,
        "Decoding is sampled; the published scores are greedy.": run.seed is not None,
        f"Missing: {len(run.keys) - len(records)} of {len(run.keys)} samples.": len(records) < len(run.keys),
        f"Failed requests, which count as failed samples: {failed} of {len(records)}.": failed > 0,
        f"Cut off at the token limit: {truncated} of {len(records)} samples.": truncated > 0,
        "Programs ran WITHOUT ISOLATION.": not scored.scores["isolated"],
    }
    return [text for text, applies in deviations.items() if applies]


def compare(scored: ScoredRun, baseline: ScoredRun) -> Comparison:
    """Return the difference between two runs with the published extraction.

    Raises:
        ProblemError: the runs have no task in common.
    """
    rates, others = scored.task_rates(), baseline.task_rates()
    tasks = [task_id for task_id in scored.run.prompts if task_id in rates and task_id in others]
    if not tasks:
        raise ProblemError(f"the baseline has no task of this run, whose first task is {next(iter(rates), None)}")
    return Comparison(
        baseline.name,
        len(tasks),
        sum(others[task_id] for task_id in tasks) / len(tasks),
        paired_difference([rates[task_id] for task_id in tasks], [others[task_id] for task_id in tasks]),
        tuple(task_id for task_id in tasks if rates[task_id] > others[task_id]),
        tuple(task_id for task_id in tasks if rates[task_id] < others[task_id]),
    )
