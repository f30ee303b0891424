"""Mistakes of newcomers at the first start, and the last line and exit status that the server must end with."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yuan_grpc.server.settings import DEMO

NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
"""An address at which no hub answers."""
EAGER = ("--enforce-eager", "--kv-cache-memory-bytes", "128M", "--dtype", "float32")


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: the name in the table.
        ending: a regular expression of the last line, after "yuan-grpc: ".
        arguments: options of `yuan-grpc serve`; `{model}` is a copy of the demo model.
        spoil: changes the copy.
        environment: variables to set.
        status: the exit status.
        needs_engine: whether vLLM is imported before the mistake can be found.
        stop_signal: sent when the server has printed its first lines.
        wrapper: a command that runs the server.
    """

    name: str
    ending: str
    arguments: Sequence[str] = ("--model", "{model}", *EAGER)
    spoil: Callable[[Path], None] = lambda model: None
    environment: Mapping[str, str] = field(default_factory=dict)
    status: int = 1
    needs_engine: bool = False
    stop_signal: signal.Signals | None = None
    wrapper: Sequence[str] = ()


@contextmanager
def port_in_use() -> Iterator[int]:
    """Yield a port that another program listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


def set_config(**fields: Any) -> Callable[[Path], None]:
    """Return a function that sets fields of `config.json`."""

    def spoil(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | fields))

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    """Return a function that removes a file."""
    return lambda model: (model / name).unlink()


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Return a function that keeps only the beginning of a file."""
    return lambda model: os.truncate(model / name, size)


def replace_by_pointer(model: Path) -> None:
    """Replace the weights by what `git clone` without Git LFS leaves."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (model / "model.safetensors").write_text(pointer)


def drop_weight(model: Path) -> None:
    """Remove one weight from the file."""
    file = model / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    del header["model.layers.1.mlp.up_proj.weight"]
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


def list_another_file(model: Path) -> None:
    """Add an index that lists a file which is not there."""
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def path_without(*programs: str) -> str:
    """Return a PATH of folders that have none of these programs."""
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not any(Path(folder, name).exists() for name in programs))


def _hide_library(name: str) -> Sequence[str]:
    """Return a command that runs a program without a shared library, where users may make namespaces."""
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    paths = sorted({line.rpartition("=> ")[2] for line in listed.splitlines() if line.strip().startswith(name)})
    mounts = "; ".join(f"mount --bind /dev/null {os.path.realpath(path)}" for path in paths)
    return ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mounts}; exec "$@"', "sh")


CASES = (
    Case("unknown option", r"unrecognized option --mdel: did you mean --model\?", ("--mdel", "x"), status=2),
    Case("vLLM's option misspelled", r".* did you mean --max-model-len\?", ("--max-modl-len", "9"), status=2),
    Case("wrong dtype", r"--dtype must be one of auto, .*, not 'float8'", ("--dtype", "float8")),
    Case("impossible port", r"argument --port: must be a port, .*--help", ("--port", "70000"), status=2),
    Case("port taken", r"port \d+ is in use: .* --port", ("--port", "{taken}")),
    Case("HTTP port taken", r"port \d+ is in use: .* --http-port", ("--http-port", "{taken}")),
    Case("no such host", r"--host must be an address of this machine, not '192.0.2.1'.*", ("--host", "192.0.2.1")),
    Case("plaintext for other machines", r"--host 0.0.0.0 lets other machines .*", ("--host", "0.0.0.0")),
    Case("certificate without key", r"--tls-cert-file needs --tls-key-file: .*", ("--tls-cert-file", "x")),
    Case("no such folder", r"argument --model: must be an existing folder, .*", ("--model", "{model}/none"), status=2),
    Case("no such model on the hub", r"there is no folder A/b, and the hub .*", ("--model", "A/b"), environment=NO_HUB),
    Case("not a checkpoint", r".* has no config.json: .*", spoil=remove("config.json")),
    Case(
        "Llama's configuration",
        r"not a Yuan model: config.json names LlamaForCausalLM, .*",
        spoil=set_config(architectures=["LlamaForCausalLM"], model_type="llama"),
    ),
    Case("no tokenizer", r".* has no tokenizer.model: .*", spoil=remove("tokenizer.model")),
    Case("tokenizer cut off", r".*/tokenizer.model is incomplete .*", spoil=cut("tokenizer.model", 999)),
    Case("no weights", r".* has no weights.*", spoil=remove("model.safetensors")),
    Case("weights cut off", r".*/model.safetensors is incomplete .*", spoil=cut("model.safetensors", 99_999)),
    Case("Git LFS pointer", r".*/model.safetensors is a pointer of Git LFS.*", spoil=replace_by_pointer),
    Case("weight missing", r"the checkpoint lacks model.layers.1.mlp.up_proj.weight: .*", spoil=drop_weight),
    Case("file of weights missing", r".* lacks model-00002-of-00002.safetensors, .*", spoil=list_another_file),
    Case(
        "other sizes", r"[a-z_.]+ must be of shape \[2368, 192\] by config.json, .*", spoil=set_config(hidden_size=192)
    ),
    Case(
        "no compiler",
        r"the compiler g\+\+ is missing, .*",
        ("--model", "{model}", "--kv-cache-memory-bytes", "128M"),
        environment={"PATH": path_without("g++"), "CXX": ""},
    ),
    Case("no libnuma", r"libnuma.so.1 is missing: .*", wrapper=_hide_library("libnuma.so.1")),
    Case("cache too large", r"the KV cache .*, or stop other programs", ("--kv-cache-memory-bytes", "100000G")),
    Case(
        "cache flag missing",
        r"without --kv-cache-memory-bytes .*",
        ("--model", "{model}", "--enforce-eager", "--gpu-memory-utilization", "1"),
    ),
    Case("Ctrl-C during the import", "stopped by SIGINT .*", (), status=0, stop_signal=signal.SIGINT),
    Case("SIGTERM during the import", "stopped by SIGTERM .*", (), status=0, stop_signal=signal.SIGTERM),
    Case("length beyond the model's", r".*max_model_len.*", ("--max-model-len", "9999"), needs_engine=True),
    Case(
        "cache for no request",
        r"the KV cache is too small .*, or --max-model-len 512",
        ("--kv-cache-memory-bytes", "6M"),
        needs_engine=True,
    ),
    Case(
        "out of memory",
        r"the memory ran out: .*",
        ("--load-format", "dummy", "--hf-overrides", '{"intermediate_size": 2000000000}'),
        needs_engine=True,
    ),
)


def copy_demo(folder: Path) -> Path:
    """Copy the files of the demo model and return the copy."""
    return Path(
        shutil.copytree(
            DEMO, folder / "model", ignore=lambda _, names: {"2b-shape", "m32-shape", "training"} & {*names}
        )
    )
