"""Where a step's time goes: GPU time of each kernel, launches, and how long the GPU waits, as compact text.

Decode steps are profiled once a batch of random prompts is past its prefill; prefill steps are whole prompts answered
with one token. Without a profiler the same number of steps is timed before, so that its cost shows; what the processor
does is profiled too, function by function, which makes their own time longer. Engines are all started at once, each in
one process, and used one after another.

    python benchmarks/model_profile.py --out profile.jsonl yuan 'yuan:{"quantization":"fp8"}'

On a CPU, the kernels are torch's own operators:

    python benchmarks/model_profile.py --out /tmp/profile.jsonl --hidden 128 --layers 2 --heads 4 --width 256 \\
      --vocabulary 512 --positions 512 --decode 1,4 --prompt 16 --steps 4 --prefill 1x64 --top 5 \\
      --cache 0.06 --engine '{"max_num_seqs":4}' yuan
"""

import argparse
import cProfile
import pstats
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from variants import (
    Record,
    add_turns_options,
    base_parser,
    children,
    describe,
    jobs_of,
    random_prompts,
    serve,
    start_engine,
)

WARM_STEPS = 8
FUNCTIONS = 120
NAME_LENGTH = 100
KINDS = {
    "LFA": "shift_add|_plan_kernel|shared_blocks",
    "attention": "flash|attn|attention|reshape_and_cache|_attend|_join|_keep",
    "products": "gemm|nvjet|cutlass|cublas|gemv|splitk|_product|addmm",
    "sampling": "argmax|sample|topk|softmax|logit|gumbel",
    "compiled (norms, rotation, activation)": "^triton_",
    "copies": "memcpy|memset|copy",
}
"""Kinds of kernels, and what of a name tells them, the first that fits."""


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


def kind_of(kernel: str) -> str:
    """What a kernel of that name is for."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), "the rest")


def summary(kernels: list[Kernel], steps: int, wall: float) -> dict[str, Any]:
    """Microseconds and launches per step, in all and by kernel, the costliest first.

    Args:
        kernels: what was profiled.
        steps: over how many steps.
        wall: seconds that these steps take without a profiler.
    """
    of_name: dict[str, list[float]] = defaultdict(list)
    of_kind: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        of_name[kernel.name].append(kernel.end - kernel.start)
        of_kind[kind_of(kernel.name)].append(kernel.end - kernel.start)
    span = max((kernel.end for kernel in kernels), default=0.0) - min((kernel.start for kernel in kernels), default=0.0)
    used = busy(kernels)
    table = [
        {
            "name": name,
            "us": round(sum(times) / steps, 1),
            "launches": round(len(times) / steps, 2),
            "us_each": round(sum(times) / len(times), 1),
        }
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
        "kinds": {kind: round(sum(times) / steps, 1) for kind, times in of_kind.items()},
        "table": sorted(table, key=lambda row: -float(row["us"])),
    }


def show(title: str, result: dict[str, Any], top: int) -> str:
    """The summary as text: one line of totals, then a line a kernel."""
    lines = [
        f"## {title}",
        "wall {wall_us} µs a step ({profiled_us} profiled), kernels {kernels_us} µs in {launches} launches, "
        "GPU idle {idle_us} µs ({profiled_idle_us} profiled), over {steps} steps".format(**result),
        ", ".join(f"{kind} {us} µs" for kind, us in result["kinds"].items()),
        "      µs      % launches  µs each  kernel",
    ]
    total = result["kernels_us"] or 1
    for row in result["table"][:top]:
        share = 100 * row["us"] / total
        lines.append("{us:8.1f} {0:6.1f} {launches:8.2f} {us_each:8.1f}  {1}".format(share, short(row["name"]), **row))
    rest = result["table"][top:]
    if rest:
        lines.append(f"{sum(row['us'] for row in rest):8.1f}  in {len(rest)} others")
    lines.append(f"processor {result['cpu_us']} µs a step; profiled:\n      µs with calls   calls  function")
    lines += ["{us:8.1f} {us_with_calls:10.1f} {calls:7.1f}  {name}".format(**row) for row in result["functions"][:top]]
    return "\n".join(lines)


def short(name: str) -> str:
    """A kernel's name without what template arguments repeat."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    name = re.sub(r"c10::|cutlass::|cute::|std::", "", name)
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def profiled_functions(work: Callable[[], None], steps: int) -> list[dict[str, Any]]:
    """Python functions by their own time, in microseconds a step, and that with what they call."""
    profiler = cProfile.Profile()
    profiler.runcall(work)
    functions: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    table = [
        {
            "name": f"{Path(file).parent.name}/{Path(file).name}:{line} {name}",
            "calls": round(calls / steps, 1),
            "us": round(own * 1e6 / steps, 1),
            "us_with_calls": round(whole * 1e6 / steps, 1),
        }
        for (file, line, name), (_, calls, own, whole, _) in functions.items()
    ]
    return sorted(table, key=lambda row: -float(row["us"]))[:FUNCTIONS]


