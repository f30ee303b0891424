"""Settings: precedence of flag, environment and default, and the errors for invalid values."""

import argparse
from pathlib import Path

import pytest

from yuan_grpc.server import settings
from yuan_grpc.server.settings import DEMO, HttpSettings, Settings
from yuan_grpc.server.settings.demo import LOAD_TEST, M32_LOAD_TEST
from yuan_grpc.server.settings.grpc_port import GrpcSettings
from yuan_grpc.server.settings.lifecycle import LifecycleSettings
from yuan_grpc.server.settings.security import SecuritySettings
from yuan_grpc.server.settings.telemetry import TelemetrySettings

ROOT = Path(__file__).parents[2]


def read(*arguments: str, **environment: str) -> Settings:
    parser = argparse.ArgumentParser(prog="yuan-grpc serve", allow_abbrev=False)
    settings.add_options(parser, environment)
    return settings.read(*parser.parse_known_args(arguments))


def test_without_options_the_demo_is_served_on_loopback() -> None:
    assert read() == Settings(model=DEMO, host="127.0.0.1", port=50051, grace_seconds=30, engine_flags=())
    assert read().is_demo


def test_the_models_of_the_package_have_short_names() -> None:
    assert read("--demo", "small") == read()
    load_test = read("--demo", "2b-shape", "--seed=1")
    assert not load_test.is_demo
    name = ["--model", LOAD_TEST, "--served-model-name", "yuan-2b-shape"]
    assert load_test.vllm_flags == [*name, "--load-format", "dummy", "--tokenizer", DEMO, "--seed=1"]
    assert read("--demo", "m32-shape").vllm_flags[:4] == [
        "--model",
        M32_LOAD_TEST,
        "--served-model-name",
        "yuan-m32-shape",
    ]
    assert read("--demo", "2b-shape", YUAN_GRPC_MODEL="someone/model").model == LOAD_TEST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--demo", "7b"), "argument --demo: must be small, 2b-shape or m32-shape, not '7b'"),
        (("--demo", "2b-shape", "--model", "a/b"), "not allowed with argument"),
    ],
)
def test_an_invalid_choice_of_a_model_is_an_error(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(*options)
    assert message in capsys.readouterr().err


def test_a_flag_overrides_the_environment() -> None:
    assert read("--port", "1", YUAN_GRPC_PORT="2").port == 1
    assert read(YUAN_GRPC_PORT="2").port == 2


@pytest.mark.parametrize("value", ["65536", "-1", "http", "", "１２"])
def test_an_invalid_environment_variable_is_an_error_that_names_it(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(YUAN_GRPC_PORT=value)
    assert f"environment variable YUAN_GRPC_PORT: must be a port, 0 to 65535, not {value!r}" in capsys.readouterr().err


def test_http_is_enabled_by_its_port() -> None:
    assert read().http_port is None
    assert read(YUAN_GRPC_HTTP_PORT="").http_port is None
    assert read("--http-port", "8000").http_port == 8000
    assert read(YUAN_GRPC_HTTP_PORT="0").http_port == 0


def test_an_invalid_http_port_is_an_error_that_names_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read("--http-port=http")
    assert "argument --http-port: must be a port, 0 to 65535, not 'http'" in capsys.readouterr().err


def test_security_and_grpc_limits_are_settings() -> None:
    assert read().security == SecuritySettings()
    assert read().grpc == GrpcSettings()
    flags = ("--tls-cert-file=a.pem", "--tls-key-file", "a.key", "--tls-allowed-names=spiffe://A/b, c.example")
    assert read(*flags, YUAN_GRPC_TLS_CLIENT_CA_FILE="ca.pem", YUAN_GRPC_TOKEN_FILE="tokens").security == (
        SecuritySettings(
            Path("a.pem"), Path("a.key"), Path("ca.pem"), ("spiffe://A/b", "c.example"), False, Path("tokens")
        )
    )
    flags = ("--max-request-bytes=16M", "--max-response-bytes", "1000", "--max-connection-age=60")
    assert read(*flags, "--unix-socket=/run/s", YUAN_GRPC_MAX_CONCURRENT_STREAMS="5").grpc == GrpcSettings(
        Path("/run/s"), 16 << 20, 1000, 5, 60.0, None
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, False),
        (["--allow-plaintext"], {}, True),
        (["--allow-plaintext=false"], {"YUAN_GRPC_ALLOW_PLAINTEXT": "1"}, False),
        ([], {"YUAN_GRPC_ALLOW_PLAINTEXT": "TRUE"}, True),
        ([], {"YUAN_GRPC_ALLOW_PLAINTEXT": ""}, False),
    ],
    ids=["absent", "flag", "flag before variable", "variable", "empty variable"],
)
def test_a_switch_has_a_flag_and_a_variable(arguments: list[str], environment: dict[str, str], expected: bool) -> None:
    assert read(*arguments, **environment).security.allow_plaintext is expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--max-request-bytes=0", "must be a number of bytes below 2G, such as 4M, not '0'"),
        ("--max-request-bytes=2G", "must be a number of bytes below 2G, such as 4M, not '2G'"),
        ("--max-concurrent-streams=0", "must be a number, 1 or more, not '0'"),
        ("--max-connection-age=0", "must be a number of seconds above 0, not '0'"),
        ("--allow-plaintext=maybe", "must be true or false, not 'maybe'"),
    ],
)
def test_an_invalid_limit_is_an_error(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(argument)
    assert message in capsys.readouterr().err


def test_http_limits_and_allowed_names_are_settings() -> None:
    assert read().http == HttpSettings(10, 30, None, (), ())
    names, origins = "Service.example, localhost,", "https://App.example:8443,*"
    flags = ("--http-header-timeout=0.5", "--http-body-timeout=60", "--http-max-connections=100")
    read_settings = read(*flags, f"--http-allowed-hosts={names}", YUAN_GRPC_HTTP_ALLOWED_ORIGINS=origins)
    assert read_settings.http == HttpSettings(
        0.5, 60, 100, ("service.example", "localhost"), ("https://app.example:8443", "*")
    )


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("header-timeout", "0", "must be a number of seconds above 0"),
        ("body-timeout", "nan", "must be a number of seconds, 0 or more"),
        ("max-connections", "0", "must be a number, 1 or more"),
        ("max-connections", "many", "must be a number, 1 or more"),
        ("allowed-hosts", "a.example:80", "must be host names without a port, separated by commas"),
        ("allowed-hosts", "*.example", "must be host names without a port, separated by commas"),
        ("allowed-origins", "a.example", "must be origins such as https://example.com, separated by commas"),
        ("allowed-origins", "https://a.example/", "must be origins such as https://example.com, separated by commas"),
    ],
)
def test_an_invalid_http_setting_is_an_error(
    flag: str, value: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(f"--http-{flag}={value}")
    assert f"argument --http-{flag}: {rule}, not {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon"])
