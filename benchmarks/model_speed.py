"""Decode and prefill throughput of models through vLLM's offline engine, side by side, as a Markdown table.

Models are `yuan` and `llama`, both of Yuan2.0-2B's shape with dummy weights and no tokenizer; engine arguments and
environment variables go with the name. All engines run at once on the same GPU and take turns: each repeat of each step
is timed with one after the other while the rest wait, so that what slows a machine down for a while slows them all.

    python benchmarks/model_speed.py --out speed.jsonl llama yuan
    python benchmarks/model_speed.py --out speed.jsonl --cache 6 --decode 1,64 --prefill 1x1024 \\
      yuan 'yuan:{"quantization":"fp8"}' 'yuan:{"linear_backend":"torch"}' 'VLLM_BATCH_INVARIANT=1 yuan'

Memory for keys and values is `--cache` GiB for each: 20 is enough for 256 answers of 384 tokens at the 2B shape. Larger
models go the same way, as Yuan2.0-51B on two GPUs of 80 GB (102B has 84 layers, and takes four):

    python benchmarks/model_speed.py --out large.jsonl --hidden 8192 --layers 42 --heads 64 --width 32768 \\
      --positions 2048 --decode 1,32 --tokens 128 --prefill 1x1024,8x1024 --cache 6 --limit 600 \\
      --engine '{"max_num_seqs":32,"max_num_batched_tokens":8192}' 'yuan:{"tensor_parallel_size":2}'

Decode milliseconds per step come from the difference between answers of many tokens and of one, so they hold no
prefill; requests are greedy, on random prompts, and nothing is detokenized. `cpu_ms` is the processor time that the
engine's processes take for a step. On a CPU, sizes and engine are made small:

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
    add_turns_options,
    base_parser,
    children,
    describe,
    jobs_of,
    random_prompts,
    read_records,
    serve,
    start_engine,
)

WARM_TOKENS = 16


@dataclass(frozen=True)
class Step:
    """What is measured: so many prompts of so many tokens, answered with so many."""

    batch: int
    length: int
    tokens: int

    @property
    def name(self) -> str:
        """As in the table's head."""
        return f"decode {self.batch}" if self.tokens > 1 else f"prefill {self.batch}×{self.length}"

    def measure(self, ask: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """One repeat.

        Args:
            ask: answers the prompts with so many tokens each, and says what that took.
        """
        first = ask(1)
        if self.tokens == 1:
            return {"ms": first["seconds"] * 1e3, "tokens_per_s": self.batch * self.length / first["seconds"]}
        whole = ask(self.tokens)
        step, cpu = ((whole[taken] - first[taken]) / (self.tokens - 1) for taken in ("seconds", "cpu_seconds"))
        return {
            "ms": step * 1e3,
            "cpu_ms": cpu * 1e3,
            "tokens_per_s": self.batch / step,
            "end_to_end_tokens_per_s": self.batch * self.tokens / whole["seconds"],
        }


def start(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """One engine, and the clock around it."""
    from vllm import SamplingParams, TokensPrompt

    llm = start_engine(job)
    generator = random.Random(0)
    vocabulary = job["shape"]["vocabulary"]

    def answer(batch: int, length: int, tokens: int) -> dict[str, Any]:
        ids = random_prompts(generator, batch, length, vocabulary)
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in ids]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        cpu, start = engine_seconds(), time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - start
        if any(len(answer.outputs[0].token_ids) != tokens for answer in answers):
            raise RuntimeError("an answer has not as many tokens as were asked for")
        return {"seconds": taken, "cpu_seconds": engine_seconds() - cpu}

    return describe(llm), answer


def engine_seconds() -> float:
    """Processor time of the engine's processes so far; of this one, where it runs the engine itself."""
    here = psutil.Process()
    taken = [process.cpu_times() for process in here.children(recursive=True) or [here]]
    return float(sum(times.user + times.system for times in taken))


def asked(child: Child, step: Step, limit: float, tokens: int) -> dict[str, Any]:
    """What answering a step's prompts with so many tokens each took a child. Raises RuntimeError where it failed."""
    said = child.ask(limit, batch=step.batch, length=step.length, tokens=tokens)
    if "error" in said:
        raise RuntimeError(said["error"])
    return said


def take_turns(running: list[Child], steps: Sequence[Step], repeats: int, limit: float, record: Record) -> None:
    """Measures step after step, repeat after repeat, one child after the other; a child that fails is left out."""
    failed: set[Child] = set()
    for step, repeat, child in product(steps, range(repeats + 1), running):
        if child in failed:
            continue
        ask = partial(asked, child, step, limit)
        try:
            if not repeat:  # what a first batch of this size compiles or captures
                ask(min(WARM_TOKENS, step.tokens))
                continue
            fields = {"repeat": repeat} | step.measure(ask)
        except RuntimeError as error:
            failed.add(child)
            fields = {"error": str(error)}
            print(f"{child.variant.label} | {step.name} | {error}", flush=True)
        record.add(variant=child.variant.label, step=step.name, **fields)


def table(records: Sequence[dict[str, Any]], baseline: str) -> str:
    """Markdown: each variant's median speed, and the median over repeats of its ratio to the baseline's."""
    speeds: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for record in records:
        if "repeat" in record:
            speeds.setdefault((record["variant"], record["step"]), {})[record["repeat"]] = record
    steps = list(dict.fromkeys(step for _, step in speeds))
    lines = ["| tokens/s (of the baseline's), a step | " + " | ".join(steps) + " |", "| --- " * (len(steps) + 1) + "|"]
    for variant in dict.fromkeys(variant for variant, _ in speeds):
        cells = [_cell(speeds.get((variant, step), {}), speeds.get((baseline, step), {})) for step in steps]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(ours: dict[int, dict[str, float]], theirs: dict[int, dict[str, float]]) -> str:
    if not ours:
        return "–"

    def median(name: str) -> float:
        return statistics.median(repeat[name] for repeat in ours.values())

    ratios = [ours[repeat]["tokens_per_s"] / theirs[repeat]["tokens_per_s"] for repeat in ours if repeat in theirs]
    cell = f"{median('tokens_per_s'):,.0f}" + (f" ({statistics.median(ratios):.2f})" if ratios else "")
    if "cpu_ms" not in next(iter(ours.values())):
        return cell
    return f"{cell}, {median('ms'):.2f} ms, cpu {median('cpu_ms'):.2f} ms"


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = base_parser(__doc__, "speed.jsonl", limit=300)
    add_turns_options(parser, decode="1,64,256", prefill="1x1024,64x1024,16x4096")
    parser.add_argument("--repeats", type=int, default=5, help="how often each step is timed (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens out, while decoding (default: %(default)s)")
    parser.add_argument("--baseline", help="the variant that is 1 in the table (default: the first)")
    return parser.parse_args()


def main() -> None:
    """Starts an engine for each variant, has them take turns, then prints the table."""
    arguments = read_arguments()
    if arguments.child:
        return serve(start)
    before = len(read_records(arguments.out)) if arguments.out.exists() else 0
    jobs = jobs_of(arguments)
    labels = [variant.label for variant, _ in jobs]
    baseline = arguments.baseline or labels[0]
    if baseline not in labels:
        raise SystemExit(f"--baseline must be one of {', '.join(labels)}, not {baseline}")
    steps = [Step(batch, arguments.prompt, arguments.tokens) for batch in arguments.decode]
    steps += [Step(batch, length, 1) for batch, length in arguments.prefill]
    record = Record(arguments.out)
    with children(Path(__file__).absolute(), jobs, record, arguments.limit) as running:
        take_turns(running, steps, arguments.repeats, arguments.limit, record)
    print(table(read_records(arguments.out)[before:], baseline))


if __name__ == "__main__":
    main()
