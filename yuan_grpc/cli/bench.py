"""`yuan-grpc bench`: a quick figure of what a server takes."""

from __future__ import annotations

import argparse
import json
import random
import sys
from typing import Any

from yuan_grpc.cli.common import connection, request_fields
from yuan_grpc.cli.common.connection import FAILED, INTERRUPTED
from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.signals import Interruptible
from yuan_grpc.cli.common.terminal import BOLD, complain, painted
from yuan_grpc.cli.load_generator import SHARES, Measurement, Shape, Timing, ask, measure, percentile
from yuan_grpc.client import AsyncClient, Model

MAX_TOKENS = 64
PROMPT_TOKENS = 128
SECONDS = 10.0

EPILOG = """\
TTFT is the time from a call to its first token. ITL is the time between tokens: a message of k tokens counts as k gaps,
each a k-th of the time since the message before, for a reader who is slow gets tokens put together.

The first request of all is not counted. A level ends when all that it began is answered, and its rates are over the
whole time. Answers go on past the end-of-text token, so that each has --max-tokens. A refused request is sent again as
--retries says, and counts as an error after that.
"""

_COLUMNS = (
    ("concurrency", 11),
    ("requests", 8),
    ("errors", 6),
    ("requests/s", 10),
    ("tokens/s", 9),
    *((f"{name} p{round(share * 100)}", 9) for name in ("TTFT", "ITL") for share in SHARES),
)


def add_command(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="measure a server under load",
        description="Streams answers to made-up prompts, so many at a time, and tells rates and waits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--concurrency", type=_levels, default=(1, 8, 64), metavar="N,N", help="levels of load (default: 1,8,64)"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--requests", type=_count, metavar="N", help="requests of each level")
    length.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"length of each level (default: {SECONDS:g})"
    )
    parser.add_argument(
        "--prompt-tokens", type=_count, default=PROMPT_TOKENS, metavar="N", help=f"default: {PROMPT_TOKENS}"
    )
    parser.add_argument(
        "--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with (default: 0)"
    )
    parser.add_argument(
        "--prompt-seed",
        type=int,
        metavar="N",
        help="makes the prompts; by default others each time, so that no cache helps",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    request_fields.add_options(parser, MAX_TOKENS)
    connection.add_options(parser)
    parser.set_defaults(run=connection.at_the_edge(_run))


def _run(options: argparse.Namespace) -> int:
    if not 0 <= options.shared_prefix <= options.prompt_tokens:
        raise UsageError(f"--shared-prefix must be between 0 and --prompt-tokens, not {options.shared_prefix}")
    if not options.seconds > 0:
        raise UsageError(f"--seconds must be above 0, not {options.seconds}")
    levels: list[Measurement] = []
    model: list[Model] = []
    try:
        with Interruptible() as loop:
            loop.run(_bench(options, levels, model))
    except KeyboardInterrupt:
        complain(f"cancelled after {len(levels)} of {len(options.concurrency)} levels")
        return INTERRUPTED
    finally:
        if options.json and levels:
            print(json.dumps(_document(options, model[0], levels), ensure_ascii=False, indent=2))
    return FAILED if any(level.errors for level in levels) else 0


async def _bench(options: argparse.Namespace, levels: list[Measurement], models: list[Model]) -> None:
    """Measures all levels; what it finds is kept in the lists, also when it is cancelled."""
    timing = Timing()
    async with connection.connect(options, timing) as client:
        models.append(model := await client.model())
        shape = _shape(options, model)
        if not options.json:
            _print_head(options, model, shape)
        await ask(client, timing, next(shape.requests("warm-up")))
        for concurrency in options.concurrency:
            levels.append(await _level(options, client, timing, shape, concurrency))
            if not options.json:
                print(_row(levels[-1]), flush=True)


async def _level(
    options: argparse.Namespace, client: AsyncClient, timing: Timing, shape: Shape, concurrency: int
) -> Measurement:
    with Progress(f"{concurrency} at a time", options.requests, " requests") as progress:
        return await measure(
            client,
            timing,
            shape.requests(f"{concurrency} at a time"),
            concurrency=concurrency,
            limit=options.requests,
            seconds=options.seconds,
            advance=progress.advance,
        )


def _shape(options: argparse.Namespace, model: Model) -> Shape:
    if options.prompt_seed is None:
        options.prompt_seed = random.randrange(2**32)
    given = {"ignore_eos": True} | request_fields.of(options)
    for name in (*request_fields.PROMPTS, "request_id"):
        if name in given:
            raise UsageError(f"`{name}` cannot be set: bench makes it up")
    request = request_fields.message(given)
    needed, most = options.prompt_tokens + request.max_tokens, model.limits.max_model_len
    if needed > most:
        raise UsageError(f"--prompt-tokens and --max-tokens must be at most {most} together, not {needed}")
    return Shape(request, options.prompt_tokens, options.shared_prefix, options.prompt_seed, model.sizes.tokens)


def _print_head(options: argparse.Namespace, model: Model, shape: Shape) -> None:
    print(
        f"{model.name} in {model.dtype or 'unknown numbers'} on {options.address}: {shape.prompt_tokens} prompt tokens "
        f"({shape.shared_prefix} shared), {shape.request.max_tokens} generated; --prompt-seed {shape.seed}; times in ms"
    )
    print(painted("  ".join(name.rjust(width) for name, width in _COLUMNS), BOLD, sys.stdout), flush=True)


def _row(level: Measurement) -> str:
    errors = level.errors.total() if level.errors else 0
    cells = [str(level.concurrency), str(level.answered), str(errors)]
    cells += [f"{level.requests_per_second:.2f}", f"{level.tokens_per_second:.1f}"]
    for values in (level.first, level.gaps):
        cells += [_milliseconds(percentile(values, share)) for share in SHARES]
    row = "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    told = ", ".join(f"{count} {code}" for code, count in level.errors.most_common())
    return f"{row}  {told}".rstrip()


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _document(options: argparse.Namespace, model: Model, levels: list[Measurement]) -> dict[str, Any]:
    return {
        "model": model.name,
        "dtype": model.dtype,
        "address": options.address,
        "prompt_tokens": options.prompt_tokens,
        "shared_prefix": options.shared_prefix,
        "prompt_seed": options.prompt_seed,
        "max_tokens": options.max_tokens,
        "levels": [_plain(level) for level in levels],
    }


def _plain(level: Measurement) -> dict[str, Any]:
    times = {
        name: {f"p{round(share * 100)}": percentile(values, share) for share in SHARES}
        for name, values in (("ttft_seconds", level.first), ("itl_seconds", level.gaps))
    }
    return {
        "concurrency": level.concurrency,
        "seconds": level.seconds,
        "requests": level.answered,
        "errors": dict(level.errors),
        "requests_per_second": level.requests_per_second,
        "output_tokens": level.tokens,
        "output_tokens_per_second": level.tokens_per_second,
        **times,
    }


def _levels(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _count(text: str) -> int:
    if text.strip().isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text!r}")
