"""Variants that the benchmarks compare: a model shape with engine arguments, each run in a separate process."""

import argparse
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir
from typing import IO, Any

import psutil

FIRST_TOKEN = 10
"""First id used in random prompts; smaller ids are control tokens in both vocabularies."""

ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_num_seqs": 256,
    "seed": 0,
}
"""Default engine arguments of every variant."""

VARIANT = re.compile(r"(?P<environment>(?:\w+=\S*\s+)*)(?P<model>[^\s:]+)(?P<engine>:\{.*\})?")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder; the defaults are those of Yuan2.0-2B."""

    hidden: int = 2048
    layers: int = 24
    heads: int = 32
    width: int = 8192
    vocabulary: int = 135040
    positions: int = 8192
    experts: int = 32

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add one option per size."""
        group = parser.add_argument_group("shape (defaults: Yuan2.0-2B)")
        for name, value in asdict(Shape()).items():
            group.add_argument(f"--{name}", type=int, default=value)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Shape":
        """Return the shape that the options specify."""
        return cls(**{name: getattr(arguments, name) for name in asdict(cls())})

    def config(self, model: str) -> dict[str, Any]:
        """Return `config.json` for a Yuan model, or for one of the same size with equal numbers of key and query heads.

        `yuan` is compared with `llama`, and `m32` with `mixtral`, which has as wide heads and the same experts.
        `yuan-int4` and the other schemes of `yuan-grpc quantize` are files that it wrote.

        Raises:
            ValueError: there is no such model.
        """
        from yuan_grpc.model.checkpoint.quantize import GROUP_SIZE, SCHEMES, quantization_config

        model, _, scheme = model.partition("-")
        architectures = {
            "yuan": "YuanForCausalLM",
            "llama": "LlamaForCausalLM",
            "m32": "YuanForCausalLM",
            "mixtral": "MixtralForCausalLM",
        }
        if model not in architectures:
            raise ValueError(f"the model must be one of {', '.join(architectures)}, not {model!r}")
        if scheme and scheme not in SCHEMES:
            raise ValueError(f"the scheme must be one of {', '.join(SCHEMES)}, not {scheme!r}")
        config: dict[str, Any] = {
            "architectures": [architectures[model]],
            "model_type": "yuan" if model == "m32" else model,
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }
        if scheme:
            group_size = GROUP_SIZE if SCHEMES[scheme].is_grouped else None
            config["quantization_config"] = quantization_config(SCHEMES[scheme], group_size)
        eod = min(77185, self.vocabulary - 1)
        special = ("eod_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        return (
            config
            | self._experts(model)
            | (dict.fromkeys(special, eod) if model in ("yuan", "m32") else {"rope_theta": 10000.0})
        )

    def _experts(self, model: str) -> dict[str, Any]:
        """Return the fields of a model with experts, of which a token uses two, and with heads of twice the width."""
        if model == "m32":
            experts = {"moe_num_experts": self.experts, "moe_top_k": 2, "ffn_hidden_size": self.width}
            return {"attention_projection_size": 2 * self.hidden, "moe_config": experts}
        if model == "mixtral":
            return {
                "num_local_experts": self.experts,
                "num_experts_per_tok": 2,
                "num_key_value_heads": self.heads,
                "head_dim": 2 * self.hidden // self.heads,
            }
        return {}


@dataclass(frozen=True)
class Variant:
    """A model with its engine arguments and environment, written as `[VAR=VALUE …] MODEL[:{JSON}]`."""

    label: str
    model: str
    engine: Mapping[str, Any]
    environment: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """Parse the written form.

        Raises:
            argparse.ArgumentTypeError: the text does not have that form.
        """
        match = VARIANT.fullmatch(text.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"a variant must be [VAR=VALUE …] MODEL[:{{JSON}}], not {text!r}")
        try:
            engine = json.loads((match["engine"] or ":{}")[1:])
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"{error} in {text!r}") from error
        environment = dict(pair.split("=", 1) for pair in match["environment"].split())
        return cls(text.strip(), match["model"], engine, environment)


def base_parser(description: str | None, out: str, limit: float) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark.

    Args:
        description: the script's docstring.
        out: default output file.
        limit: default time limit of an engine in seconds, for its start and for each request.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=Path(out), help="JSON lines, written immediately (default: %(default)s)"
    )
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON: engine arguments of all variants")
    parser.add_argument("--limit", type=float, default=limit, help="time limit of an engine, s (default: %(default)s)")
    return parser


