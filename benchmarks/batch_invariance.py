"""Whether a request's result depends on its batch: prompts are answered alone and again in batches of 64.

Generation is greedy and without prefix caching, so that everything is computed twice. The report counts answers that
differ in a token, and answers that differ in any bit of a log-probability. vLLM's results do not depend on the batch if
VLLM_BATCH_INVARIANT=1 is set and the backends of all layers support it; otherwise the engine reports an error.
Checkpoints are `random`, `demo` or a path:

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

from greedy import Answer, add_options, checkpoint_path, compare, generate, seeded_prompts, start, vocabulary_size
from variants import Record, Variant, base_parser, read_job, read_records, run_each


def child() -> None:
    """Answer all prompts alone and in batches, and compare the answers so far after every batch."""
    job = read_job()
    record = Record(Path(job["out"]), variant=job["variant"])
    try:
        llm = start(job["checkpoint"], {"enable_prefix_caching": False, "max_num_seqs": job["batch"]} | job["engine"])
    except BaseException as error:
        record.add(step="start", error=f"{type(error).__name__}: {error}"[:500])
        raise
    alone: list[Answer] = []
    prompts, batch, tokens = job["prompts"], job["batch"], job["tokens"]

    def generate_alone() -> dict[str, Any]:
        start = time.perf_counter()
        alone.extend(generate(llm, [prompt], tokens)[0] for prompt in prompts)
        return {"seconds": round(time.perf_counter() - start, 1)}

    record.attempt("alone", generate_alone)
    if len(alone) < len(prompts):
        return
    if job["again"]:
        record.attempt(
            "alone again", lambda: compare(alone, [generate(llm, [prompt], tokens)[0] for prompt in prompts])
        )
    batched: list[Answer] = []
    for first in range(0, len(prompts), batch):
        batched += generate(llm, (prompts * 2)[first : first + batch], tokens)  # the first prompts fill the last batch
        done = min(len(batched), len(prompts))
        record.attempt("in batches", partial(compare, alone[:done], batched[:done]))


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per comparison, the last one of each step."""
    records = list({(record["variant"], record["step"]): record for record in records}.values())
    columns = ["variant", "step", "seconds", "answers", "other_tokens", "earliest"]
    columns += ["other_logprobs", "largest_difference"]
    rows = [[str(record.get(column, record.get("error", "–"))) for column in columns] for record in records]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = base_parser(__doc__, "invariance.jsonl", limit=200)
    parser.add_argument("variants", nargs="*", type=Variant.parse, metavar="[VAR=VALUE …] CHECKPOINT[:{JSON}]")
    parser.add_argument("--prompts", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="prompts per batch (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="answer alone twice, to check that this is reproducible")
    parser.add_argument("--longest", type=int, default=300, help="maximum prompt tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per answer (default: %(default)s)")
    add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Run the variants consecutively and print a table."""
    arguments = read_arguments()
    if arguments.child:
        return child()
    old_records = len(read_records(arguments.out)) if arguments.out.exists() else 0
    with TemporaryDirectory() as scratch:
        jobs = []
        for variant in arguments.variants:
            checkpoint = checkpoint_path(variant.model, Path(scratch, "random"), arguments)
            prompts = seeded_prompts(arguments.prompts, arguments.longest, vocabulary_size(checkpoint))
            job = {"out": str(arguments.out.absolute()), "variant": variant.label, "checkpoint": str(checkpoint)}
            job |= {"prompts": prompts, "tokens": arguments.tokens, "batch": arguments.batch, "again": arguments.again}
            jobs.append((variant, job | {"engine": arguments.engine | dict(variant.engine)}))
        run_each(Path(__file__).absolute(), jobs, arguments.out.with_suffix(".log"), arguments.limit)
    if arguments.out.exists():
        print(table(read_records(arguments.out)[old_records:]))


if __name__ == "__main__":
    main()
