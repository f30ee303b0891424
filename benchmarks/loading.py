"""Time and peak memory for loading a checkpoint of Yuan2.0-2B's shape.

Writes the checkpoint as one `.bin` file and as sharded safetensors (4.7 GB each, deleted afterwards), then loads each
with the engine in a separate process:

    python benchmarks/loading.py --folder /tmp/checkpoints --out loading.jsonl

Memory is reported in GiB: `anonymous` is allocated by the process, and `file` is mapped from the checkpoint, so Linux
can reclaim it for other processes. Both are from /proc/self/status; `pss` is from smaps_rollup. On a GPU `gpu_peak` is
the peak of torch's allocations.
"""

import argparse
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from variants import Record, Shape, Variant, base_parser, read_job, read_records, run_each

from yuan_grpc.model.checkpoint.layout import HEAD, published_shapes
from yuan_grpc.model.config import YuanConfig

GIB = 2**30
PAUSE_SECONDS = 0.02
STATUS = {"VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file"}
EMBEDDING = "model.embed_tokens.weight"


class Memory(threading.Thread):
    """Samples this process's memory until stopped, and keeps the peak of each kind since the last reset."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: dict[str, float] = {}
        self.stopped = threading.Event()

    def run(self) -> None:
        """Take samples until stopped."""
        while not self.stopped.wait(PAUSE_SECONDS):
            self.sample()

    def sample(self) -> dict[str, float]:
        """Update the peaks and return the current GiB by kind."""
        now = self.now()
        self.peak = {kind: max(value, self.peak.get(kind, 0.0)) for kind, value in now.items()}
        return now

    def reset(self) -> dict[str, float]:
        """Reset the peaks and return the current GiB by kind."""
        self.peak = {}
        return self.sample()

    @staticmethod
    def now() -> dict[str, float]:
        """Return the current GiB by kind."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {kind: int(fields[name].split()[0]) * 1024 / GIB for name, kind in STATUS.items()}


def proportional() -> float:
    """Return the GiB of this process, with shared memory counted proportionally."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / GIB
    raise RuntimeError("smaps_rollup has no Pss")


def shards(config: YuanConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Yield random bfloat16 weights: embedding and an equal head first, then one layer at a time."""
    noise = torch.randn(2**22).to(torch.bfloat16) * 0.02

    def weight(shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return noise.repeat(size // len(noise) + 1)[:size].reshape(shape).clone()

    shapes = published_shapes(config)
    embedding = weight(shapes.pop(EMBEDDING))
    yield {EMBEDDING: embedding, HEAD: embedding.clone()}
    shapes.pop(HEAD)
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        layers.setdefault(layer, {})[name] = shape
    for group in layers.values():
        yield {name: weight(shape) for name, shape in group.items()}


def write_checkpoint(folder: Path, shape: Shape, layout: str) -> None:
    """Write config and weights: one `pytorch_model.bin`, or safetensors with one shard per layer and an index."""
    folder.mkdir(parents=True)
    fields = shape.config("yuan")
    folder.joinpath("config.json").write_text(json.dumps(fields), encoding="utf-8")
    config = YuanConfig(**fields)
    if layout == "bin":
        weights: dict[str, torch.Tensor] = {}
        for shard in shards(config):
            weights |= shard
        torch.save(weights, folder / "pytorch_model.bin")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards(config), start=1):
        file = f"model-{number:05}-of-{shape.layers + 2:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    folder.joinpath("model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def model_size(model: torch.nn.Module) -> float:
    """Return the GiB of a model's parameters and buffers, with each storage counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) / GIB


def measured(load: Callable[..., Any], memory: Memory, result: dict[str, Any]) -> Callable[..., Any]:
    """Wrap vLLM's loader so that it stores its time and memory in `result`."""

    @wraps(load)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before, start = memory.reset(), time.perf_counter()
        model = load(*args, **kwargs)
        result["seconds"] = round(time.perf_counter() - start, 2)
        after = memory.sample()
        result["model_gib"] = round(model_size(model), 3)
        for kind in STATUS.values():
            result[f"{kind}_before"], result[f"{kind}_after"] = round(before[kind], 3), round(after[kind], 3)
            result[f"{kind}_peak"] = round(memory.peak[kind], 3)
        if on_gpu:
            result["gpu_peak"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
            result["gpu_after"] = round(torch.cuda.memory_allocated() / GIB, 3)
        result["pss_after"] = round(proportional(), 3)
        return model

    return wrapper


def child() -> None:
    """Write or load a checkpoint."""
    job = read_job()
    folder = Path(job["folder"])
    record = Record(Path(job["out"]), layout=job["layout"], variant=job["layout"])
    start = time.perf_counter()
    if job["write"]:
        write_checkpoint(folder, Shape(**job["shape"]), job["layout"])
        return print(f"{job['layout']} | written in {time.perf_counter() - start:.0f} s", flush=True)
    record.attempt("load", lambda: load(folder, job["engine"]))


def load(folder: Path, engine: dict[str, Any]) -> dict[str, Any]:
    """Start an engine on a checkpoint and return the time and memory of its loader and of the whole process."""
    from vllm import LLM
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    memory, result = Memory(), dict[str, Any]()
    memory.start()
    BaseModelLoader.load_model = measured(BaseModelLoader.load_model, memory, result)
    llm = LLM(str(folder), skip_tokenizer_init=True, **engine)
    memory.stopped.set()
    result["anonymous_ready"] = round(memory.now()["anonymous"], 3)
    del llm
    result["max_resident"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3)
    return result


def read_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = base_parser(__doc__, "loading.jsonl", limit=500)
    parser.add_argument("layouts", nargs="*", default=["bin", "safetensors"], help="bin, safetensors (default: both)")
    parser.add_argument(
        "--folder", type=Path, default=Path("checkpoints"), help="folder for the checkpoints; must not exist"
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, and use existing ones")
    Shape.add_options(parser)
    return parser.parse_args()


def main() -> None:
    """Write, load and delete each layout."""
    arguments = read_arguments()
    if arguments.child:
        return child()
    engine = {
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 1,
        "kv_cache_memory_bytes": 256 * 2**20,
    }
    common = {"out": str(arguments.out.absolute()), "shape": asdict(Shape.from_arguments(arguments))}
    log = arguments.out.with_suffix(".log")
    for layout in arguments.layouts:
        folder = arguments.folder.absolute() / layout
        job = common | {"layout": layout, "folder": str(folder), "engine": engine | arguments.engine}
        variant = Variant(layout, "yuan", {}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
        try:
            write_jobs = [] if arguments.keep and folder.exists() else [(variant, job | {"write": True})]
            run_each(Path(__file__).absolute(), [*write_jobs, (variant, job | {"write": False})], log, arguments.limit)
        finally:
            if not arguments.keep:
                shutil.rmtree(folder, ignore_errors=True)
    if arguments.out.exists():
        print(table(read_records(arguments.out)))


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per load."""
    columns = ["layout", "seconds", "model_gib", "anonymous_before", "anonymous_peak", "anonymous_after"]
    columns += ["file_peak", "resident_peak", "pss_after", "anonymous_ready", "max_resident", "gpu_peak"]
    rows = [[str(record.get(column, "–")) for column in columns] for record in records if record["step"] == "load"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main()
