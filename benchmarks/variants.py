"""What the benchmarks measure: a model of a given shape under given engine arguments, each in a process of its own."""

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
"""Ids below it are controls in either vocabulary; random prompts begin here."""

ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_num_seqs": 256,
    "seed": 0,
}
"""Engine arguments of every variant, before its own."""

VARIANT = re.compile(r"(?P<environment>(?:\w+=\S*\s+)*)(?P<model>[^\s:]+)(?P<engine>:\{.*\})?")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, by default those of Yuan2.0-2B."""

    hidden: int = 2048
    layers: int = 24
    heads: int = 32
    width: int = 8192
    vocabulary: int = 135040
    positions: int = 8192

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """One option a size."""
        group = parser.add_argument_group("shape (Yuan2.0-2B's unless given)")
        for name, value in asdict(Shape()).items():
            group.add_argument(f"--{name}", type=int, default=value)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Shape":
        """Reads the options back."""
        return cls(**{name: getattr(arguments, name) for name in asdict(cls())})

    def config(self, model: str) -> dict[str, Any]:
        """`config.json` of a Yuan or of a Llama with as many heads for keys as for queries.

        Raises:
            ValueError: the model is neither.
        """
        architectures = {"yuan": "YuanForCausalLM", "llama": "LlamaForCausalLM"}
        if model not in architectures:
            raise ValueError(f"a model is one of {', '.join(architectures)}, not {model!r}")
        config: dict[str, Any] = {
            "architectures": [architectures[model]],
            "model_type": model,
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
        eod = min(77185, self.vocabulary - 1)
        special = ("eod_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        return config | (dict.fromkeys(special, eod) if model == "yuan" else {"rope_theta": 10000.0})


@dataclass(frozen=True)
class Variant:
    """A model, what its engine is started with, and its environment; written `[VAR=VALUE …] MODEL[:{JSON}]`."""

    label: str
    model: str
    engine: Mapping[str, Any]
    environment: Mapping[str, str]

    @classmethod
    def read(cls, text: str) -> "Variant":
        """Reads the written form.

        Raises:
            argparse.ArgumentTypeError: the text is not of that form.
        """
        found = VARIANT.fullmatch(text.strip())
        if found is None:
            raise argparse.ArgumentTypeError(f"a variant is [VAR=VALUE …] MODEL[:{{JSON}}], not {text!r}")
        try:
            engine = json.loads((found["engine"] or ":{}")[1:])
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"{error} in {text!r}") from error
        environment = dict(pair.split("=", 1) for pair in found["environment"].split())
        return cls(text.strip(), found["model"], engine, environment)


def base_parser(about: str | None, out: str, limit: float) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        about: the script's docstring.
        out: where it writes unless told otherwise.
        limit: seconds that an engine may take, to start and for each question, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=Path(out), help="JSON lines, each as soon as it is known (default: %(default)s)"
    )
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON: engine arguments of all variants")
    parser.add_argument("--limit", type=float, default=limit, help="seconds an engine may take (default: %(default)s)")
    return parser


class Record:
    """JSON lines, appended as soon as each is known, so that what follows may fail."""

    def __init__(self, file: Path, **common: Any) -> None:
        self.file = file
        self.common = common
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **fields: Any) -> None:
        """Writes one line: the fields that are common to all, then these."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(self.common | fields, ensure_ascii=False) + "\n")

    def attempt(self, step: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Writes and prints what a step measured, or how it failed."""
        try:
            fields = measure()
        except Exception as error:
            fields = {"error": f"{type(error).__name__}: {error}"[:500]}
        self.add(step=step, **fields)
        print(f"{self.common.get('variant', '')} | {step} | {shown(fields)}", flush=True)


def read_records(file: Path) -> list[dict[str, Any]]:
    """All lines of a record."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def random_prompts(generator: random.Random, batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Distinct prompts of random ids, so that no two share a cached prefix."""
    return [[generator.randrange(FIRST_TOKEN, vocabulary) for _ in range(length)] for _ in range(batch)]


def sizes_of(text: str) -> list[int]:
    """Reads `1,64,256`."""
    return [int(size) for size in text.split(",") if size]


def batches_of(text: str) -> list[tuple[int, int]]:
    """Reads `1x1024,16x4096`: prompts by tokens."""
    return [(int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(",") if part)]


def add_turns_options(parser: argparse.ArgumentParser, decode: str, prefill: str) -> None:
    """Options of benchmarks whose engines run at once: the variants, their memory and shape, and what they are given.

    Args:
        decode: batch sizes unless told otherwise.
        prefill: prompts x tokens unless told otherwise.
    """
    parser.add_argument("variants", nargs="*", type=Variant.read, metavar="[VAR=VALUE …] MODEL[:{JSON}]")
    parser.add_argument("--decode", type=sizes_of, default=decode, help="batch sizes (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in, while decoding (default: %(default)s)")
    parser.add_argument("--prefill", type=batches_of, default=prefill, help="prompts x tokens (default: %(default)s)")
    parser.add_argument("--cache", type=float, default=20, help="GiB of keys and values, each (default: %(default)s)")
    Shape.add_options(parser)


def jobs_of(arguments: argparse.Namespace, **environment: str) -> list[tuple[Variant, dict[str, Any]]]:
    """A job for each variant. One that is named again is numbered, so that it can be compared with itself.

    Args:
        arguments: of `add_turns_options` and `base_parser`.
        environment: of all variants, before their own.

    Raises:
        SystemExit: no variant was named.
    """
    if not arguments.variants:
        raise SystemExit("name a variant: see --help")
    memory = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": int(arguments.cache * 2**30)}
    shape = asdict(Shape.of(arguments))
    jobs, named = [], Counter[str]()
    for variant in arguments.variants:
        named[variant.label] += 1
        number = named[variant.label]
        label = variant.label if number == 1 else f"{variant.label} (again, {number})"
        job = {"model": variant.model, "shape": shape, "engine": memory | arguments.engine | dict(variant.engine)}
        jobs.append((replace(variant, label=label, environment=environment | dict(variant.environment)), job))
    return jobs


class Child:
    """`program --child` at work on one variant: it is told a job, answers once its engine runs, and then is asked."""

    def __init__(self, program: Path, variant: Variant, job: dict[str, Any], log: Path) -> None:
        self.variant = variant
        self.log = log
        with log.open("w", encoding="utf-8") as errors:
            self.process = _start(program, variant, errors, subprocess.PIPE)
        self._tell(job)

    def _tell(self, fields: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer, then, is how it ended
            self.process.stdin.write(json.dumps(fields) + "\n")
            self.process.stdin.flush()

    def answer(self, until: float) -> dict[str, Any]:
        """The next answer: `{"error": …}` if there is none before that `time.monotonic()`, which ends the child."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
        if ready and (line := self.process.stdout.readline()):
            fields: dict[str, Any] = json.loads(line)
        else:
            self.end()
            fields = {"error": f"ended with {self.process.returncode}" if ready else "took too long"}
        if "error" in fields:
            fields["error"] = "\n  ".join([fields["error"], *last_words(self.log)])
        return fields

    def ask(self, limit: float, **fields: Any) -> dict[str, Any]:
        """Its answer to a question, within so many seconds."""
        self._tell(fields)
        return self.answer(time.monotonic() + limit)

    def end(self) -> None:
        """Has it end, and ends it and whatever it started if it does not."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        _end(self.process)


@contextmanager
def children(
    program: Path, jobs: Iterable[tuple[Variant, dict[str, Any]]], record: "Record", limit: float
) -> Iterator[list[Child]]:
    """All engines of the jobs at once, so that they can be asked in turn; what each said of its start is recorded.

    Yields those that started.

    Raises:
        SystemExit: none did.
    """
    started = []
    for number, (variant, job) in enumerate(jobs, start=1):
        log = record.file.with_name(f"{record.file.stem}-{number}.log")
        started.append(Child(program, variant, job, log))
    try:
        until = time.monotonic() + limit
        running = []
        for child in started:
            said = child.answer(until)
            record.add(variant=child.variant.label, step="start", **said)
            print(f"{child.variant.label} | start | {shown(said)}", flush=True)
            if "error" not in said:
                running.append(child)
        if not running:
            raise SystemExit("no engine started")
        yield running
    finally:
        for child in started:
            child.end()


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[..., dict[str, Any]]]]) -> None:
    """What a child does: starts with its job, says how that went, and answers questions until there are no more.

    Args:
        start: of the job it makes what to say, and what answers questions.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # for whatever else is printed
    answer: Callable[..., dict[str, Any]] | None = None
    for line in sys.stdin:
        try:
            if answer is None:
                begun = time.perf_counter()
                said, answer = start(json.loads(line))
                said = {"seconds": round(time.perf_counter() - begun, 1)} | said
            else:
                said = answer(**json.loads(line))
        except Exception as error:
            traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(said, ensure_ascii=False) + "\n")
        answers.flush()
        if answer is None:
            return


def shown(fields: Mapping[str, Any]) -> str:
    """Fields in a line, but for lists and tables."""
    return " ".join(f"{name}={value}" for name, value in fields.items() if not isinstance(value, list | dict))


def run_each(program: Path, jobs: Iterable[tuple[Variant, dict[str, Any]]], log: Path, limit: float) -> None:
    """Runs jobs one after another, each as `program --child < JOB` in a process of its own.

    A job that fails or outlasts its limit says so, and the next one starts.

    Args:
        program: the script.
        jobs: the variant, whose environment the process gets, and the job it reads.
        log: where the engine's own output goes.
        limit: seconds each may take.
    """
    for variant, job in jobs:
        with log.open("a", encoding="utf-8") as errors:
            start = errors.tell()
            child = _start(program, variant, errors, None)
            try:
                child.communicate(json.dumps(job), timeout=limit)
                outcome = f"ended with {child.returncode}" if child.returncode else ""
            except subprocess.TimeoutExpired:
                outcome = f"was ended after {limit:.0f} s"
                _end(child)
        if outcome:
            print(f"{variant.label} {outcome}:", *last_words(log, start), sep="\n  ", flush=True)


def _start(program: Path, variant: Variant, errors: IO[str], stdout: int | None) -> "subprocess.Popen[str]":
    """`program --child` in the variant's environment, with a group of processes of its own."""
    return subprocess.Popen(
        [sys.executable, program, "--child"],
        env=os.environ | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"} | dict(variant.environment),
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=errors,
        text=True,
        start_new_session=True,
    )


