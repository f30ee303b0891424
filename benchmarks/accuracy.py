"""How far an engine's log-probabilities are from the formulas in float32, over more than a thousand greedy tokens.

The engine generates; then the formulas (tests/reference.py, on the GPU if there is one) give each of its tokens a
log-probability. Reported are quantiles of the absolute difference, and how often the formulas would have chosen another
token. Checkpoints are `random`, `demo` or a folder's path; engine arguments go with them:

    python benchmarks/accuracy.py --out accuracy.jsonl random 'random:{"quantization":"fp8"}' demo

The dtype is bfloat16 unless given. fp8 needs a GPU. Answers are also compared with those of the first variant of the
same checkpoint, so this shows what sharding changes:

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
from answers import Answer, add_options, answer, checkpoint_of, compare, known_tokens, prompts_of, start
from variants import Record, Variant, base_parser, read_job, read_records, run_each

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def child() -> None:
    """Generates with one engine."""
    job = read_job()
    llm = start(job["checkpoint"], job["engine"])
    answers = answer(llm, job["asked"], job["tokens"])
    Path(job["answers"]).write_text(json.dumps([vars(one) for one in answers]), encoding="utf-8")


def against_formulas(checkpoint: Path, asked: list[list[int]], answers: list[Answer]) -> dict[str, Any]:
    """Quantiles of how far the answers' log-probabilities are from the formulas'."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from reference import ReferenceYuan

    reference = ReferenceYuan(checkpoint, known_tokens(checkpoint))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference.weights = {name: weight.to(device) for name, weight in reference.weights.items()}
    differences, others = [], 0
    with torch.device(device):
        for prompt, one in zip(asked, answers, strict=True):
            logprobs = reference.logprobs(prompt + one.token_ids)[len(prompt) - 1 : -1]
            chosen = torch.tensor(one.token_ids)
            scored = logprobs.gather(1, chosen[:, None])[:, 0]
            differences.append((scored - torch.tensor(one.logprobs)).abs())
            others += int((logprobs.argmax(dim=-1) != chosen).sum())
    every = torch.cat(differences).double()
    found = {name: float(every.quantile(at)) for name, at in QUANTILES.items()}
    return {"tokens": len(every)} | found | {"other_choices": others}


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, a row a variant."""
    columns = ["variant", "tokens", *QUANTILES, "other_choices", "other_than_first", "largest_from_first"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for record in records:
        cells = [record.get(column, "–") for column in columns]
        lines.append(
            "| " + " | ".join(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = base_parser(__doc__, "accuracy.jsonl", limit=200)
    parser.add_argument("variants", nargs="*", type=Variant.read, metavar="[VAR=VALUE …] CHECKPOINT[:{JSON}]")
    parser.add_argument("--prompts", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--longest", type=int, default=333, help="tokens of a prompt, at most (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer (default: %(default)s)")
    add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Generates and compares, one variant after another."""
    arguments = read_arguments()
    if arguments.child:
        return child()
    before = len(read_records(arguments.out)) if arguments.out.exists() else 0
    firsts: dict[Path, list[Answer]] = {}
    with TemporaryDirectory() as scratch:
        for number, variant in enumerate(arguments.variants):
            checkpoint = checkpoint_of(variant.model, Path(scratch, "random"), arguments)
            asked = prompts_of(arguments.prompts, arguments.longest, known_tokens(checkpoint))
            file = Path(scratch, f"answers-{number}.json")
            job = {"checkpoint": str(checkpoint), "asked": asked, "tokens": arguments.tokens, "answers": str(file)}
            job |= {"engine": arguments.engine | dict(variant.engine)}
            log = arguments.out.with_suffix(".log")
            run_each(Path(__file__).absolute(), [(variant, job)], log, arguments.limit)
            record = Record(arguments.out, variant=variant.label)

            def measure(checkpoint: Path = checkpoint, asked: Any = asked, file: Path = file) -> dict[str, Any]:
                if not file.exists():
                    raise RuntimeError("the engine gave no answers")
                answers = [Answer(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
                found = compare(firsts.setdefault(checkpoint, answers), answers)
                same = {"other_than_first": found["other_tokens"], "largest_from_first": found["largest_difference"]}
                return against_formulas(checkpoint, asked, answers) | same

            record.attempt("accuracy", measure)
    print(table(read_records(arguments.out)[before:]))


if __name__ == "__main__":
    main()
