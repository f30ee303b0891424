"""Streams over the network compared with the engine alone: tokens per second, TTFT, ITL and processor time per token.

    python benchmarks/serving.py --model MODEL --out serving.jsonl offline yuan yuan-unary vllm-http vllm-http-4
    python benchmarks/serving.py --scripted --out scripted.jsonl --rounds 3 offline yuan

Servers are measured one after the other with the same engine options, in `--rounds` rounds, so that a change of the
machine affects all of them. With `--together` all are started first, and take turns with each number of streams.
`offline` is vLLM's `LLM.generate` with the same requests, from the first prompt in to the last text out. The table has
the median of all rounds.

    yuan, yuan-unary   `yuan-grpc serve`, GenerateStream and Generate; options may follow, as in "yuan --frontends 4"
    yuan@N             the same with N front ends, each called on a port of its own
    vllm-http[-N]      vLLM's OpenAI server, with N processes
    vllm-grpc          `vllm serve --grpc` (needs smg-grpc-servicer); token ids only, no text
    vllm-rust          vLLM's Rust front end; the checkpoint's folder needs a tokenizer.json

With `--scripted`, the engine has no model: each step takes STEP_MILLISECONDS (9) and every sequence gets a token. It
needs no GPU. `µs/token` is the processor time of the processes that accept calls, and of their supervisor.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
from stream_client import Load, measure

ENGINE_OPTIONS = ["--max-num-seqs", "256", "--no-enable-log-requests"]
SCRIPTED = ["--worker-cls", "benchmarks.scripted_worker.ScriptedWorker", "--kv-cache-memory-bytes", "8G"]
START_SECONDS = 600
SEQUENTIAL = 8
"""Requests of a single stream, one after another. One alone takes half a second, of which a tenth is chance."""
COLUMNS = ("tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "us_per_token")


@dataclass(frozen=True)
class Server:
    """A server to measure.

    Attributes:
        protocol: a key of `stream_client.PROTOCOLS`.
        command: the arguments after the interpreter, without engine options.
        environment: additional environment variables.
        ports: the ports to call, if it is not the one of the command.
    """

    protocol: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    ports: tuple[int, ...] = ()


def server_of(name: str, model: str, port: int) -> Server:
    """Return the server of a name such as `yuan` or `vllm-http-4`.

    Raises:
        ValueError: there is no such server.
    """
    vllm = ("-m", "vllm.entrypoints.cli.main", "serve", model, "--port", str(port), "--disable-uvicorn-access-log")
    kind, _, count = name.partition("-http-")
    if name.startswith("yuan"):
        protocol, *options = name.split(" ")
        protocol, _, front_ends = protocol.partition("@")
        ports: tuple[int, ...] = ()
        if front_ends:
            ports = tuple(range(port + 1, port + 1 + int(front_ends)))
            options += ["--frontends", front_ends, "--frontend-ports", str(ports[0])]
        command = ("-m", "yuan_grpc", "serve", "--model", model, "--port", str(port), *options)
        return Server(protocol, command, ports=ports)
    if kind == "vllm" and count.isdecimal():
        return Server("openai", (*vllm, "--api-server-count", count))
    if name == "vllm-http":
        return Server("openai", vllm)
    if name == "vllm-rust":
        return Server("openai", vllm, (("VLLM_USE_RUST_FRONTEND", "1"),))
    if name == "vllm-grpc":
        return Server("vllm-grpc", (*vllm, "--grpc"))
    raise ValueError(f"no such server: {name}")


@contextmanager
def running(
    server: Server, arguments: argparse.Namespace, port: int, log: Path, gpu: str | None
) -> Iterator[psutil.Process]:
    """Yield the main process of a server that is ready for requests; end it afterwards.

    Raises:
        RuntimeError: it did not start.
    """
    command = [*_on_cpus(arguments), sys.executable, *server.command, *arguments.engine]
    with log.open("ab") as output:
        environment = _environment(gpu) | dict(server.environment)
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        wait_until_ready(server, port, process)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(server: Server, port: int, process: "subprocess.Popen[Any]") -> None:
    """Wait until a server accepts requests at a port.

    Raises:
        RuntimeError: its process has ended, or it takes longer than `START_SECONDS`.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if _is_ready(server, port):
            return
        time.sleep(0.5)
    raise RuntimeError(f"{' '.join(server.command)} did not start")


def _is_ready(server: Server, port: int) -> bool:
    import urllib.request

    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        if server.protocol == "openai":
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
                return bool(response.status == 200)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
    except (OSError, grpc.RpcError):
        return False


def _on_cpus(arguments: argparse.Namespace) -> list[str]:
    return ["taskset", "-c", arguments.server_cpus] if arguments.server_cpus else []


