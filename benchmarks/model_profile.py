"""Time of a step by kernel: GPU time, launches and GPU idle time, as compact text.

Decode steps are profiled after the prefill of a batch of random prompts. Prefill steps are whole prompts answered with
one token. Mixed steps decode a batch and compute one such prompt. The same number of steps is timed without a profiler
first, to show its overhead. Python functions are profiled as well, which increases their own time. All engines are
started at once, each in a separate process, and used consecutively.

    python benchmarks/model_profile.py --out profile.jsonl yuan 'yuan:{"quantization":"fp8"}'

On a CPU the kernels are torch's operators:

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
    add_engine_options,
    base_parser,
    describe,
    jobs_from,
    parse_batches,
    random_prompts,
    serve,
    start_engine,
    started_children,
)

WARM_STEPS = 8
MEASUREMENTS = 3
"""Number of times that `measure` runs its work."""
FUNCTIONS = 120
NAME_LENGTH = 100
KINDS = {
    "LFA": "shift_add|_plan_kernel|shared_blocks",
    "attention": "flash|attn|attention|reshape_and_cache|merge_splits|write_kv_cache",
    "products": "gemm|nvjet|cutlass|cublas|gemv|splitk|addmm",
    "sampling": "argmax|sample|topk|softmax|logit|gumbel",
    "compiled (norms, rotation, activation)": "^triton_",
    "copies": "memcpy|memset|copy",
}
"""Kind of kernel -> pattern of its name; the first match counts."""


@dataclass(frozen=True)
class Kernel:
    """Kernel launch, with times in microseconds of the profiler's clock."""

    name: str
    start: float
    end: float


class Stepping:
    """Engine in this process, driven step by step."""

    def __init__(self, llm: Any, vocabulary: int) -> None:
        self.engine = llm.llm_engine
        self.vocabulary = vocabulary
        self.generator = random.Random(0)
        self.numbers = count()

    def add(self, batch: int, length: int, tokens: int) -> list[str]:
        """Queue a batch of random prompts and return their request ids."""
        return [self.add_prompt(ids, tokens) for ids in self.prompts(batch, length)]

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        """Return a batch of random prompts."""
        return random_prompts(self.generator, batch, length, self.vocabulary)

    def add_prompt(self, ids: list[int], tokens: int) -> str:
        """Queue a prompt and return its request id."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        request_id = f"request-{next(self.numbers)}"
        self.engine.add_request(request_id, TokensPrompt(prompt_token_ids=ids), sampling)
        return request_id

    def step(self) -> set[str]:
        """Run a step and return the ids of the requests that got a token."""
        return {output.request_id for output in self.engine.step()}

    def run_steps(self, number: int) -> None:
        """Run this number of steps."""
        for _ in range(number):
            self.step()

    def finish(self) -> None:
        """Run steps until all requests are finished."""
        while self.engine.has_unfinished_requests():
            self.step()

    def add_and_prefill(self, batch: int, length: int, tokens: int) -> None:
        """Queue prompts and run steps until each has its first token."""
        waiting = set(self.add(batch, length, tokens))
        while waiting:
            waiting -= self.step()

    def prefill(self, batch: int, length: int, repeats: int) -> None:
        """Generate one token for new prompts, repeatedly."""
        for _ in range(repeats):
            self.add(batch, length, 1)
            self.finish()

    def run_mixed_steps(self, prompts: list[list[int]]) -> None:
        """Run a step for each prompt, which also decodes all sequences that are running."""
        for ids in prompts:
            self.add_prompt(ids, 1)
            self.step()


def timed(work: Callable[[], None]) -> float:
    """Return the wall time in seconds, including pending work of the GPU."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def profiled(work: Callable[[], None]) -> list[Kernel]:
    """Return the kernels that ran on the GPU; on a CPU, the operators that called no others."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        timed(work)
    device = "CUDA" if cuda else "CPU"
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == device and not event.cpu_children and not event.is_user_annotation
    ]


def busy_time(kernels: Iterable[Kernel]) -> float:
    """Return the microseconds during which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return total


