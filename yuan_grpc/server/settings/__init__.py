"""Server settings, read from flags, then the environment, then defaults."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from yuan_grpc.server.settings import demo, grpc_port, lifecycle, mesh, security, telemetry
from yuan_grpc.server.settings import parsers as parse
from yuan_grpc.server.settings.demo import DEMO as DEMO
from yuan_grpc.server.settings.demo import DEMO_FLAGS as DEMO_FLAGS
from yuan_grpc.server.settings.environment import add_option
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.server.settings.lifecycle import LifecycleSettings
from yuan_grpc.server.settings.mesh import MeshSettings
from yuan_grpc.server.settings.security import SecuritySettings
from yuan_grpc.server.settings.telemetry import TelemetrySettings

EPILOG = """\
Every other option is passed to vLLM's engine, for example:
  --max-model-len 4096        limit prompt and output together, in tokens
  --max-num-queued-reqs 1000  limit running and waiting requests
  --kv-cache-memory-bytes 4G  size of the KV cache
  --tensor-parallel-size 2    shard the model over GPUs
`yuan-grpc serve --help=all` lists them all, by group.

Environment variables such as YUAN_GRPC_GRACE_SECONDS set the options above;
flags take precedence.
"""


@dataclass(frozen=True)
class HttpSettings:
    """Settings of the HTTP port.

    Attributes:
        header_timeout: time for a client to send the head of a request, in seconds.
        body_timeout: time for a client to send a body, in seconds; more for a large one.
        max_connections: maximum open connections; None to derive it from the limit on open files.
        allowed_hosts: allowed names in `Host`, or `*`.
        allowed_origins: allowed values of `Origin`, or `*`.
    """

    header_timeout: float = 10
    body_timeout: float = 30
    max_connections: int | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """Validated server settings.

    Attributes:
        model: a checkpoint folder, or a model id on the Hugging Face hub.
        host: the address to listen on.
        port: the gRPC port, 1 to 65535, or 0 for any free port.
        grace_seconds: time for running calls to finish after a stop signal, in seconds.
        engine_flags: vLLM flags, passed through unparsed.
        log_level: debug, info, warning or error.
        frontends: the number of processes that serve calls; None to choose it from the number of CPUs.
        frontend_ports: the first of the additional ports, one per front end; None for none.
        message_interval: shortest time between the messages of a stream, in seconds; 0 to send tokens at once.
        lora_folder: the folder with a subfolder for each LoRA adapter that can be loaded; None to disable loading.
        http_port: the HTTP port, or 0 for any free port; None to disable HTTP.
        http: settings of the HTTP port.
        grpc: settings of the gRPC port.
        security: settings of TLS and of callers.
        telemetry: settings of metrics and logs.
        lifecycle: settings of a stop and of the stall watchdog.
        mesh: settings of the services for meshes and balancers.
    """

    model: str
    host: str
    port: int
    grace_seconds: float
    engine_flags: tuple[str, ...]
    lora_folder: Path | None = None
    http_port: int | None = None
    http: HttpSettings = HttpSettings()
    grpc: GrpcSettings = field(default_factory=GrpcSettings)
    security: SecuritySettings = field(default_factory=SecuritySettings)
    log_level: str = "info"
    frontends: int | None = None
    frontend_ports: int | None = None
    message_interval: float = 0
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    lifecycle: LifecycleSettings = field(default_factory=LifecycleSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)

    @property
    def address(self) -> str:
        """The gRPC address, `host:port`."""
        return self.address_of(self.port)

    def address_of(self, port: int) -> str:
        """Return `host:port`, with brackets around an IPv6 address."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    @property
    def is_demo(self) -> bool:
        """Whether the demo checkpoint of the package is served."""
        return self.model == DEMO

    @property
    def vllm_flags(self) -> list[str]:
        """All flags for vLLM. Defaults come first, so that `engine_flags` override them.

        The served name of a folder is its last path component.
        """
        name = demo.NAMES.get(self.model) or (Path(self.model).name if Path(self.model).is_dir() else self.model)
        flags = [*demo.FLAGS.get(self.model, ()), *self.telemetry.vllm_flags, *self.engine_flags]
        return ["--model", self.model, "--served-model-name", name, *flags]