class Record:
    """JSON-lines file to which each result is appended immediately, so that later failures lose nothing."""

    def __init__(self, file: Path, **common: Any) -> None:
        self.file = file
        self.common = common
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **fields: Any) -> None:
        """Append a line with the common fields and these."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(self.common | fields, ensure_ascii=False) + "\n")

    def attempt(self, step: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Append and print the result of a measurement, or its error."""
        try:
            fields = measure()
        except Exception as error:
            fields = {"error": f"{type(error).__name__}: {error}"[:500]}
        self.add(step=step, **fields)
        print(f"{self.common.get('variant', '')} | {step} | {format_fields(fields)}", flush=True)


def read_records(file: Path) -> list[dict[str, Any]]:
    """Return all lines of a record."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def random_prompts(generator: random.Random, batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Return distinct prompts of random ids that share no cached prefix."""
    return [[generator.randrange(FIRST_TOKEN, vocabulary) for _ in range(length)] for _ in range(batch)]


def parse_sizes(text: str) -> list[int]:
    """Parse `1,64,256`."""
    return [int(size) for size in text.split(",") if size]


def parse_batches(text: str) -> list[tuple[int, int]]:
    """Parse `1x1024,16x4096`: prompts by tokens."""
    return [(int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(",") if part)]


def add_engine_options(parser: argparse.ArgumentParser, decode: str, prefill: str) -> None:
    """Add the options of benchmarks with concurrent engines: variants, memory, shape and workload.

    Args:
        decode: default batch sizes.
        prefill: default prompts x tokens.
    """
    parser.add_argument("variants", nargs="*", type=Variant.parse, metavar="[VAR=VALUE …] MODEL[:{JSON}]")
    parser.add_argument("--decode", type=parse_sizes, default=decode, help="batch sizes (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens for decoding (default: %(default)s)")
    parser.add_argument(
        "--prefill", type=parse_batches, default=prefill, help="prompts x tokens (default: %(default)s)"
    )
    parser.add_argument("--cache", type=float, default=20, help="GiB of KV cache per engine (default: %(default)s)")
    Shape.add_options(parser)


def jobs_from(arguments: argparse.Namespace, **environment: str) -> list[tuple[Variant, dict[str, Any]]]:
    """Return a job for each variant; repeated variants are numbered, so that one can be compared with itself.

    Args:
        arguments: parsed options of `add_engine_options` and `base_parser`.
        environment: default environment of all variants.

    Raises:
        SystemExit: there are no variants.
    """
    if not arguments.variants:
        raise SystemExit("name a variant: see --help")
    memory = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": int(arguments.cache * 2**30)}
    shape = asdict(Shape.from_arguments(arguments))
    jobs, occurrences = [], Counter[str]()
    for variant in arguments.variants:
        occurrences[variant.label] += 1
        number = occurrences[variant.label]
        label = variant.label if number == 1 else f"{variant.label} (again, {number})"
        job = {"model": variant.model, "shape": shape, "engine": memory | arguments.engine | dict(variant.engine)}
        jobs.append((replace(variant, label=label, environment=environment | dict(variant.environment)), job))
    return jobs


