"""The Dockerfile and the compose file."""

import json
import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.server.settings import add_options

REPOSITORY = Path(__file__).parents[2]
COMPOSE = REPOSITORY / "deploy/compose"


@pytest.fixture(scope="module")
def image() -> str:
    """The second stage of the Dockerfile, an instruction a line."""
    return (REPOSITORY / "Dockerfile").read_text().split("\nFROM ")[2].replace("\\\n", " ")


def instruction(image: str, name: str) -> str:
    """Return the arguments of an instruction that occurs once."""
    (arguments,) = re.findall(rf"^{name} (.+)$", image, re.MULTILINE)
    return str(arguments)


def read_yaml(name: str) -> Any:
    return yaml.safe_load((COMPOSE / name).read_text())


def options_of_serve() -> set[str]:
    parser = ArgumentParser()
    add_options(parser, {})
    return {option for action in parser._actions for option in action.option_strings}


def test_the_image_has_the_labels_of_the_package(image: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\S+)="([^"]*)"', instruction(image, "LABEL")))
    assert instruction(image, "ARG") == f"VERSION={project['version']}"
    assert labels["version"] == "${VERSION}"
    assert labels["title"] == project["name"]
    assert labels["licenses"] == project["license"]
    base = instruction((REPOSITORY / "Dockerfile").read_text().split("\nFROM ")[0], "ARG")
    assert labels["base.name"].endswith(base.removeprefix("BASE=").partition("@")[0])


def test_the_image_checks_its_health_with_a_command_of_the_package(image: str) -> None:
    options, _, command = instruction(image, "HEALTHCHECK").partition(" CMD ")
    program, subcommand, service = json.loads(command)
    assert program == "yuan-grpc"
    assert subcommand in SUMMARIES
    assert service == "readiness"
    assert "--start-period=" in options


def test_the_image_keeps_its_caches_in_a_volume_of_its_user(image: str) -> None:
    folder = instruction(image, "VOLUME")
    assert re.search(rf"install --directory --owner yuan --group yuan --mode 700 {folder}$", image, re.MULTILINE)
    assert folder.startswith(instruction(image, "WORKDIR"))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instruction(image, "USER"))


def test_compose_mounts_only_what_exists() -> None:
    composition = read_yaml("compose.yaml")
    for service in composition["services"].values():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(.*)\}", r"\1", volume.rpartition(":/")[0])
            is_named = not source.startswith(".")
            assert source in composition["volumes"] if is_named else (COMPOSE / source).exists(), source


def test_compose_publishes_ports_on_loopback_and_pins_images() -> None:
    for name, service in read_yaml("compose.yaml")["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name


def test_compose_starts_the_server_with_options_that_it_has() -> None:
    composition = read_yaml("compose.yaml")
    command = composition["services"]["yuan"]["command"]
    flags = {argument for argument in command if argument.startswith("--")}
    assert flags <= options_of_serve()
    assert flags
    (job,) = read_yaml("prometheus.yaml")["scrape_configs"]
    assert job["dns_sd_configs"][0]["port"] == int(command[command.index("--metrics-port") + 1])
    assert job["dns_sd_configs"][0]["names"] == ["yuan"]


def test_a_stopping_container_has_time_to_finish_its_calls() -> None:
    service = read_yaml("compose.yaml")["services"]["yuan"]
    grace = int(service["command"][service["command"].index("--grace-seconds") + 1])
    assert int(service["stop_grace_period"].removesuffix("s")) > grace + 10
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]


def test_the_additions_for_gpus_name_services_of_the_composition() -> None:
    additions, composition = read_yaml("gpu.yaml"), read_yaml("compose.yaml")
    assert additions["services"].keys() <= composition["services"].keys()
    assert additions["services"]["yuan"]["build"]["args"] == {"EXTRA": "cuda"}