def add_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add the server's options to a parser.

    Environment variables are validated like flags, but only when these options are parsed: other commands ignore them.
    """
    parser.description = "Serve a Yuan 2.0 model over gRPC."
    parser.usage = "yuan-grpc serve [OPTIONS]"  # argparse would print the full usage with each error
    parser.formatter_class = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
    parser.epilog = EPILOG
    models = parser.add_mutually_exclusive_group()
    _add_model_option(models, environment)
    demo.add_option(models)
    _add_lora_option(parser, environment)
    add = partial(add_option, parser, environment)
    add("--host", "127.0.0.1", parse.non_empty, "HOST", "0.0.0.0 for all (default: 127.0.0.1)")
    add("--port", "50051", parse.port, "PORT", "gRPC port, 0 for any (default: 50051)")
    add("--http-port", "", parse.optional_port, "PORT", "HTTP port, with OpenAI's API (default: none)")
    add("--frontends", "", parse.optional_count, "N", "processes for calls (default: by CPUs)")
    add("--frontend-ports", "", parse.optional_port, "PORT", "first of N gRPC ports, one for each process")
    add("--message-interval", "0", parse.seconds, "S", "to merge a stream's tokens (default: 0)")
    lifecycle.add_options(parser, environment)
    telemetry.add_options(parser, environment)
    security.add_options(parser, environment)
    grpc_port.add_options(parser, environment)
    _add_http_options(partial(add_option, parser.add_argument_group("limits of the HTTP port"), environment))
    mesh.add_options(parser, environment)


def _add_http_options(add: Callable[..., None]) -> None:
    add(
        "--http-header-timeout",
        "10",
        parse.positive_seconds,
        "S",
        "to send the head of a request (default: 10)",
    )
    add("--http-body-timeout", "30", parse.positive_seconds, "S", "to send a body (default: 30)")
    add(
        "--http-max-connections",
        "",
        parse.optional_count,
        "N",
        "connections (default: from `ulimit -n`)",
    )
    add(
        "--http-allowed-hosts",
        "",
        parse.names,
        "NAMES",
        "names in Host, or * for all",
    )
    add("--http-allowed-origins", "", parse.origins, "ORIGINS", "web origins, or * (default: none)")


def add_model_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add the options that select the model and its adapters to a parser."""
    _add_model_option(parser, environment)
    _add_lora_option(parser, environment)


def _add_model_option(options: argparse._ActionsContainer, environment: Mapping[str, str]) -> None:
    text = "checkpoint folder or hub id (default: demo)"
    add_option(options, environment, "--model", DEMO, parse.model, "PATH_OR_ID", text)


def _add_lora_option(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    text = "adapters to load (needs --enable-lora)"
    add_option(parser, environment, "--lora-folder", "", parse.optional_folder, "FOLDER", text)


def read(options: argparse.Namespace, engine_flags: Sequence[str]) -> Settings:
    """Return the settings from parsed options and the remaining flags, which are vLLM's."""
    return Settings(
        model=options.model,
        host=options.host,
        port=options.port,
        grace_seconds=options.grace_seconds,
        engine_flags=tuple(engine_flags),
        lora_folder=options.lora_folder,
        http_port=options.http_port,
        http=HttpSettings(
            header_timeout=options.http_header_timeout,
            body_timeout=options.http_body_timeout,
            max_connections=options.http_max_connections,
            allowed_hosts=options.http_allowed_hosts,
            allowed_origins=options.http_allowed_origins,
        ),
        grpc=grpc_port.read(options),
        security=security.read(options),
        log_level=options.log_level,
        frontends=options.frontends,
        frontend_ports=options.frontend_ports,
        message_interval=options.message_interval,
        telemetry=telemetry.read(options),
        lifecycle=lifecycle.read(options),
        mesh=mesh.read(options),
    )