def _environment(gpu: str | None) -> dict[str, str]:
    return os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})


def server_cpu_seconds(main: psutil.Process, ports: Sequence[int]) -> float:
    """Return the processor time so far of a server's main process and of those that accept calls, in seconds."""
    total = 0.0
    for process in (main, *main.children(recursive=True)):
        try:
            if process == main or any(each.laddr.port in ports for each in process.net_connections("tcp")):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:  # it has ended
            pass
    return total


Measure = Callable[[int, float], dict[str, Any]]
"""Returns the record of a number of streams, while a number of long prompts arrive in each second."""


@contextmanager
def ready_server(name: str, arguments: argparse.Namespace, log: Path, gpu: str | None) -> Iterator[Measure]:
    """Yield the measurement of a server that has started and is warm."""
    port = free_port()
    server = server_of(name, arguments.model, port)
    with running(server, arguments, port, log, gpu) as process:
        ports = server.ports or (port,)
        load = load_of(arguments, server.protocol, tuple(f"127.0.0.1:{number}" for number in ports))
        measure(replace(load, streams=min(64, max(arguments.streams)), max_tokens=32))

        def measure_load(streams: int, long_prompts: float) -> dict[str, Any]:
            cpu = server_cpu_seconds(process, ports)
            result = measure(
                replace(load, streams=streams, requests=requests_of(streams), long_prompts_per_s=long_prompts)
            )
            cpu = server_cpu_seconds(process, ports) - cpu
            if long_prompts:
                return {"server": f"{name}, long prompts", **result}
            return {"server": name, **result, "us_per_token": 1e6 * cpu / result["tokens"]}

        yield measure_load


@contextmanager
def ready_offline(arguments: argparse.Namespace, log: Path, gpu: str | None) -> Iterator[Measure]:
    """Yield the measurement of the offline engine, in a process of its own. It has no long prompts."""
    keys = ("model", "engine", "prompt_tokens", "max_tokens", "vocabulary")
    job = json.dumps({key: getattr(arguments, key) for key in keys})
    command = [*_on_cpus(arguments), sys.executable, __file__, "--offline-job", job]
    pipe = subprocess.PIPE
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=_environment(gpu), stdin=pipe, stdout=pipe, stderr=output, text=True)
    requests, records = process.stdin, process.stdout
    assert requests is not None
    assert records is not None

    def measure_load(streams: int, long_prompts: float = 0) -> dict[str, Any]:
        print(streams, file=requests, flush=True)
        for line in records:
            if line.startswith('{"server"'):
                return dict(json.loads(line))
        raise RuntimeError("the offline engine has ended")

    with process:
        measure_load(min(64, max(arguments.streams)))
        yield measure_load
        requests.close()


def run_offline_job(job: dict[str, Any]) -> None:
    """Print a record for each number of prompts that is read from the standard input."""
    import random

    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = [option for option in job["engine"] if option != "--no-enable-log-requests"]
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", job["model"], *options]))
    llm = LLM(**{key: value for key, value in vars(args).items() if value is not None})
    for streams in map(int, sys.stdin):
        batches: list[Any] = [
            [
                {"prompt_token_ids": random.choices(range(300, job["vocabulary"]), k=job["prompt_tokens"])}
                for _ in range(streams)
            ]
            for _ in range(requests_of(streams))
        ]
        start = time.monotonic()
        params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)
        outputs = [output for batch in batches for output in llm.generate(batch, params, use_tqdm=False)]
        seconds = time.monotonic() - start
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        record = {"server": "offline", "streams": streams, "tokens": tokens, "tokens_per_s": tokens / seconds}
        print(json.dumps(record), flush=True)


def ready(name: str, arguments: argparse.Namespace, log: Path, gpu: str | None) -> AbstractContextManager[Measure]:
    """Return the context in which a server, or the offline engine, can be measured."""
    return ready_offline(arguments, log, gpu) if name == "offline" else ready_server(name, arguments, log, gpu)


