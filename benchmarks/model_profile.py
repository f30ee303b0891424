"""Where a step's time goes: GPU time of each kernel, launches, and how long the GPU waits, as compact text.

Decode steps are profiled once a batch of random prompts is past its prefill; prefill steps are whole prompts answered
with one token. Without a profiler the same number of steps is timed before, so that its cost shows.

    python benchmarks/model_profile.py --out profile.jsonl yuan 'yuan:{"quantization":"fp8"}'

The engine runs in one process. On a CPU, the kernels are torch's own operators:

    python benchmarks/model_profile.py --out /tmp/profile.jsonl --hidden 128 --layers 2 --heads 4 --width 256 \\
      --vocabulary 512 --positions 512 --decode 1,4 --prompt 16 --steps 4 --prefill 1x64 --top 5 \\
      --engine '{"max_num_seqs":4,"kv_cache_memory_bytes":67108864}' yuan
"""

import argparse
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from variants import (
    Record,
    Shape,
    Variant,
    base_parser,
    batches_of,
    describe,
    random_prompts,
    read_job,
    run_each,
    start_engine,
)

WARM_STEPS = 8
NAME_LENGTH = 100


@dataclass(frozen=True)
class Kernel:
    """One launch, in microseconds of the profiler's clock."""

    name: str
    start: float
    end: float


class Stepping:
    """An engine in this process, driven step by step."""

    def __init__(self, llm: Any, vocabulary: int) -> None:
        self.engine = llm.llm_engine
        self.vocabulary = vocabulary
        self.generator = random.Random(0)
        self.numbers = count()

    def add(self, batch: int, length: int, tokens: int) -> list[str]:
        """Queues so many random prompts and returns their names."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        names = []
        for ids in random_prompts(self.generator, batch, length, self.vocabulary):
            names.append(f"request-{next(self.numbers)}")
            self.engine.add_request(names[-1], TokensPrompt(prompt_token_ids=ids), sampling)
        return names

    def step(self) -> set[str]:
        """One step; the names of those that got a token."""
        return {answer.request_id for answer in self.engine.step()}

    def steps(self, number: int) -> None:
        """So many steps."""
        for _ in range(number):
            self.step()

    def finish(self) -> None:
        """Steps until nothing is left to do."""
        while self.engine.has_unfinished_requests():
            self.step()

    def prefilled(self, batch: int, length: int, tokens: int) -> None:
        """Queues prompts and steps until each has its first token."""
        waiting = set(self.add(batch, length, tokens))
        while waiting:
            waiting -= self.step()

    def prefill(self, batch: int, length: int, repeats: int) -> None:
        """Answers fresh prompts with one token, again and again."""
        for _ in range(repeats):
            self.add(batch, length, 1)
            self.finish()


def timed(work: Callable[[], None]) -> float:
    """Seconds of wall time, until the GPU is done too."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def profiled(work: Callable[[], None]) -> list[Kernel]:
    """What ran on the GPU meanwhile; on a CPU, the operators that called no others."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        timed(work)
    device = "CUDA" if cuda else "CPU"
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == device and not event.cpu_children and not event.is_user_annotation
    ]


def busy(kernels: Iterable[Kernel]) -> float:
    """Microseconds during which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def summary(kernels: list[Kernel], steps: int, wall: float) -> dict[str, Any]:
    """Microseconds and launches per step, in all and by kernel, the costliest first.

    Args:
        kernels: what was profiled.
        steps: over how many steps.
        wall: seconds that these steps take without a profiler.
    """
    of_name: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        of_name[kernel.name].append(kernel.end - kernel.start)
    span = max((kernel.end for kernel in kernels), default=0.0) - min((kernel.start for kernel in kernels), default=0.0)
    used = busy(kernels)
    table = [
        {"name": name, "us": round(sum(times) / steps, 1), "launches": round(len(times) / steps, 2)}
        for name, times in of_name.items()
    ]
    return {
        "wall_us": round(wall * 1e6 / steps, 1),
        "profiled_us": round(span / steps, 1),
        "kernels_us": round(sum(kernel.end - kernel.start for kernel in kernels) / steps, 1),
        "idle_us": round(wall * 1e6 / steps - used / steps, 1),
        "profiled_idle_us": round((span - used) / steps, 1),
        "launches": round(len(kernels) / steps, 1),
        "steps": steps,
        "table": sorted(table, key=lambda row: -float(row["us"])),
    }


