"""Decode and prefill throughput of models through vLLM's offline engine, side by side, as a Markdown table.

Models are `yuan` and `llama`, both of Yuan2.0-2B's shape with dummy weights and no tokenizer. Name them in the order
they are to run, each as often as it is to run; engine arguments and environment variables go with the name:

    python benchmarks/model_speed.py --out speed.jsonl llama yuan 'yuan:{"quantization":"fp8"}' \\
      'VLLM_BATCH_INVARIANT=1 yuan' yuan llama

Larger ones go the same way, as Yuan2.0-51B on two GPUs (102B has 84 layers, and takes four):

    python benchmarks/model_speed.py --out large.jsonl --hidden 8192 --layers 42 --heads 64 --width 32768 \\
      --positions 4096 --prefill 1x1024,64x1024,16x2048 --limit 600 'yuan:{"tensor_parallel_size":2}'

Decode tokens per second come from the difference between answers of many tokens and of one, so they hold no prefill;
requests are greedy, on random prompts, and nothing is detokenized. On a CPU, sizes and engine are made small:

    python benchmarks/model_speed.py --out /tmp/speed.jsonl --hidden 128 --layers 2 --heads 4 --width 256 \\
      --vocabulary 512 --positions 512 --decode 1,4 --prompt 16 --tokens 8 --prefill 2x64 \\
      --engine '{"max_num_seqs":4,"kv_cache_memory_bytes":67108864}' llama yuan
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from variants import (
    Record,
    Shape,
    Variant,
    base_parser,
    batches_of,
    describe,
    random_prompts,
    read_job,
    read_records,
    run_each,
    start_engine,
)


class Measuring:
    """One engine and the clock around it."""

    def __init__(self, llm: Any, vocabulary: int) -> None:
        self.llm = llm
        self.vocabulary = vocabulary
        self.generator = random.Random(0)

    def seconds(self, batch: int, length: int, tokens: int) -> float:
        """How long so many fresh prompts of so many ids take to be answered with so many tokens each."""
        from vllm import SamplingParams, TokensPrompt

        ids = random_prompts(self.generator, batch, length, self.vocabulary)
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in ids]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        answers = self.llm.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - start
        if any(len(answer.outputs[0].token_ids) != tokens for answer in answers):
            raise RuntimeError("an answer has not as many tokens as were asked for")
        return taken

    def decode(self, batch: int, length: int, tokens: int, repeats: int) -> dict[str, Any]:
        """Tokens per second while decoding, end to end, and milliseconds per step; the median and all repeats."""
        self.seconds(batch, length, min(tokens, 16))  # what a first batch of this size compiles or captures
        first = [self.seconds(batch, length, 1) for _ in range(max(repeats, 3))]
        whole = [self.seconds(batch, length, tokens) for _ in range(repeats)]
        steps = [(taken - statistics.median(first)) / (tokens - 1) for taken in whole]
        step = statistics.median(steps)
        return {
            "tokens_per_s": round(batch / step, 1),
            "ms_per_step": round(step * 1e3, 3),
            "end_to_end_tokens_per_s": round(batch * tokens / statistics.median(whole), 1),
            "all_ms_per_step": [round(value * 1e3, 3) for value in steps],
        }

    def prefill(self, batch: int, length: int, repeats: int) -> dict[str, Any]:
        """Prompt tokens per second until all have their first token; the median and all repeats."""
        self.seconds(batch, length, 1)
        taken = [self.seconds(batch, length, 1) for _ in range(repeats)]
        median = statistics.median(taken)
        return {
            "tokens_per_s": round(batch * length / median, 1),
            "ms": round(median * 1e3, 2),
            "all_ms": [round(value * 1e3, 2) for value in taken],
        }


def child() -> None:
    """Measures one variant, step by step."""
    job = read_job()
    record = Record(Path(job["out"]), run=job["run"], variant=job["variant"])
    start = time.perf_counter()
    try:
        llm = start_engine(job)
    except BaseException as error:
        record.add(step="start", error=f"{type(error).__name__}: {error}"[:500])
        raise
    record.attempt("start", lambda: {"seconds": round(time.perf_counter() - start, 1)} | describe(llm))
    measuring = Measuring(llm, job["shape"]["vocabulary"])
    repeats = job["repeats"]
    steps: dict[str, Callable[[], dict[str, Any]]] = {}
    for batch in job["decode"]:
        steps[f"decode {batch}"] = partial(measuring.decode, batch, job["prompt"], job["tokens"], repeats)
    for batch, length in job["prefill"]:
        steps[f"prefill {batch}×{length}"] = partial(measuring.prefill, batch, length, repeats)
    for step, measure in steps.items():
        if not record.attempt(step, measure):
            return


def table(records: Sequence[dict[str, Any]], baseline: str) -> str:
    """Markdown: a row for each run and for each variant that ran more than once; ratios to the baseline's mean."""
    measured = [record for record in records if record["step"] != "start" and "run" in record]
    steps = list(dict.fromkeys(record["step"] for record in measured))
    runs: dict[tuple[int, str], dict[str, float]] = {}
    for record in measured:
        runs.setdefault((record["run"], record["variant"]), {})[record["step"]] = record.get("tokens_per_s", 0.0)
    rows = [(f"{number}. {variant}", speeds) for (number, variant), speeds in runs.items()]
    of_variant: dict[str, list[dict[str, float]]] = {}
    for (_, variant), speeds in runs.items():
        of_variant.setdefault(variant, []).append(speeds)
    means = {variant: _means(all_speeds, steps) for variant, all_speeds in of_variant.items()}
    rows += [(f"mean of {variant}", means[variant]) for variant, speeds in of_variant.items() if len(speeds) > 1]
    unit = means.get(baseline, {})
    lines = ["| tokens/s | " + " | ".join(steps) + " |", "| --- " * (len(steps) + 1) + "|"]
    for name, speeds in rows:
        cells = [_cell(speeds.get(step), unit.get(step)) for step in steps]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _means(all_speeds: list[dict[str, float]], steps: list[str]) -> dict[str, float]:
    known = {step: [speeds[step] for speeds in all_speeds if speeds.get(step)] for step in steps}
    return {step: statistics.mean(values) for step, values in known.items() if values}


