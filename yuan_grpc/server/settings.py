"""The server's settings: from a flag, else from the environment, else the default."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

DEMO = str(files("yuan_grpc") / "demo")
DEMO_NAME = "yuan-demo"
DEMO_FLAGS = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "128M")
"""For a model of a megabyte: exact rather than fast, and not compiled, which would take longer than it ever runs."""

PREFIX = "YUAN_GRPC_"

EPILOG = """\
Each option can also be set in the environment: --grace-seconds as YUAN_GRPC_GRACE_SECONDS, and so on.

All other options go to vLLM's engine as they are, for example:
  --tensor-parallel-size 2     shard the model over GPUs
  --max-model-len 4096         the most tokens of prompt and answer together
  --gpu-memory-utilization 0.9 the share of a GPU's memory to use
  --max-num-queued-reqs 1000   refuse more, running and waiting (RESOURCE_EXHAUSTED)
`vllm serve --help=all` lists them all.
"""


@dataclass(frozen=True)
class Settings:
    """Everything the server is told, checked.

    Attributes:
        model: a checkpoint's folder, or its id on the Hugging Face hub.
        host: the address to listen on.
        port: 1 to 65535, or 0 for any free one.
        grace_seconds: how long calls in flight may go on once the server is told to stop.
        engine_flags: vLLM's own flags, unread.
    """

    model: str
    host: str
    port: int
    grace_seconds: float
    engine_flags: tuple[str, ...]

    @property
    def address(self) -> str:
        """Host and port as gRPC takes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_demo(self) -> bool:
        """Whether the embedded checkpoint is served."""
        return self.model == DEMO

    @property
    def vllm_flags(self) -> list[str]:
        """vLLM's flags, ours first so that those given win. Responses call a folder by its last part, not its path."""
        name = DEMO_NAME if self.is_demo else Path(self.model).name if Path(self.model).is_dir() else self.model
        defaults = DEMO_FLAGS if self.is_demo else ()
        return ["--model", self.model, "--served-model-name", name, *defaults, *self.engine_flags]


def add_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Declares the server's options; a default that the environment gives is checked like a flag.

    Raises:
        SystemExit: a variable is malformed; argparse has named it.
    """
    parser.description = "Serves a Yuan 2.0 model over gRPC."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG

    def option(flag: str, default: str, kind: Callable[[str], object], metavar: str, text: str) -> None:
        variable = PREFIX + flag.removeprefix("--").replace("-", "_").upper()
        try:
            value = kind(environment.get(variable, default))
        except argparse.ArgumentTypeError as error:
            parser.error(f"environment variable {variable}: {error}")
        parser.add_argument(flag, default=value, type=kind, metavar=metavar, help=text)

    option("--model", DEMO, _model, "PATH_OR_ID", "checkpoint folder, or id on the hub (default: a demo, random)")
    option("--host", "127.0.0.1", _name, "HOST", "address to listen on; 0.0.0.0 for all (default: 127.0.0.1)")
    option("--port", "50051", _port, "PORT", "port to listen on, 0 for any free one (default: 50051)")
    option("--grace-seconds", "30", _seconds, "S", "time for calls in flight to finish at SIGTERM (default: 30)")


def read(options: argparse.Namespace, engine_flags: Sequence[str]) -> Settings:
    """Settings from parsed options and from the flags that were not ours."""
    return Settings(
        model=options.model,
        host=options.host,
        port=options.port,
        grace_seconds=options.grace_seconds,
        engine_flags=tuple(engine_flags),
    )


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _model(text: str) -> str:
    if text.startswith(("/", "./", "../", "~")) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return _name(text)


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a port, 0 to 65535, not {text!r}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if 0 <= seconds < float("inf"):
        return seconds
    raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, not {text!r}")
