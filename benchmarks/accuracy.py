"""Difference of an engine's log-probabilities from the float32 reference, over more than a thousand greedy tokens.

The engine generates; then the reference (tests/support/reference.py, on the GPU if there is one) computes the
log-probability of each token. The report has quantiles of the absolute difference, and the number of tokens for which
the reference would have chosen another token. Checkpoints are `random`, `demo` or a path, with optional engine
arguments:

    python benchmarks/accuracy.py --out accuracy.jsonl random 'random:{"quantization":"fp8"}' demo

The default dtype is bfloat16. fp8 needs a GPU. Answers are also compared with those of the first variant with the same
checkpoint, which shows the effect of sharding:

    python benchmarks/accuracy.py --out sharding.jsonl random 'random:{"tensor_parallel_size":2}' \\
      'random:{"pipeline_parallel_size":2}' --engine '{"dtype":"float32","attention_backend":"TRITON_ATTN"}'

On a CPU:

    python benchmarks/accuracy.py --out /tmp/accuracy.jsonl --hidden 128 --layers 2 --heads 4 --width 256 --prompts 4 \\
      --tokens 8 --engine '{"enforce_eager":true,"kv_cache_memory_bytes":67108864}' random 'demo:{"dtype":"float32"}'
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from greedy import Answer, add_options, checkpoint_path, compare, generate, seeded_prompts, start, vocabulary_size
from variants import Record, Variant, base_parser, read_job, read_records, run_each

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def child() -> None:
    """Generate with one engine and write the answers to a file."""
    job = read_job()
    llm = start(job["checkpoint"], job["engine"])
    answers = generate(llm, job["prompts"], job["tokens"])
    Path(job["answers"]).write_text(json.dumps([vars(answer) for answer in answers]), encoding="utf-8")


def compare_with_reference(checkpoint: Path, prompts: list[list[int]], answers: list[Answer]) -> dict[str, Any]:
    """Return quantiles of the difference between the answers' log-probabilities and the reference's."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from reference import ReferenceYuan

    reference = ReferenceYuan(checkpoint, vocabulary_size(checkpoint))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference.weights = {name: weight.to(device) for name, weight in reference.weights.items()}
    differences, other_choices = [], 0
    with torch.device(device):
        for prompt, answer in zip(prompts, answers, strict=True):
            logprobs = reference.logprobs(prompt + answer.token_ids)[len(prompt) - 1 : -1]
            chosen = torch.tensor(answer.token_ids)
            expected = logprobs.gather(1, chosen[:, None])[:, 0]
            differences.append((expected - torch.tensor(answer.logprobs)).abs())
            other_choices += int((logprobs.argmax(dim=-1) != chosen).sum())
    values = torch.cat(differences).double()
    quantiles = {name: float(values.quantile(q)) for name, q in QUANTILES.items()}
    return {"tokens": len(values)} | quantiles | {"other_choices": other_choices}


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per variant."""
    columns = ["variant", "tokens", *QUANTILES, "other_choices", "other_than_first", "largest_from_first"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for record in records:
        cells = [record.get(column, "–") for column in columns]
        lines.append(
            "| " + " | ".join(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = base_parser(__doc__, "accuracy.jsonl", limit=200)
    parser.add_argument("variants", nargs="*", type=Variant.parse, metavar="[VAR=VALUE …] CHECKPOINT[:{JSON}]")
    parser.add_argument("--prompts", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--longest", type=int, default=333, help="maximum prompt tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer (default: %(default)s)")
    add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Generate and compare with each variant, then print a table."""
    arguments = read_arguments()
    if arguments.child:
        return child()
    old_records = len(read_records(arguments.out)) if arguments.out.exists() else 0
    first_answers: dict[Path, list[Answer]] = {}
    with TemporaryDirectory() as scratch:
        for number, variant in enumerate(arguments.variants):
            checkpoint = checkpoint_path(variant.model, Path(scratch, "random"), arguments)
            prompts = seeded_prompts(arguments.prompts, arguments.longest, vocabulary_size(checkpoint))
            file = Path(scratch, f"answers-{number}.json")
            job = {"checkpoint": str(checkpoint), "prompts": prompts, "tokens": arguments.tokens, "answers": str(file)}
            job |= {"engine": arguments.engine | dict(variant.engine)}
            log = arguments.out.with_suffix(".log")
            run_each(Path(__file__).absolute(), [(variant, job)], log, arguments.limit)
            record = Record(arguments.out, variant=variant.label)

            def measure(checkpoint: Path = checkpoint, prompts: Any = prompts, file: Path = file) -> dict[str, Any]:
                if not file.exists():
                    raise RuntimeError("the engine returned no answers")
                answers = [Answer(**fields) for fields in json.loads(file.read_text(encoding="utf-8"))]
                result = compare(first_answers.setdefault(checkpoint, answers), answers)
                changes = {
                    "other_than_first": result["other_tokens"],
                    "largest_from_first": result["largest_difference"],
                }
                return compare_with_reference(checkpoint, prompts, answers) | changes

            record.attempt("accuracy", measure)
    print(table(read_records(arguments.out)[old_records:]))


if __name__ == "__main__":
    main()
