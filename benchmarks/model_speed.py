"""Decode and prefill throughput of models in vLLM's offline engine, as a Markdown table.

Models are `yuan`, `llama`, `m32` and `mixtral`, by default with Yuan2.0-2B's sizes. They have dummy weights and no
tokenizer, and optional engine arguments and environment variables. All engines run at once on the same GPU and take
turns: each repetition of each step is timed with one engine after the other while the others wait, so that a temporary
slowdown of the machine affects all of them.

    python benchmarks/model_speed.py --out speed.jsonl llama yuan
    python benchmarks/model_speed.py --out speed.jsonl --cache 6 --decode 1,64 --prefill 1x1024 \\
      yuan 'yuan:{"quantization":"fp8"}' 'yuan:{"linear_backend":"torch"}' 'VLLM_BATCH_INVARIANT=1 yuan'

Each engine has `--cache` GiB for keys and values: 20 is enough for 256 answers of 384 tokens with the 2B shape. Larger
models work the same way, for example Yuan2.0-51B on two GPUs with 80 GB (102B has 84 layers and needs four):

    python benchmarks/model_speed.py --out large.jsonl --hidden 8192 --layers 42 --heads 64 --width 32768 \\
      --positions 2048 --decode 1,32 --tokens 128 --prefill 1x1024,8x1024 --cache 6 --limit 600 \\
      --engine '{"max_num_seqs":32,"max_num_batched_tokens":8192}' 'yuan:{"tensor_parallel_size":2}'

`m32` has the experts and the wider heads of Yuan2.0-M32, and `mixtral` is a Mixtral with the same experts and heads.
All engines share the GPUs, and 24 layers are 75 GiB each, or 38 with fp8:

    python benchmarks/model_speed.py --out m32.jsonl --heads 16 --cache 6 --decode 1,32 --prefill 1x1024,8x1024 \\
      --limit 600 --engine '{"max_num_seqs":32,"quantization":"fp8"}' mixtral m32
    python benchmarks/model_speed.py --out m32.jsonl --heads 16 --layers 8 --cache 4 --decode 1,32 \\
      --prefill 1x1024,8x1024 --limit 600 --engine '{"max_num_seqs":32}' mixtral m32 'm32:{"quantization":"fp8"}'

Decode times per step are the difference between answers of many tokens and of one token, so they exclude the prefill.
Requests are greedy with random prompts, and nothing is detokenized. `cpu_ms` is the CPU time of the engine's processes
per step. On a CPU, use small sizes:

    python benchmarks/model_speed.py --out /tmp/speed.jsonl --hidden 128 --layers 2 --heads 4 --width 256 \\
      --vocabulary 512 --positions 512 --decode 1,4 --prompt 16 --tokens 8 --prefill 2x64 --cache 0.06 \\
      --engine '{"max_num_seqs":4}' llama yuan
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from variants import (
    Child,
    Record,
    add_engine_options,
    base_parser,
    describe,
    jobs_from,
    random_prompts,
    read_records,
    serve,
    start_engine,
    started_children,
)

WARM_TOKENS = 16


@dataclass(frozen=True)
class Step:
    """Workload: a batch of prompts of equal length and the number of tokens to generate for each."""

    batch: int
    length: int
    tokens: int

    @property
    def name(self) -> str:
        """Name in the table's header."""
        return f"decode {self.batch}" if self.tokens > 1 else f"prefill {self.batch}×{self.length}"

    def measure(self, generate: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of one repetition.

        Args:
            generate: generates this number of tokens for each prompt and returns the time it took.
        """
        first = generate(1)
        if self.tokens == 1:
            return {"ms": first["seconds"] * 1e3, "tokens_per_s": self.batch * self.length / first["seconds"]}
        total = generate(self.tokens)
        step, cpu = ((total[name] - first[name]) / (self.tokens - 1) for name in ("seconds", "cpu_seconds"))
        return {
            "ms": step * 1e3,
            "cpu_ms": cpu * 1e3,
            "tokens_per_s": self.batch / step,
            "end_to_end_tokens_per_s": self.batch * self.tokens / total["seconds"],
        }


def start(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """Start an engine and return its description and the function that times it."""
    from vllm import SamplingParams, TokensPrompt

    llm = start_engine(job)
    generator = random.Random(0)
    vocabulary = job["shape"]["vocabulary"]

    def handle(batch: int, length: int, tokens: int) -> dict[str, Any]:
        ids = random_prompts(generator, batch, length, vocabulary)
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in ids]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        cpu, start = engine_cpu_seconds(), time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != tokens for output in outputs):
            raise RuntimeError(f"an answer does not have {tokens} tokens")
        return {"seconds": seconds, "cpu_seconds": engine_cpu_seconds() - cpu}

    return describe(llm), handle


def engine_cpu_seconds() -> float:
    """Return the total CPU time of the engine's processes, or of this one if it runs the engine itself."""
    this_process = psutil.Process()
    cpu_times = [process.cpu_times() for process in this_process.children(recursive=True) or [this_process]]
    return float(sum(times.user + times.system for times in cpu_times))


def generate(child: Child, step: Step, limit: float, tokens: int) -> dict[str, Any]:
    """Let a child generate this number of tokens for each prompt of a step and return the time it took.

    Raises:
        RuntimeError: the child failed.
    """
    reply = child.call(limit, batch=step.batch, length=step.length, tokens=tokens)
    if "error" in reply:
        raise RuntimeError(reply["error"])
    return reply


def take_turns(running: list[Child], steps: Sequence[Step], repeats: int, limit: float, record: Record) -> None:
    """Measure every repetition of every step with all children in turn; skip a child after its first failure."""
    failed: set[Child] = set()
    for step, repeat, child in product(steps, range(repeats + 1), running):
        if child in failed:
            continue
        run = partial(generate, child, step, limit)
        try:
            if not repeat:  # the first batch of this size may compile or capture
                run(min(WARM_TOKENS, step.tokens))
                continue
            fields = {"repeat": repeat} | step.measure(run)
        except RuntimeError as error:
            failed.add(child)
            fields = {"error": str(error)}
            print(f"{child.variant.label} | {step.name} | {error}", flush=True)
        record.add(variant=child.variant.label, step=step.name, **fields)


def table(records: Sequence[dict[str, Any]], baseline: str) -> str:
    """Return a Markdown table of each variant's median speed and its median ratio to the baseline."""
    speeds: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for record in records:
        if "repeat" in record:
            speeds.setdefault((record["variant"], record["step"]), {})[record["repeat"]] = record
    steps = list(dict.fromkeys(step for _, step in speeds))
    lines = [
        "| tokens/s (ratio to the baseline), time per step | " + " | ".join(steps) + " |",
        "| --- " * (len(steps) + 1) + "|",
    ]
    for variant in dict.fromkeys(variant for variant, _ in speeds):
        cells = [_cell(speeds.get((variant, step), {}), speeds.get((baseline, step), {})) for step in steps]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(repeats: dict[int, dict[str, float]], baseline_repeats: dict[int, dict[str, float]]) -> str:
    if not repeats:
        return "–"

    def median(name: str) -> float:
        return statistics.median(repeat[name] for repeat in repeats.values())

    ratios = [
        repeat["tokens_per_s"] / baseline_repeats[number]["tokens_per_s"]
        for number, repeat in repeats.items()
        if number in baseline_repeats
    ]
    cell = f"{median('tokens_per_s'):,.0f}" + (f" ({statistics.median(ratios):.2f})" if ratios else "")
    if "cpu_ms" not in next(iter(repeats.values())):
        return cell
    return f"{cell}, {median('ms'):.2f} ms, cpu {median('cpu_ms'):.2f} ms"


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = base_parser(__doc__, "speed.jsonl", limit=300)
    add_engine_options(parser, decode="1,64,256", prefill="1x1024,64x1024,16x4096")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each step (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="generated tokens for decoding (default: %(default)s)")
    parser.add_argument("--baseline", help="variant with ratio 1 in the table (default: the first)")
    return parser.parse_args()


def main() -> None:
    """Start an engine for each variant, measure them in turns and print a table."""
    arguments = read_arguments()
    if arguments.child:
        return serve(start)
    old_records = len(read_records(arguments.out)) if arguments.out.exists() else 0
    jobs = jobs_from(arguments)
    labels = [variant.label for variant, _ in jobs]
    baseline = arguments.baseline or labels[0]
    if baseline not in labels:
        raise SystemExit(f"--baseline must be one of {', '.join(labels)}, not {baseline}")
    steps = [Step(batch, arguments.prompt, arguments.tokens) for batch in arguments.decode]
    steps += [Step(batch, length, 1) for batch, length in arguments.prefill]
    record = Record(arguments.out)
    with started_children(Path(__file__).absolute(), jobs, record, arguments.limit) as running:
        take_turns(running, steps, arguments.repeats, arguments.limit, record)
    print(table(read_records(arguments.out)[old_records:], baseline))


if __name__ == "__main__":
    main()