def test_an_invalid_flag_is_an_error_that_names_it(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(f"--grace-seconds={value}")
    assert f"argument --grace-seconds: must be a number of seconds, 0 or more, not {value!r}" in capsys.readouterr().err


def test_an_empty_model_variable_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(YUAN_GRPC_MODEL="")
    assert "environment variable YUAN_GRPC_MODEL: must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--model", "--lora-folder"])
def test_a_missing_folder_is_an_error_that_names_it(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(flag, "/nowhere")
    assert f"argument {flag}: must be an existing folder, not '/nowhere'" in capsys.readouterr().err


def test_vllms_flags_are_passed_through_and_override_the_defaults(tmp_path: Path) -> None:
    parsed = read("--model", str(tmp_path), "--max-model-len", "4096", "--served-model-name", "mine")
    assert parsed.engine_flags == ("--max-model-len", "4096", "--served-model-name", "mine")
    assert parsed.vllm_flags[-4:] == list(parsed.engine_flags)


def test_the_served_name_of_a_folder_is_its_last_path_component(tmp_path: Path) -> None:
    (tmp_path / "Yuan2-2B").mkdir()
    flags = read("--model", str(tmp_path / "Yuan2-2B")).vllm_flags
    assert flags[flags.index("--served-model-name") + 1] == "Yuan2-2B"


def test_the_served_name_of_a_hub_model_is_its_id() -> None:
    flags = read("--model", "IEITYuan/Yuan2-2B-hf").vllm_flags
    assert flags[flags.index("--served-model-name") + 1] == "IEITYuan/Yuan2-2B-hf"


def test_metrics_logs_and_lifecycle_are_settings() -> None:
    assert read().telemetry == TelemetrySettings(metrics_port=None, log_format="text")
    assert read("--metrics-port=9100", YUAN_GRPC_LOG_FORMAT="JSON").telemetry == TelemetrySettings(9100, "json")
    assert read().lifecycle == LifecycleSettings(0, 60, None)
    flags = ("--withdraw-seconds=5", "--stall-seconds=0", "--stall-exit-seconds=30")
    assert read(*flags).lifecycle == LifecycleSettings(5, 0, 30)


def test_an_invalid_log_format_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read("--log-format=xml")
    assert "argument --log-format: must be text or json, not 'xml'" in capsys.readouterr().err


SAMPLES = {
    "--tls-cert-file": "server.pem",
    "--tls-key-file": "server.key",
    "--tls-client-ca-file": "ca.pem",
    "--token-file": "tokens",
    "--metrics-port": "9400",
    "--log-format": "json",
    "--log-level": "warning",
    "--unix-socket": "/run/yuan",
}


@pytest.mark.parametrize("flag", SAMPLES)
def test_an_option_of_operation_has_a_variable_with_the_same_meaning(flag: str) -> None:
    variable = {"YUAN_GRPC_" + flag.removeprefix("--").replace("-", "_").upper(): SAMPLES[flag]}
    assert read(flag, SAMPLES[flag]) == read(**variable) != read()


def test_every_option_is_documented() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    settings.add_options(parser, {})
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert [flag for action in parser._actions for flag in action.option_strings if flag not in text] == []