def measure_in_turn(arguments: argparse.Namespace, log: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of all rounds, with one server at a time."""
    for _ in range(arguments.rounds):
        for name in arguments.servers:
            with ready(name, arguments, log, arguments.gpus[0]) as measure_load:
                for streams, long_prompts in loads_of(name, arguments):
                    yield measure_load(streams, long_prompts)


def measure_together(arguments: argparse.Namespace, log: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of all rounds, with servers that all run and take turns, without those that do not start."""
    servers: dict[str, Measure] = {}
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(name: str, gpu: str | None) -> None:
            try:
                servers[name] = stack.enter_context(ready(name, arguments, log, gpu))
            except RuntimeError as error:
                print(error, file=sys.stderr)

        (first, *others), gpus = arguments.servers, cycle(arguments.gpus)
        start(first, next(gpus))  # alone: it fills the compile cache for the others
        list(pool.map(start, others, gpus))
        for _ in range(arguments.rounds):
            for load in loads_of("", arguments):
                for name in arguments.servers:
                    if name in servers and load in loads_of(name, arguments):
                        yield servers[name](*load)


def loads_of(name: str, arguments: argparse.Namespace) -> list[tuple[int, float]]:
    """Return the number of streams, and of long prompts in each second, of each measurement of a server."""
    loads: list[tuple[int, float]] = [(streams, 0) for streams in arguments.streams]
    if arguments.long_prompts and name != "offline":
        loads.append((arguments.streams[-1], arguments.long_prompts))
    return loads


def requests_of(streams: int) -> int:
    """Return the number of requests that each of some streams sends, one after another."""
    return SEQUENTIAL if streams == 1 else 1


def load_of(arguments: argparse.Namespace, protocol: str, addresses: tuple[str, ...]) -> Load:
    """Return the load of the arguments, for one stream."""
    return Load(
        protocol,
        addresses,
        arguments.model,
        streams=1,
        processes=arguments.clients,
        prompt_tokens=arguments.prompt_tokens,
        max_tokens=arguments.max_tokens,
        vocabulary=arguments.vocabulary,
    )


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the medians, with the ratio of each rate to the offline engine's."""
    medians: dict[tuple[int, str], dict[str, float]] = {}
    for key in dict.fromkeys((record["streams"], record["server"]) for record in records):
        rows = [record for record in records if (record["streams"], record["server"]) == key]
        medians[key] = {
            name: statistics.median(row[name] for row in rows) for name in COLUMNS if rows[0].get(name) is not None
        }
    lines = [
        "| streams | server | tokens/s | of offline | TTFT p50 / p99, ms | ITL p50 / p99, ms | µs/token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (streams, server), row in sorted(medians.items(), key=lambda item: item[0][0]):
        offline = medians.get((streams, "offline"), {}).get("tokens_per_s")
        ratio = f"{row['tokens_per_s'] / offline:.2f}" if offline else ""
        ttft, itl = (" / ".join(f"{row.get(f'{name}_p{p}', 0):.1f}" for p in (50, 99)) for name in ("ttft", "itl"))
        cpu = f"{row['us_per_token']:.0f}" if "us_per_token" in row else ""
        rate = f"{row['tokens_per_s']:,.0f}"
        lines.append(f"| {streams} | {server} | {rate} | {ratio} | {ttft} | {itl} | {cpu} |")
    return "\n".join(lines)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _list(text: str) -> list[str]:
    return text.split(",")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", default=["offline", "yuan"], metavar="SERVER")
    parser.add_argument("--model", help="checkpoint folder (default: the demo model)")
    parser.add_argument("--scripted", action="store_true", help="replace the model by a script; needs no GPU")
    parser.add_argument("--engine", default="", metavar="OPTIONS", help="engine options for all servers")
    parser.add_argument("--out", type=Path, default=Path("serving.jsonl"), metavar="FILE", help="records are appended")
    parser.add_argument("--streams", default="1,64,256", metavar="N,N", help="numbers of streams (default: 1,64,256)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N")
    parser.add_argument("--clients", type=int, default=6, metavar="N", help="client processes (default: 6)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--vocabulary", type=int, default=1000, metavar="N", help="prompts have ids from 300 to this")
    parser.add_argument(
        "--long-prompts",
        type=float,
        default=0,
        metavar="N",
        help="repeat the last number of streams while N prompts of 4,096 tokens arrive in each second",
    )
    parser.add_argument("--together", action="store_true", help="start all servers first; they take turns")
    parser.add_argument("--gpus", type=_list, default=[None], metavar="N,N", help="GPUs, over which they are spread")
    parser.add_argument("--server-cpus", metavar="N-N", help="CPUs of the servers and engines, without the clients")
    parser.add_argument("--offline-job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.streams = [int(number) for number in _list(arguments.streams)]
    if arguments.model is None:
        from yuan_grpc.server.settings import DEMO

        arguments.model = str(DEMO)
    arguments.engine = [*ENGINE_OPTIONS, *(SCRIPTED if arguments.scripted else ()), *arguments.engine.split()]
    return arguments


def main() -> None:
    """Measure the servers, append the records to a file and print the table."""
    arguments = _parse_arguments()
    if arguments.offline_job:
        run_offline_job(arguments.offline_job)
        return
    records: list[dict[str, Any]] = []
    log = arguments.out.with_suffix(".log")
    for record in (measure_together if arguments.together else measure_in_turn)(arguments, log):
        records.append(record)
        with arguments.out.open("a") as file:
            print(json.dumps(record), file=file)
        print(json.dumps(record), file=sys.stderr, flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
