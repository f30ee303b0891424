"""`yuan-grpc bench`: throughput and latency of a server under load."""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yuan_grpc.cli import bench_compare, bench_report, bench_table
from yuan_grpc.cli.arrivals import Arrivals
from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common import connection, request_fields
from yuan_grpc.cli.common.errors import EXIT_FAILURE, EXIT_INTERRUPTED, UsageError, handle_errors
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.signals import InterruptibleLoop
from yuan_grpc.cli.common.terminal import print_error
from yuan_grpc.cli.load_generator import (
    METRICS,
    Level,
    Measurement,
    TimingInterceptor,
    Workload,
    measure,
    run_request,
)
from yuan_grpc.client import AsyncClient, Model
from yuan_grpc.client.errors import broken_response_error

MAX_TOKENS = 64
PROMPT_TOKENS = 128
SECONDS = 10.0
LEVELS = (1, 8, 64)
TABLE_METRICS = ("ttft", "itl")

EPILOG = """\
With --concurrency, a request starts whenever another has ended. With
--request-rate or a ramp, requests arrive at a rate, however many are running.

TTFT is the time from a call to its first token, E2EL that of the whole call.
ITL is the time between tokens, TPOT its mean over a request. The server merges
tokens for a slow reader: a message of k tokens counts as k gaps, each 1/k of
the time since the previous message.

One warm-up request is not counted. A level ends when all its requests have
ended, and its rates are over that time. Requests ignore the end-of-text token,
so each generates --max-tokens. A refused request is retried up to --retries
times, then counted as an error.
"""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help=SUMMARIES["bench"],
        description="Stream completions of random prompts; print throughput and latency.\n"
        "`bench compare A.json B.json` compares two runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_load_options(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--requests", type=_positive_int, metavar="N", help="requests per level, instead of --seconds")
    length.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"duration of a level (default: {SECONDS:g})"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=_positive_int,
        default=PROMPT_TOKENS,
        metavar="N",
        help=f"tokens per prompt (default: {PROMPT_TOKENS})",
    )
    parser.add_argument(
        "--shared-prefix", type=int, default=0, metavar="N", help="leading tokens all prompts share (default: 0)"
    )
    parser.add_argument("--prompt-seed", type=int, metavar="N", help="seed of the random prompts (default: random)")
    _add_result_options(parser)
    bench_compare.add_command(parser)
    request_fields.add_options(parser, MAX_TOKENS)
    connection.add_options(parser)
    parser.set_defaults(run=handle_errors(_run))


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load", "The options from --request-rate on are those of `vllm bench serve`.")
    group.add_argument("--concurrency", type=_parse_levels, metavar="N,N", help="concurrency levels (default: 1,8,64)")
    group.add_argument("--request-rate", type=_parse_rates, metavar="R,R", help="levels of requests per second")
    group.add_argument(
        "--burstiness",
        type=_positive_float,
        default=1.0,
        metavar="X",
        help="1: Poisson arrivals (default); less: burstier; inf: regular",
    )
    group.add_argument("--max-concurrency", type=_positive_int, metavar="N", help="limit of requests at a rate")
    group.add_argument("--ramp-up-strategy", choices=("linear", "exponential"), help="let the rate grow in one level")
    group.add_argument("--ramp-up-start-rps", type=_parse_finite, metavar="R", help="rate at its start")
    group.add_argument("--ramp-up-end-rps", type=_parse_finite, metavar="R", help="rate at its end")


def _add_result_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    group.add_argument(
        "-o",
        "--output",
        action="append",
        default=[],
        type=_parse_output,
        metavar="FILE",
        help="also write a .json, .csv or .html file; repeatable",
    )
    group.add_argument(
        "--percentile-metrics",
        type=_parse_metrics,
        default=TABLE_METRICS,
        metavar="M,M",
        help=f"metrics of the table: {', '.join(METRICS)} (default: {','.join(TABLE_METRICS)})",
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        type=_parse_target,
        default=[],
        metavar="METRIC:MS",
        help="count requests within targets, as ttft:500 e2el:2000",
    )


@dataclass
class _Run:
    """A run in progress: what to measure, and the results so far."""

    options: argparse.Namespace
    levels: list[Level]
    measurements: list[Measurement]
    model: Model | None = None

    @property
    def has_table(self) -> bool:
        return not self.options.json

    def document(self) -> bench_report.Document:
        assert self.model
        return bench_report.to_document(self.options, self.model, self.measurements)


def _run(options: argparse.Namespace) -> int:
    if not 0 <= options.shared_prefix <= options.prompt_tokens:
        raise UsageError(f"--shared-prefix must be between 0 and --prompt-tokens, not {options.shared_prefix}")
    if not options.seconds > 0:
        raise UsageError(f"--seconds must be above 0, not {options.seconds}")
    for path in options.output:
        if not path.parent.is_dir():
            raise UsageError(f"the folder of {path} must exist")
    if options.prompt_seed is None:
        options.prompt_seed = random.randrange(2**32)
    run = _Run(options, _build_levels(options), [])
    try:
        with InterruptibleLoop() as loop:
            loop.run(_run_levels(run))
    except KeyboardInterrupt:
        print_error(f"cancelled: {len(run.measurements)} of {len(run.levels)} levels completed")
        return EXIT_INTERRUPTED
    finally:
        if run.measurements:
            bench_report.write(run.document(), options.output, to_stdout=options.json)
    return EXIT_FAILURE if any(level.errors for level in run.measurements) else 0


