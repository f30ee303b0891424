"""`yuan-grpc bench`: throughput and latency of a server under load."""

from __future__ import annotations

import argparse
import json
import random
import sys
from typing import Any

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common import connection, request_fields
from yuan_grpc.cli.common.errors import EXIT_FAILURE, EXIT_INTERRUPTED, UsageError, handle_errors
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.signals import InterruptibleLoop
from yuan_grpc.cli.common.terminal import BOLD, colorize, is_terminal, print_error, sanitize, sanitize_line
from yuan_grpc.cli.load_generator import (
    QUANTILES,
    Measurement,
    TimingInterceptor,
    Workload,
    measure,
    quantile,
    run_request,
)
from yuan_grpc.client import AsyncClient, Model
from yuan_grpc.client.errors import broken_response_error

MAX_TOKENS = 64
PROMPT_TOKENS = 128
SECONDS = 10.0

EPILOG = """\
TTFT is the time from a call to its first token. ITL is the time between
tokens. The server merges tokens for a slow reader: a message of k tokens
counts as k gaps, each 1/k of the time since the previous message.

One warm-up request is not counted. A level ends when all its requests have
ended, and its rates are over that time. Requests ignore the end-of-text token,
so each generates --max-tokens. A refused request is retried up to --retries
times, then counted as an error.
"""

_COUNTS = (("conc", 4), ("reqs", 6), ("errs", 4), ("req/s", 7), ("tokens/s", 8))
_TIMES = (("TTFT (ms)", 7), ("ITL (ms)", 6))
"""Titles and widths of the columns. A time has a column for each of QUANTILES. A row has 78 characters."""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help=SUMMARIES["bench"],
        description="Stream completions of random prompts; print throughput and latency.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--concurrency",
        type=_parse_levels,
        default=(1, 8, 64),
        metavar="N,N",
        help="concurrency levels (default: 1,8,64)",
    )
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
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    request_fields.add_options(parser, MAX_TOKENS)
    connection.add_options(parser)
    parser.set_defaults(run=handle_errors(_run))


def _run(options: argparse.Namespace) -> int:
    if not 0 <= options.shared_prefix <= options.prompt_tokens:
        raise UsageError(f"--shared-prefix must be between 0 and --prompt-tokens, not {options.shared_prefix}")
    if not options.seconds > 0:
        raise UsageError(f"--seconds must be above 0, not {options.seconds}")
    levels: list[Measurement] = []
    models: list[Model] = []
    try:
        with InterruptibleLoop() as loop:
            loop.run(_run_levels(options, levels, models))
    except KeyboardInterrupt:
        print_error(f"cancelled: {len(levels)} of {len(options.concurrency)} levels completed")
        return EXIT_INTERRUPTED
    finally:
        if options.json and levels:
            document = json.dumps(_to_json(options, models[0], levels), ensure_ascii=False, indent=2)
            print(sanitize(document) if is_terminal(sys.stdout) else document)
    return EXIT_FAILURE if any(level.errors for level in levels) else 0


async def _run_levels(options: argparse.Namespace, levels: list[Measurement], models: list[Model]) -> None:
    """Measure all levels. Append results to the lists, so that cancellation keeps them."""
    interceptor = TimingInterceptor()
    async with connection.connect(options, interceptor) as client:
        models.append(model := await client.model())
        workload = _build_workload(options, model)
        if not options.json:
            _print_header(options, model, workload)
        await run_request(client, interceptor, next(workload.requests("warm-up")))
        for concurrency in options.concurrency:
            levels.append(await _run_level(options, client, interceptor, workload, concurrency))
            if not options.json:
                print(_format_row(levels[-1]), flush=True)