def kind_of(kernel: str) -> str:
    """Return the kind of the kernel with that name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "the rest")


def summary(kernels: list[Kernel], steps: int, wall: float) -> dict[str, Any]:
    """Return microseconds and launches per step, in total and by kernel, the most expensive first.

    Args:
        kernels: profiled kernels.
        steps: number of profiled steps.
        wall: seconds that these steps take without a profiler.
    """
    times_by_name: dict[str, list[float]] = defaultdict(list)
    times_by_kind: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        times_by_name[kernel.name].append(kernel.end - kernel.start)
        times_by_kind[kind_of(kernel.name)].append(kernel.end - kernel.start)
    span = max((kernel.end for kernel in kernels), default=0.0) - min((kernel.start for kernel in kernels), default=0.0)
    busy = busy_time(kernels)
    table = [
        {
            "name": name,
            "us": round(sum(times) / steps, 1),
            "launches": round(len(times) / steps, 2),
            "us_each": round(sum(times) / len(times), 1),
        }
        for name, times in times_by_name.items()
    ]
    return {
        "wall_us": round(wall * 1e6 / steps, 1),
        "profiled_us": round(span / steps, 1),
        "kernels_us": round(sum(kernel.end - kernel.start for kernel in kernels) / steps, 1),
        "idle_us": round(wall * 1e6 / steps - busy / steps, 1),
        "profiled_idle_us": round((span - busy) / steps, 1),
        "launches": round(len(kernels) / steps, 1),
        "steps": steps,
        "kinds": {kind: round(sum(times) / steps, 1) for kind, times in times_by_kind.items()},
        "table": sorted(table, key=lambda row: -float(row["us"])),
    }


def show(title: str, result: dict[str, Any], top: int) -> str:
    """Return the summary as text: a line of totals, then a line per kernel."""
    lines = [
        f"## {title}",
        "wall {wall_us} µs per step ({profiled_us} profiled), kernels {kernels_us} µs in {launches} launches, "
        "GPU idle {idle_us} µs ({profiled_idle_us} profiled), over {steps} steps".format(**result),
        ", ".join(f"{kind} {us} µs" for kind, us in result["kinds"].items()),
        "      µs      % launches  µs each  kernel",
    ]
    total = result["kernels_us"] or 1
    for row in result["table"][:top]:
        share = 100 * row["us"] / total
        lines.append("{us:8.1f} {0:6.1f} {launches:8.2f} {us_each:8.1f}  {1}".format(share, short(row["name"]), **row))
    others = result["table"][top:]
    if others:
        lines.append(f"{sum(row['us'] for row in others):8.1f}  in {len(others)} others")
    lines.append(f"CPU {result['cpu_us']} µs per step; profiled:\n      µs with calls   calls  function")
    lines += ["{us:8.1f} {us_with_calls:10.1f} {calls:7.1f}  {name}".format(**row) for row in result["functions"][:top]]
    return "\n".join(lines)


def short(name: str) -> str:
    """Return a kernel's name without namespaces, truncated."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    name = re.sub(r"c10::|cutlass::|cute::|std::", "", name)
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def profiled_functions(work: Callable[[], None], steps: int) -> list[dict[str, Any]]:
    """Return Python functions by their own time in microseconds per step, with the time including calls."""
    profiler = cProfile.Profile()
    profiler.runcall(work)
    functions: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    table = [
        {
            "name": f"{Path(file).parent.name}/{Path(file).name}:{line} {name}",
            "calls": round(calls / steps, 1),
            "us": round(own_time * 1e6 / steps, 1),
            "us_with_calls": round(total_time * 1e6 / steps, 1),
        }
        for (file, line, name), (_, calls, own_time, total_time, _) in functions.items()
    ]
    return sorted(table, key=lambda row: -float(row["us"]))[:FUNCTIONS]


