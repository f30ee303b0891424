"""Whether an answer depends on the company its request keeps: prompts answered alone, and again among 63 others.

Greedy, without prefix caching, so that both are computed in full. Reported are how many answers differ in a token, and
how many in any bit of a log-probability. vLLM computes alike whatever the batch where VLLM_BATCH_INVARIANT=1 is set and
every layer's backend can; an engine that refuses says why. Checkpoints are `random`, `demo` or a folder's path:

    python benchmarks/batch_invariance.py --out invariance.jsonl random 'VLLM_BATCH_INVARIANT=1 random'

On a CPU:

    python benchmarks/batch_invariance.py --out /tmp/invariance.jsonl --hidden 128 --layers 2 --heads 4 --width 256 \\
      --prompts 8 --batch 4 --tokens 8 --engine '{"enforce_eager":true,"kv_cache_memory_bytes":67108864}' random
"""

import argparse
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from answers import Answer, add_options, answer, checkpoint_of, compare, known_tokens, prompts_of, start
from variants import Record, Variant, base_parser, read_job, read_records, run_each


def child() -> None:
    """Answers alone and in company, and compares after every batch, as far as it has come."""
    job = read_job()
    record = Record(Path(job["out"]), variant=job["variant"])
    try:
        llm = start(job["checkpoint"], {"enable_prefix_caching": False, "max_num_seqs": job["batch"]} | job["engine"])
    except BaseException as error:
        record.add(step="start", error=f"{type(error).__name__}: {error}"[:500])
        raise
    alone: list[Answer] = []
    asked, batch, tokens = job["asked"], job["batch"], job["tokens"]

    def answer_alone() -> dict[str, Any]:
        start = time.perf_counter()
        alone.extend(answer(llm, [prompt], tokens)[0] for prompt in asked)
        return {"seconds": round(time.perf_counter() - start, 1)}

    record.attempt("alone", answer_alone)
    if len(alone) < len(asked):
        return
    if job["again"]:
        record.attempt("alone again", lambda: compare(alone, [answer(llm, [prompt], tokens)[0] for prompt in asked]))
    company: list[Answer] = []
    for first in range(0, len(asked), batch):
        company += answer(llm, (asked * 2)[first : first + batch], tokens)  # the last ones are joined by the first
        done = min(len(company), len(asked))
        record.attempt("in company", partial(compare, alone[:done], company[:done]))


def table(records: list[dict[str, Any]]) -> str:
    """Markdown, a row a comparison: of those that went on, the last."""
    records = list({(record["variant"], record["step"]): record for record in records}.values())
    columns = ["variant", "step", "seconds", "answers", "other_tokens", "earliest"]
    columns += ["other_logprobs", "largest_difference"]
    rows = [[str(record.get(column, record.get("error", "–"))) for column in columns] for record in records]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = base_parser(__doc__, "invariance.jsonl", limit=200)
    parser.add_argument("variants", nargs="*", type=Variant.read, metavar="[VAR=VALUE …] CHECKPOINT[:{JSON}]")
    parser.add_argument("--prompts", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="prompts at a time, in company (default: %(default)s)")
    parser.add_argument(
        "--again", action="store_true", help="answer alone twice, to see whether that is always the same"
    )
    parser.add_argument("--longest", type=int, default=300, help="tokens of a prompt, at most (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer (default: %(default)s)")
    add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Compares, one variant after another."""
    arguments = read_arguments()
    if arguments.child:
        return child()
    before = len(read_records(arguments.out)) if arguments.out.exists() else 0
    with TemporaryDirectory() as scratch:
        jobs = []
        for variant in arguments.variants:
            checkpoint = checkpoint_of(variant.model, Path(scratch, "random"), arguments)
            asked = prompts_of(arguments.prompts, arguments.longest, known_tokens(checkpoint))
            job = {"out": str(arguments.out.absolute()), "variant": variant.label, "checkpoint": str(checkpoint)}
            job |= {"asked": asked, "tokens": arguments.tokens, "batch": arguments.batch, "again": arguments.again}
            jobs.append((variant, job | {"engine": arguments.engine | dict(variant.engine)}))
        run_each(Path(__file__).absolute(), jobs, arguments.out.with_suffix(".log"), arguments.limit)
    if arguments.out.exists():
        print(table(read_records(arguments.out)[before:]))


if __name__ == "__main__":
    main()