async def _run_level(
    options: argparse.Namespace,
    client: AsyncClient,
    interceptor: TimingInterceptor,
    workload: Workload,
    concurrency: int,
) -> Measurement:
    name = f"concurrency {concurrency}"
    with Progress(name, options.requests, " requests") as progress:
        return await measure(
            client,
            interceptor,
            workload.requests(name),
            concurrency=concurrency,
            limit=options.requests,
            seconds=options.seconds,
            on_request_end=progress.advance,
        )


def _build_workload(options: argparse.Namespace, model: Model) -> Workload:
    if options.prompt_seed is None:
        options.prompt_seed = random.randrange(2**32)
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


def _print_header(options: argparse.Namespace, model: Model, workload: Workload) -> None:
    print(sanitize_line(f"{model.name} ({model.dtype or 'unknown dtype'}) at {options.address}"))
    print(
        f"{workload.prompt_tokens} prompt tokens ({workload.shared_prefix} shared), "
        f"{workload.template.max_tokens} generated; --prompt-seed {workload.seed}"
    )
    for line in _format_titles():
        print(colorize(line, BOLD, sys.stdout), flush=True)


def _format_titles() -> tuple[str, str]:
    groups = [" " * (sum(width + 1 for _, width in _COUNTS) - 1)]
    names = [name.rjust(width) for name, width in _COUNTS]
    for title, width in _TIMES:
        groups.append(title.rjust(len(QUANTILES) * (width + 1) - 1))
        names += [f"p{round(fraction * 100)}".rjust(width) for fraction in QUANTILES]
    return " ".join(groups), " ".join(names)


def _format_row(level: Measurement) -> str:
    """Return the row of a level, and a line with its errors."""
    values = (level.concurrency, level.completed, sum(level.errors.values()))
    cells = [str(value).rjust(width) for value, (_, width) in zip(values, _COUNTS, strict=False)]
    rates = (level.requests_per_second, level.tokens_per_second)
    cells += [_format_number(rate, width) for rate, (_, width) in zip(rates, _COUNTS[3:], strict=True)]
    for times, (_, width) in zip((level.ttfts, level.itls), _TIMES, strict=True):
        cells += [_format_milliseconds(quantile(times, fraction), width) for fraction in QUANTILES]
    errors = ", ".join(f"{count} {code}" for code, count in level.errors.most_common())
    return " ".join(cells) + (f"\n     errors: {errors}" if errors else "")


def _format_milliseconds(seconds: float | None, width: int) -> str:
    return "-".rjust(width) if seconds is None else _format_number(seconds * 1000, width)


def _format_number(value: float, width: int) -> str:
    """Return the number with as many of two decimals as fit the width."""
    texts = (f"{value:.{digits}f}" for digits in (2, 1, 0))
    return next((text for text in texts if len(text) <= width), f"{value:.0f}").rjust(width)


def _to_json(options: argparse.Namespace, model: Model, levels: list[Measurement]) -> dict[str, Any]:
    return {
        "model": model.name,
        "dtype": model.dtype,
        "address": options.address,
        "prompt_tokens": options.prompt_tokens,
        "shared_prefix": options.shared_prefix,
        "prompt_seed": options.prompt_seed,
        "max_tokens": options.max_tokens,
        "levels": [_level_to_json(level) for level in levels],
    }


def _level_to_json(level: Measurement) -> dict[str, Any]:
    times = {
        name: {f"p{round(fraction * 100)}": quantile(values, fraction) for fraction in QUANTILES}
        for name, values in (("ttft_seconds", level.ttfts), ("itl_seconds", level.itls))
    }
    return {
        "concurrency": level.concurrency,
        "seconds": level.seconds,
        "requests": level.completed,
        "errors": dict(level.errors),
        "requests_per_second": level.requests_per_second,
        "output_tokens": level.output_tokens,
        "output_tokens_per_second": level.tokens_per_second,
        **times,
    }


def _parse_levels(text: str) -> tuple[int, ...]:
    return tuple(_positive_int(part) for part in text.split(","))


def _positive_int(text: str) -> int:
    if text.strip().isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be an integer above 0, not {text!r}")