def show(title: str, result: dict[str, Any], top: int) -> str:
    """The summary as text: one line of totals, then a line a kernel."""
    lines = [
        f"## {title}",
        "wall {wall_us} µs a step ({profiled_us} profiled), kernels {kernels_us} µs in {launches} launches, "
        "GPU idle {idle_us} µs ({profiled_idle_us} profiled), over {steps} steps".format(**result),
        "      µs      % launches  µs each  kernel",
    ]
    total = result["kernels_us"] or 1
    for row in result["table"][:top]:
        each = row["us"] / row["launches"]
        lines.append(
            f"{row['us']:8.1f} {100 * row['us'] / total:6.1f} {row['launches']:8.2f} {each:8.1f}  {short(row['name'])}"
        )
    rest = result["table"][top:]
    if rest:
        lines.append(f"{sum(row['us'] for row in rest):8.1f}  in {len(rest)} others")
    return "\n".join(lines)


def short(name: str) -> str:
    """A kernel's name without what template arguments repeat."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    name = re.sub(r"c10::|cutlass::|cute::|std::", "", name)
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def decode(stepping: Stepping, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Profiles decode steps of one batch."""
    stepping.prefilled(batch, length, 3 * steps + 4 * WARM_STEPS)
    stepping.steps(WARM_STEPS)
    wall = timed(partial(stepping.steps, steps))
    kernels = profiled(partial(stepping.steps, steps))
    stepping.finish()
    return summary(kernels, steps, wall)


def prefill(stepping: Stepping, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """Profiles prompts answered with one token; a "step" here is one such batch."""
    stepping.prefill(batch, length, 2)
    wall = timed(partial(stepping.prefill, batch, length, repeats))
    return summary(profiled(partial(stepping.prefill, batch, length, repeats)), repeats, wall)


def child() -> None:
    """Profiles one variant, step by step."""
    job = read_job()
    record = Record(Path(job["out"]), run=job["run"], variant=job["variant"])
    start = time.perf_counter()
    try:
        llm = start_engine(job)
    except BaseException as error:
        record.add(step="start", error=f"{type(error).__name__}: {error}"[:500])
        raise
    record.attempt("start", lambda: {"seconds": round(time.perf_counter() - start, 1)} | describe(llm))
    stepping = Stepping(llm, job["shape"]["vocabulary"])
    steps: dict[str, Callable[[], dict[str, Any]]] = {}
    for batch in job["decode"]:
        steps[f"decode {batch}"] = partial(decode, stepping, batch, job["prompt"], job["steps"])
    for batch, length in job["prefill"]:
        steps[f"prefill {batch}×{length}"] = partial(prefill, stepping, batch, length, job["repeats"])
    for step, measure in steps.items():
        try:
            result = measure()
        except Exception as error:
            record.add(step=step, error=f"{type(error).__name__}: {error}"[:500])
            print(f"{job['variant']} | {step} | {error!r}"[:500], flush=True)
            return  # what is still queued would be profiled with the next step's
        record.add(step=step, **result)
        print(show(f"{job['variant']}, {step}", result, job["top"]), flush=True)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = base_parser(__doc__, "profile.jsonl", limit=300)
    parser.add_argument("variants", nargs="*", type=Variant.read, metavar="[VAR=VALUE …] MODEL[:{JSON}]")
    parser.add_argument("--decode", default="1,256", help="batch sizes (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in, while decoding (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="decode steps profiled (default: %(default)s)")
    parser.add_argument("--prefill", default="1x1024,4x4096", help="prompts x tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="prefills profiled (default: %(default)s)")
    parser.add_argument("--top", type=int, default=40, help="kernels shown (default: %(default)s)")
    Shape.add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Profiles the variants one after another."""
    arguments = read_arguments()
    if arguments.child:
        return child()
    common = {
        "out": str(arguments.out.absolute()),
        "shape": asdict(Shape.of(arguments)),
        "decode": [int(batch) for batch in arguments.decode.split(",") if batch],
        "prefill": batches_of(arguments.prefill),
    } | {name: getattr(arguments, name) for name in ("prompt", "steps", "repeats", "top")}
    jobs = []
    for number, variant in enumerate(arguments.variants, start=1):
        inside = Variant(
            variant.label,
            variant.model,
            variant.engine,
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | dict(variant.environment),
        )
        job = {"run": number, "variant": variant.label, "model": variant.model}
        jobs.append((inside, common | job | {"engine": arguments.engine | dict(variant.engine)}))
    run_each(Path(__file__).absolute(), jobs, arguments.out.with_suffix(".log"), arguments.limit)


if __name__ == "__main__":
    main()