def examined(work: Callable[[], None], steps: int) -> dict[str, Any]:
    """Times, then profiles, so many steps of the same work; waiting for a GPU may count as the processor's."""
    cpu = time.thread_time()
    wall = timed(work)
    cpu = time.thread_time() - cpu
    result = summary(profiled(work), steps, wall)
    return result | {"cpu_us": round(cpu * 1e6 / steps, 1), "functions": profiled_functions(work, steps)}


def decode(stepping: Stepping, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Profiles decode steps of one batch."""
    stepping.prefilled(batch, length, 4 * steps + 4 * WARM_STEPS)
    stepping.steps(WARM_STEPS)
    result = examined(partial(stepping.steps, steps), steps)
    stepping.finish()
    return result


def prefill(stepping: Stepping, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """Profiles prompts answered with one token; a "step" here is one such batch."""
    stepping.prefill(batch, length, 2)
    return examined(partial(stepping.prefill, batch, length, repeats), repeats)


def start(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """One engine in this process, profiled step by step."""
    llm = start_engine(job)
    stepping = Stepping(llm, job["shape"]["vocabulary"])

    def answer(decoding: bool, batch: int, length: int, steps: int) -> dict[str, Any]:
        return (decode if decoding else prefill)(stepping, batch, length, steps)

    return describe(llm), answer


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = base_parser(__doc__, "profile.jsonl", limit=300)
    add_turns_options(parser, decode="1,256", prefill="1x1024,4x4096")
    parser.add_argument("--steps", type=int, default=50, help="decode steps profiled (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="prefills profiled (default: %(default)s)")
    parser.add_argument("--top", type=int, default=40, help="kernels and functions shown (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Starts an engine for each variant, and profiles one after another."""
    arguments = read_arguments()
    if arguments.child:
        return serve(start)
    jobs = jobs_of(arguments, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    asked = {
        f"decode {batch}": {"decoding": True, "batch": batch, "length": arguments.prompt, "steps": arguments.steps}
        for batch in arguments.decode
    }
    for batch, length in arguments.prefill:
        prompts = {"decoding": False, "batch": batch, "length": length, "steps": arguments.repeats}
        asked[f"prefill {batch}×{length}"] = prompts
    record = Record(arguments.out)
    with children(Path(__file__).absolute(), jobs, record, arguments.limit) as running:
        for child in running:
            for step, question in asked.items():
                result = child.ask(arguments.limit, **question)
                record.add(variant=child.variant.label, step=step, **result)
                if "error" in result:  # what is still queued would be profiled with the next step's
                    print(f"{child.variant.label} | {step} | {result['error']}", flush=True)
                    break
                print(show(f"{child.variant.label}, {step}", result, arguments.top), flush=True)


if __name__ == "__main__":
    main()