def _cell(speed: float | None, unit: float | None) -> str:
    if not speed:
        return "–"
    return f"{speed:,.0f}" + (f" ({speed / unit:.2f})" if unit else "")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = base_parser(__doc__, "speed.jsonl", limit=300)
    parser.add_argument("variants", nargs="*", type=Variant.read, metavar="[VAR=VALUE …] MODEL[:{JSON}]")
    parser.add_argument("--quick", action="store_true", help="three repeats instead of seven: under a minute a model")
    parser.add_argument("--repeats", type=int, help="how often each step is timed; the median counts")
    parser.add_argument("--decode", default="1,64,256", help="batch sizes (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in, while decoding (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens out, while decoding (default: %(default)s)")
    parser.add_argument("--prefill", default="1x1024,64x1024,16x4096", help="prompts x tokens (default: %(default)s)")
    parser.add_argument("--baseline", default="llama", help="whose mean is 1 in the table (default: %(default)s)")
    Shape.add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Runs the variants in the order they were named, then prints the table."""
    arguments = read_arguments()
    if arguments.child:
        return child()
    common = {
        "out": str(arguments.out.absolute()),
        "shape": asdict(Shape.of(arguments)),
        "decode": [int(batch) for batch in arguments.decode.split(",") if batch],
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "prefill": batches_of(arguments.prefill),
        "repeats": arguments.repeats or (3 if arguments.quick else 7),
    }
    before = len(read_records(arguments.out)) if arguments.out.exists() else 0
    jobs = [
        (
            variant,
            common
            | {"run": number, "variant": variant.label, "model": variant.model}
            | {"engine": arguments.engine | dict(variant.engine)},
        )
        for number, variant in enumerate(arguments.variants, start=1)
    ]
    run_each(Path(__file__).absolute(), jobs, arguments.out.with_suffix(".log"), arguments.limit)
    if arguments.out.exists():
        print(table(read_records(arguments.out)[before:], arguments.baseline))


if __name__ == "__main__":
    main()
