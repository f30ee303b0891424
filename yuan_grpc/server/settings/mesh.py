"""Settings of what meshes and balancers read."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from yuan_grpc.server.settings import parsers as parse
from yuan_grpc.server.settings.environment import add_option, add_switch

ENGINE_SERVICE = "vllm.grpc.engine.VllmEngine"
"""The service of `--vllm-engine`."""


@dataclass(frozen=True)
class MeshSettings:
    """Settings of what meshes and balancers read.

    Attributes:
        load_reports: whether calls and a service report the load (ORCA).
        vllm_engine: whether `vllm.grpc.engine.VllmEngine` is served too.
        channelz_port: the port of channelz, on loopback, or 0 for any free port; None to disable it.
    """

    load_reports: bool = False
    vllm_engine: bool = False
    channelz_port: int | None = None

    @property
    def health_names(self) -> tuple[str, ...]:
        """Names of optional services that have a health of their own."""
        return (ENGINE_SERVICE,) if self.vllm_engine else ()


def add_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Add the options to a parser, in a group."""
    group = parser.add_argument_group("meshes and balancers, see docs/deploy.md")
    add: Callable[..., None] = partial(add_option, group, environment)
    add_switch(group, environment, "--load-reports", "report the load to balancers (ORCA)")
    add_switch(group, environment, "--vllm-engine", "serve the contract of SMG and llm-d, too")
    add("--channelz-port", "", parse.optional_port, "PORT", "loopback port of channelz (default: none)")


def read(options: argparse.Namespace) -> MeshSettings:
    """Return the settings from parsed options."""
    return MeshSettings(
        load_reports=options.load_reports, vllm_engine=options.vllm_engine, channelz_port=options.channelz_port
    )
