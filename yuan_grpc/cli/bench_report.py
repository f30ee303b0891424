"""Results of `yuan-grpc bench` as JSON, as CSV, and as one self-contained page."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from yuan_grpc.cli.bench_page import to_html
from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.terminal import is_terminal, sanitize
from yuan_grpc.cli.load_generator import METRICS, PERCENTILES, Measurement, quantile
from yuan_grpc.client import Model

Document = dict[str, Any]
"""The results of a run as JSON; docs/call/command-line.md lists the keys."""


def to_document(options: argparse.Namespace, model: Model, levels: Sequence[Measurement]) -> Document:
    """Return the results of a run, with times in seconds."""
    return {
        "model": model.name,
        "dtype": model.dtype,
        "address": options.address,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "prompt_tokens": options.prompt_tokens,
        "shared_prefix": options.shared_prefix,
        "prompt_seed": options.prompt_seed,
        "max_tokens": options.max_tokens,
        "goodput": dict(options.goodput),
        "levels": [_level_to_json(level, dict(options.goodput)) for level in levels],
    }


def write(document: Document, paths: Sequence[Path], *, to_stdout: bool) -> None:
    """Write the results to files, each in the format of its suffix, and as JSON to stdout."""
    if to_stdout:
        text = to_json(document)
        print(sanitize(text) if is_terminal(sys.stdout) else text, end="")
    for path in paths:
        try:
            path.write_text(WRITERS[path.suffix](document), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def to_json(document: Document) -> str:
    """Return the results as JSON."""
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def to_csv(document: Document) -> str:
    """Return a row for each level, with times in seconds."""
    rows = [_flatten(document, level) for level in document["levels"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


WRITERS: dict[str, Callable[[Document], str]] = {".json": to_json, ".csv": to_csv, ".html": to_html}
"""The writer of each suffix."""


def _level_to_json(level: Measurement, targets: dict[str, float]) -> Document:
    arrivals, good = level.level.arrivals, level.good_requests(targets)
    load: Document = {"concurrency": level.level.concurrency}
    if arrivals:
        load |= {"request_rate": arrivals.start_rate, "burstiness": _finite_or_none(arrivals.burstiness)}
        if arrivals.start_rate != arrivals.end_rate:
            strategy = "exponential" if arrivals.exponential else "linear"
            load |= {"request_rate": None, "ramp_up_strategy": strategy}
            load |= {"ramp_up_start_rps": arrivals.start_rate, "ramp_up_end_rps": arrivals.end_rate}
    return {
        "label": level.level.label,
        **load,
        "seconds": level.seconds,
        "requests": level.completed,
        "errors": dict(level.errors),
        "requests_per_second": level.requests_per_second,
        "output_tokens": level.output_tokens,
        "output_tokens_per_second": level.tokens_per_second,
        **({"good_requests": good, "goodput_per_second": good / level.seconds} if targets else {}),
        **{f"{metric}_seconds": _summarize(level.times(metric)) for metric in METRICS},
    }


def _finite_or_none(value: float) -> float | None:
    return None if math.isinf(value) else value  # JSON has no infinity


def _summarize(times: Sequence[float]) -> dict[str, float | None]:
    quantiles = {name: quantile(times, fraction) for name, fraction in PERCENTILES.items()}
    return {"mean": sum(times) / len(times) if times else None, **quantiles}


def _flatten(document: Document, level: Document) -> dict[str, Any]:
    row = {name: document[name] for name in ("model", "prompt_tokens", "max_tokens")}
    for name, value in level.items():
        if name == "errors":
            row[name] = sum(value.values())
        elif isinstance(value, dict):
            row |= {f"{name.removesuffix('_seconds')}_{part}_seconds": number for part, number in value.items()}
        else:
            row[name] = value
    return row
