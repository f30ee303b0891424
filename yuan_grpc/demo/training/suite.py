"""Twenty tasks in HumanEval's format, described in held-out wordings, with tests: `clients/humaneval/demo.jsonl`."""

import json
from collections import Counter
from pathlib import Path
from random import Random

from yuan_grpc.demo.training.facts import LANGUAGES
from yuan_grpc.demo.training.functions import Function, read_functions
from yuan_grpc.demo.training.prompts import write_task

TASKS, ASSERTIONS, CANDIDATES = 20, 6, 60
SEED = 20


def make_tasks() -> list[dict[str, str]]:
    """Return the tasks, half of them in each language."""
    random = Random(SEED)
    functions = random.sample(read_functions(), TASKS)
    return [_make_task(index, function, random) for index, function in enumerate(functions)]


def _make_task(index: int, function: Function, random: Random) -> dict[str, str]:
    language, source = LANGUAGES[index % len(LANGUAGES)], function.write()
    example, *calls = _pick_calls(function, random)
    assertions = [f"    assert candidate({arguments}) == {result}\n" for arguments, result in calls]
    return {
        "task_id": f"Demo/{index}",
        "prompt": write_task(function.held_out[language][0], source, [example], language),
        "entry_point": source.name,
        "canonical_solution": f"{source.body}\n",
        "test": f"def check(candidate):\n{''.join(assertions)}",
    }


def _pick_calls(function: Function, random: Random) -> list[tuple[str, str]]:
    """Return calls with different results as far as possible, so that no constant function passes."""
    calls = dict(function.call(random) for _ in range(CANDIDATES))
    seen: Counter[str] = Counter()
    ranked = []
    for call, result in calls.items():
        ranked.append((seen[result], call, result))
        seen[result] += 1
    return [(call, result) for _, call, result in sorted(ranked, key=lambda one: one[0])[: 1 + ASSERTIONS]]


def write(file: Path) -> None:
    """Write the tasks as JSON lines."""
    lines = [json.dumps(task, ensure_ascii=False) + "\n" for task in make_tasks()]
    file.write_text("".join(lines), "utf-8")
