"""Settings of metrics, traces and logs."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from yuan_grpc.server.settings import parsers as parse
from yuan_grpc.server.settings.environment import add_option


@dataclass(frozen=True)
class TelemetrySettings:
    """Settings of metrics and logs.

    Attributes:
        metrics_port: the port of the metrics, or 0 for any free port; None to disable it.
        log_format: text or json.
        otlp_traces_endpoint: the collector that spans are sent to; empty to disable them.
    """

    metrics_port: int | None = None
    log_format: str = "text"
    otlp_traces_endpoint: str = ""

    @property
    def vllm_flags(self) -> list[str]:
        """Flags for vLLM, which sends the spans of the engine to the same collector."""
        return ["--otlp-traces-endpoint", self.otlp_traces_endpoint] if self.otlp_traces_endpoint else []


def add_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add the options to a parser."""
    add = partial(add_option, parser.add_argument_group("metrics, traces and logs"), environment)
    add("--metrics-port", "", parse.optional_port, "PORT", "port of /metrics alone (default: none)")
    add("--otlp-traces-endpoint", "", str, "URL", "collector of traces (default: none)")
    add("--log-format", "text", parse.log_format, "FORMAT", "text or json (default: text)")
    add("--log-level", "info", parse.log_level, "LEVEL", "debug, info, warning, error (default: info)")


def read(options: argparse.Namespace) -> TelemetrySettings:
    """Return the settings from parsed options."""
    return TelemetrySettings(
        metrics_port=options.metrics_port,
        log_format=options.log_format,
        otlp_traces_endpoint=options.otlp_traces_endpoint,
    )