def last_words(log: Path, start: int = 0) -> list[str]:
    """What an engine's log says of its end, from that byte on: its last errors, or else its last lines."""
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    told = [line for line in lines if "Error" in line and "WARNING" not in line][-8:] or lines[-8:]
    return [line[-300:] for line in told]


def _end(child: "subprocess.Popen[str]") -> None:
    """Ends a process and those that it started, even if it has ended, and waits until their memory is given back."""
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
    """The job a child was given."""
    job: dict[str, Any] = json.load(sys.stdin)
    return job


def start_engine(job: Mapping[str, Any]) -> Any:
    """vLLM's `LLM` on dummy weights of the job's `shape`, with its `model` and `engine` arguments."""
    from vllm import LLM

    config = json.dumps(Shape(**job["shape"]).config(job["model"]), sort_keys=True)
    # Not a fresh folder each time: its path is part of the name under which vLLM keeps what it compiled.
    folder = Path(gettempdir(), f"yuan-grpc-{job['model']}-{sha256(config.encode()).hexdigest()[:12]}")
    folder.mkdir(exist_ok=True)
    folder.joinpath("config.json").write_text(config, encoding="utf-8")
    return LLM(str(folder), **ENGINE | {"max_model_len": job["shape"]["positions"]} | job["engine"])


def describe(llm: Any) -> dict[str, Any]:
    """Versions, devices, what the engine settled on, and GiB in use on each GPU, by whichever engines there are."""
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
    """GiB in use on each GPU, by whichever process."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    mib = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return [round(float(used) / 1024, 2) for used in mib]