class Child:
    """Process `program --child` for one variant: it reads a job, replies once its engine runs, then serves calls."""

    def __init__(self, program: Path, variant: Variant, job: dict[str, Any], log: Path) -> None:
        self.variant = variant
        self.log = log
        with log.open("w", encoding="utf-8") as errors:
            self.process = _start(program, variant, errors, subprocess.PIPE)
        self._send(job)

    def _send(self, fields: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `receive` reports how the process ended
            self.process.stdin.write(json.dumps(fields) + "\n")
            self.process.stdin.flush()

    def receive(self, deadline: float) -> dict[str, Any]:
        """Return the next reply; at that `time.monotonic()`, stop the process and return `{"error": …}`."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if ready and (line := self.process.stdout.readline()):
            fields: dict[str, Any] = json.loads(line)
        else:
            self.stop()
            fields = {"error": f"exited with {self.process.returncode}" if ready else "timed out"}
        if "error" in fields:
            fields["error"] = "\n  ".join([fields["error"], *last_log_lines(self.log)])
        return fields

    def call(self, limit: float, **fields: Any) -> dict[str, Any]:
        """Send a request and return the reply, within this number of seconds."""
        self._send(fields)
        return self.receive(time.monotonic() + limit)

    def stop(self) -> None:
        """Let the process exit, then kill it and its descendants if it has not."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        _kill_group(self.process)


@contextmanager
def started_children(
    program: Path, jobs: Iterable[tuple[Variant, dict[str, Any]]], record: "Record", limit: float
) -> Iterator[list[Child]]:
    """Start the engines of all jobs at once, so that they can take turns, and record how each start went.

    Yields the children whose engines started.

    Raises:
        SystemExit: no engine started.
    """
    children = []
    for number, (variant, job) in enumerate(jobs, start=1):
        log = record.file.with_name(f"{record.file.stem}-{number}.log")
        children.append(Child(program, variant, job, log))
    try:
        deadline = time.monotonic() + limit
        running = []
        for child in children:
            reply = child.receive(deadline)
            record.add(variant=child.variant.label, step="start", **reply)
            print(f"{child.variant.label} | start | {format_fields(reply)}", flush=True)
            if "error" not in reply:
                running.append(child)
        if not running:
            raise SystemExit("no engine started")
        yield running
    finally:
        for child in children:
            child.stop()


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[..., dict[str, Any]]]]) -> None:
    """Run a child: start it with its job, reply, and serve calls until stdin is closed.

    Args:
        start: receives the job; returns the first reply and the function that serves calls.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # other output must not mix with replies
    handle: Callable[..., dict[str, Any]] | None = None
    for line in sys.stdin:
        try:
            if handle is None:
                start_time = time.perf_counter()
                reply, handle = start(json.loads(line))
                reply = {"seconds": round(time.perf_counter() - start_time, 1)} | reply
            else:
                reply = handle(**json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        replies.write(json.dumps(reply, ensure_ascii=False) + "\n")
        replies.flush()
        if handle is None:
            return


def format_fields(fields: Mapping[str, Any]) -> str:
    """Return the fields on one line, without lists and tables."""
    return " ".join(f"{name}={value}" for name, value in fields.items() if not isinstance(value, list | dict))


def run_each(program: Path, jobs: Iterable[tuple[Variant, dict[str, Any]]], log: Path, limit: float) -> None:
    """Run jobs consecutively, each as `program --child < JOB` in a separate process.

    A job that fails or exceeds its time limit is reported, and the next one starts.

    Args:
        program: the script.
        jobs: the variant, which sets the environment of the process, and the job that it reads.
        log: file for the engine's own output.
        limit: time limit per job in seconds.
    """
    for variant, job in jobs:
        with log.open("a", encoding="utf-8") as errors:
            log_start = log.stat().st_size
            child = _start(program, variant, errors, None)
            try:
                child.communicate(json.dumps(job), timeout=limit)
                outcome = f"exited with {child.returncode}" if child.returncode else ""
            except subprocess.TimeoutExpired:
                outcome = f"was killed after {limit:.0f} s"
                _kill_group(child)
        if outcome:
            print(f"{variant.label} {outcome}:", *last_log_lines(log, log_start), sep="\n  ", flush=True)


def _start(program: Path, variant: Variant, errors: IO[str], stdout: int | None) -> "subprocess.Popen[str]":
    """Start `program --child` in the variant's environment and in a new process group."""
    return subprocess.Popen(
        [sys.executable, program, "--child"],
        env=os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"} | dict(variant.environment),
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=errors,
        text=True,
        start_new_session=True,
    )


def last_log_lines(log: Path, start: int = 0) -> list[str]:
    """Return the last errors in an engine's log after that byte, or the last lines if there are no errors."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    last = [line for line in lines if "Error" in line and "WARNING" not in line][-8:] or lines[-8:]
    return [line[-300:] for line in last]


def _kill_group(child: "subprocess.Popen[str]") -> None:
    """Kill a process group, even if its leader has exited, and wait until its memory is released."""
    group = [process for process in psutil.process_iter() if _group_of(process) == child.pid]
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    psutil.wait_procs(group, timeout=30)


def _group_of(process: psutil.Process) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(process.pid)
    return None


def read_job() -> dict[str, Any]:
    """Read a child's job from stdin."""
    job: dict[str, Any] = json.load(sys.stdin)
    return job


def start_engine(job: Mapping[str, Any]) -> Any:
    """Return vLLM's `LLM` with dummy weights of the job's `shape`, and its `model` and `engine` arguments."""
    from vllm import LLM

    config = json.dumps(Shape(**job["shape"]).config(job["model"]), sort_keys=True)
    # A fixed folder per configuration: its path is part of the key in vLLM's compilation cache.
    folder = Path(gettempdir(), f"yuan-grpc-{job['model']}-{sha256(config.encode()).hexdigest()[:12]}")
    folder.mkdir(exist_ok=True)
    folder.joinpath("config.json").write_text(config, encoding="utf-8")
    return LLM(str(folder), **ENGINE | {"max_model_len": job["shape"]["positions"]} | job["engine"])


def describe(llm: Any) -> dict[str, Any]:
    """Return versions, devices, resolved settings of the engine, and the GiB that all processes use on each GPU."""
    import torch
    import vllm

    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": device,
        "tensor_parallel": config.parallel_config.tensor_parallel_size,
        "pipeline_parallel": config.parallel_config.pipeline_parallel_size,
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "kv_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "kv_tokens": (cache.num_gpu_blocks or 0) * cache.block_size,
        "gpu_gib": used_gpu_memory(),
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
    }


def used_gpu_memory() -> list[float]:
    """Return the GiB that all processes use on each GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    mib = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return [round(float(used) / 1024, 2) for used in mib]