def _build_levels(options: argparse.Namespace) -> list[Level]:
    ramp = [options.ramp_up_strategy, options.ramp_up_start_rps, options.ramp_up_end_rps]
    loads = [options.concurrency, options.request_rate, any(ramp)]
    if sum(map(bool, loads)) > 1:
        raise UsageError("--concurrency, --request-rate and --ramp-up-strategy are mutually exclusive")
    if any(ramp) and not all(ramp):
        raise UsageError("--ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps must be set together")
    if any(ramp):
        return [_build_ramp(options)]
    if options.request_rate:
        return [_build_rate(options, rate) for rate in options.request_rate]
    return [Level(str(concurrency), concurrency) for concurrency in options.concurrency or LEVELS]


def _build_rate(options: argparse.Namespace, rate: float) -> Level:
    label = f"{rate:g}"
    return Level(label, options.max_concurrency, Arrivals(rate, rate, _seed(options, label), options.burstiness))


def _build_ramp(options: argparse.Namespace) -> Level:
    start, end = options.ramp_up_start_rps, options.ramp_up_end_rps
    label, exponential = f"{start:g}-{end:g}", options.ramp_up_strategy == "exponential"
    arrivals = Arrivals(start, end, _seed(options, label), options.burstiness, exponential)
    return Level(label, options.max_concurrency, arrivals)


def _seed(options: argparse.Namespace, label: str) -> str:
    return f"{options.prompt_seed}/arrivals/{label}"


async def _run_levels(run: _Run) -> None:
    """Measure all levels. Append results to the run, so that cancellation keeps them."""
    interceptor, options = TimingInterceptor(), run.options
    async with connection.connect(options, interceptor) as client:
        run.model = await client.model()
        workload = _build_workload(options, run.model)
        if run.has_table:
            bench_table.print_header(options, run.model, workload)
        with Progress("warm-up request"):
            await run_request(client, interceptor, next(workload.requests("warm-up")))
        for level in run.levels:
            run.measurements.append(await _run_level(options, client, interceptor, workload, level))
            if run.has_table:
                print(bench_table.format_level(run.measurements[-1], options), flush=True)


async def _run_level(
    options: argparse.Namespace,
    client: AsyncClient,
    interceptor: TimingInterceptor,
    workload: Workload,
    level: Level,
) -> Measurement:
    name = f"concurrency {level.label}" if level.arrivals is None else f"{level.label} requests/s"
    with Progress(name, options.requests, " requests") as progress:
        return await measure(
            client,
            interceptor,
            workload.requests(name),
            level,
            limit=options.requests,
            seconds=options.seconds,
            on_request_end=progress.advance,
        )


def _build_workload(options: argparse.Namespace, model: Model) -> Workload:
    fields = {"ignore_eos": True} | request_fields.from_options(options)
    for name in (*request_fields.PROMPT_FIELDS, "request_id"):
        if name in fields:
            raise UsageError(f"`{name}` cannot be set: bench generates it")
    template = request_fields.build_partial_request(fields)
    if model.sizes.tokens < 1:
        raise broken_response_error("gives the model a vocabulary of 0 tokens", "")
    tokens, limit = options.prompt_tokens + template.max_tokens, model.limits.max_model_len
    if tokens > limit:
        raise UsageError(f"--prompt-tokens plus --max-tokens must be at most {limit}, not {tokens}")
    return Workload(template, options.prompt_tokens, options.shared_prefix, options.prompt_seed, model.sizes.tokens)


def _parse_levels(text: str) -> tuple[int, ...]:
    return tuple(_positive_int(part) for part in text.split(","))


def _positive_int(text: str) -> int:
    if text.strip().isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be an integer above 0, not {text!r}")


def _parse_rates(text: str) -> tuple[float, ...]:
    return tuple(_parse_finite(part) for part in text.split(","))


def _parse_finite(text: str) -> float:
    if math.isinf(value := _positive_float(text)):
        raise argparse.ArgumentTypeError(f"must be finite, not {text!r}")
    return value


def _positive_float(text: str) -> float:
    try:
        if (value := float(text)) > 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")


def _parse_metrics(text: str) -> tuple[str, ...]:
    return tuple(_parse_metric(part) for part in text.split(","))


def _parse_metric(text: str) -> str:
    if text not in METRICS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(METRICS)}, not {text!r}")
    return text


def _parse_target(text: str) -> tuple[str, float]:
    metric, _, target = text.partition(":")
    return _parse_metric(metric), _parse_finite(target)


def _parse_output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in bench_report.WRITERS:
        raise argparse.ArgumentTypeError(f"must end with {', '.join(bench_report.WRITERS)}, not {text!r}")
    return path