def measure(work: Callable[[], None], steps: int) -> dict[str, Any]:
    """Time, then profile this number of steps; waiting for the GPU may count as CPU time."""
    cpu = time.thread_time()
    wall = timed(work)
    cpu = time.thread_time() - cpu
    result = summary(profiled(work), steps, wall)
    return result | {"cpu_us": round(cpu * 1e6 / steps, 1), "functions": profiled_functions(work, steps)}


def decode(stepping: Stepping, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Profile decode steps of a batch."""
    stepping.add_and_prefill(batch, length, 4 * steps + 4 * WARM_STEPS)
    stepping.run_steps(WARM_STEPS)
    result = measure(partial(stepping.run_steps, steps), steps)
    stepping.finish()
    return result


def prefill(stepping: Stepping, batch: int, length: int, steps: int) -> dict[str, Any]:
    """Profile prompts answered with one token; a step is one such batch."""
    stepping.prefill(batch, length, 2)
    return measure(partial(stepping.prefill, batch, length, steps), steps)


def mixed(stepping: Stepping, batch: int, length: int, steps: int, prompt: int) -> dict[str, Any]:
    """Profile steps that decode a batch and compute one prompt of `prompt` tokens."""
    stepping.add_and_prefill(batch, length, 4 * steps + 4 * WARM_STEPS)
    stepping.run_mixed_steps(stepping.prompts(WARM_STEPS, prompt))
    prompts = iter([stepping.prompts(steps, prompt) for _ in range(MEASUREMENTS)])
    result = measure(lambda: stepping.run_mixed_steps(next(prompts)), steps)
    stepping.finish()
    return result


PROFILES: dict[str, Callable[..., dict[str, Any]]] = {"decode": decode, "prefill": prefill, "mixed": mixed}


def start(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """Start an engine in this process and return its description and the function that profiles it."""
    llm = start_engine(job)
    stepping = Stepping(llm, job["shape"]["vocabulary"])

    def handle(kind: str, **sizes: int) -> dict[str, Any]:
        return PROFILES[kind](stepping, **sizes)

    return describe(llm), handle


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = base_parser(__doc__, "profile.jsonl", limit=300)
    add_engine_options(parser, decode="1,256", prefill="1x1024,4x4096")
    parser.add_argument(
        "--mixed", type=parse_batches, default="", help="decoding sequences x tokens of the prompt (default: none)"
    )
    parser.add_argument("--steps", type=int, default=50, help="profiled decode steps (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="profiled prefills and mixed steps (default: %(default)s)"
    )
    parser.add_argument("--top", type=int, default=40, help="displayed kernels and functions (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Start an engine for each variant and profile them consecutively."""
    arguments = read_arguments()
    if arguments.child:
        return serve(start)
    jobs = jobs_from(arguments, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    requests: dict[str, dict[str, Any]] = {}
    for batch in arguments.decode:
        sizes = {"batch": batch, "length": arguments.prompt, "steps": arguments.steps}
        requests[f"decode {batch}"] = {"kind": "decode"} | sizes
    for batch, prompt in arguments.mixed:
        sizes = {"batch": batch, "length": arguments.prompt, "steps": arguments.repeats, "prompt": prompt}
        requests[f"decode {batch} with a prompt of {prompt}"] = {"kind": "mixed"} | sizes
    for batch, length in arguments.prefill:
        sizes = {"batch": batch, "length": length, "steps": arguments.repeats}
        requests[f"prefill {batch}×{length}"] = {"kind": "prefill"} | sizes
    record = Record(arguments.out)
    with started_children(Path(__file__).absolute(), jobs, record, arguments.limit) as running:
        for child in running:
            for step, request in requests.items():
                result = child.call(arguments.limit, **request)
                record.add(variant=child.variant.label, step=step, **result)
                if "error" in result:  # requests that are still queued would be profiled in the next step
                    print(f"{child.variant.label} | {step} | {result['error']}", flush=True)
                    break
                print(show(f"{child.variant.label}, {step}", result, arguments.top), flush=True)


if __name__ == "__main__":
    main()
