"""The server's settings: from a flag, else from the environment, else the default."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
        lora_folder: has a folder for each LoRA adapter that can be loaded; None where none can.
        http_port: of the HTTP calls, 0 for any free one; None where they are not served.
    """

    model: str
    host: str
    port: int
    grace_seconds: float
    engine_flags: tuple[str, ...]
    lora_folder: Path | None = None
    http_port: int | None = None

    @property
    def address(self) -> str:
        """Host and port as gRPC takes them."""
        return self.address_of(self.port)

    def address_of(self, port: int) -> str:
        """The host with a port."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

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
    """Declares the server's options. A default that the environment gives is checked like a flag, and where the options
    are parsed only: it is nothing to other commands."""
    parser.description = "Serves a Yuan 2.0 model over gRPC."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_model_options(parser, environment)
    add = partial(_add, parser, environment)
    add("--host", "127.0.0.1", _name, "HOST", "address to listen on; 0.0.0.0 for all (default: 127.0.0.1)")
    add("--port", "50051", _port, "PORT", "port to listen on, 0 for any free one (default: 50051)")
    add("--http-port", "", _optional_port, "PORT", "port of the HTTP calls, OpenAI's among them (default: none)")
    add("--grace-seconds", "30", _seconds, "S", "time for calls in flight to finish at SIGTERM (default: 30)")


def add_model_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Declares those that say what is loaded."""
    add = partial(_add, parser, environment)
    add("--model", DEMO, _model, "PATH_OR_ID", "checkpoint folder, or id on the hub (default: a demo, random)")
    add("--lora-folder", "", _folder, "FOLDER", "has the LoRA adapters that can be loaded (with --enable-lora)")


class _OfTheEnvironment(str):
    """A value that no flag gave."""


def _add(
    parser: argparse.ArgumentParser,
    environment: Mapping[str, str],
    flag: str,
    default: str,
    kind: Callable[[str], object],
    metavar: str,
    text: str,
) -> None:
    variable = PREFIX + flag.removeprefix("--").replace("-", "_").upper()

    def checked(value: str) -> object:
        try:
            return kind(value)
        except argparse.ArgumentTypeError as error:
            if isinstance(value, _OfTheEnvironment):
                raise argparse.ArgumentTypeError(f"environment variable {variable}: {error}") from None
            raise

    given = environment.get(variable)
    value = default if given is None else _OfTheEnvironment(given)
    parser.add_argument(flag, default=value, type=checked, metavar=metavar, help=text)


def read(options: argparse.Namespace, engine_flags: Sequence[str]) -> Settings:
    """Settings from parsed options and from the flags that were not ours."""
    return Settings(
        model=options.model,
        host=options.host,
        port=options.port,
        grace_seconds=options.grace_seconds,
        engine_flags=tuple(engine_flags),
        lora_folder=options.lora_folder,
        http_port=options.http_port,
    )


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _model(text: str) -> str:
    if text.startswith(("/", "./", "../", "~")) and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return _name(text)


def _folder(text: str) -> Path | None:
    if text and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return Path(text) if text else None


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a port, 0 to 65535, not {text!r}")


def _optional_port(text: str) -> int | None:
    return _port(text) if text else None


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if 0 <= seconds < float("inf"):
        return seconds
    raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, not {text!r}")
