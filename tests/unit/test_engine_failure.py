"""The cause of a failed start, from what vLLM's processes report; and the lines of their log."""

import json
import logging
import logging.config
import os
from pathlib import Path

import pytest

from yuan_grpc.server.engine.vllm import engine_log
from yuan_grpc.server.engine.vllm.failure import MAX_CAUSE, describe

LOST = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
WRAPPER = ("Exception", "WorkerProc initialization failed due to an exception in a background process. See stack trace")


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([("ValueError", "the checkpoint lacks x"), WRAPPER], "the checkpoint lacks x"),
        ([("KeyError", "'x'"), WRAPPER], "KeyError: 'x'"),
        ([("ValueError", "a\n  b")], "a b"),
        ([("RuntimeError", "Worker failed with error 'too\nsmall', please check the stack trace")], "too small"),
        (
            [WRAPPER, ("RuntimeError", "a worker was killed by SIGKILL")],
            "a worker was killed by SIGKILL, probably because the memory ran out: set a smaller "
            "--kv-cache-memory-bytes, or stop other programs",
        ),
        (
            [("RuntimeError", "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")],
            "the memory ran out: set a smaller --kv-cache-memory-bytes or --max-model-len, or stop other programs",
        ),
        (
            [("OSError", "[Errno 28] No space left on device")],
            "the disk or /dev/shm is full: free some space, or enlarge /dev/shm (docker run --shm-size=2g)",
        ),
        (
            [
                (
                    "ValueError",
                    "it is larger than the available KV cache. The estimated maximum model length is 512.",
                )
            ],
            "the KV cache is too small for one request of the model's length: set a larger --kv-cache-memory-bytes, "
            "or --max-model-len 512",
        ),
        ([], str(LOST)),
    ],
)
def test_the_first_real_cause_is_reported_in_one_line(failures: list[tuple[str, str]], cause: str) -> None:
    assert describe(LOST, failures) == cause


def test_a_signal_that_ended_the_engine_is_named() -> None:
    error = RuntimeError("Engine core initialization failed. Failed core proc(s): {'EngineCore': -4}")
    assert describe(error, []) == (
        "the engine was killed by SIGILL, because this CPU lacks an instruction that vLLM or a compiled model uses"
    )


def test_a_long_cause_is_cut() -> None:
    assert describe(LOST, [("ValueError", "a" * 9999)]) == "a" * MAX_CAUSE + "…"


def record(level: int, message: str, *args: object, error: Exception | None = None, name: str = "vllm.x") -> str:
    """Return what the handler does with a record: a new line on stderr is captured by the caller."""
    info = (type(error), error, None) if error else None
    handler = engine_log.EngineLogHandler()
    made = logging.getLogger(name).makeRecord(name, level, __file__, 1, message, args, info)
    made.vllm_process_name = "Worker"
    handler.emit(made)
    return message


@pytest.fixture(autouse=True)
def log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine_log.LEVEL_VARIABLE, "info")
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)


def test_progress_and_real_warnings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    record(logging.INFO, "Starting to load model %s...", "x")
    record(logging.INFO, "loading weights: %d %%", 40, name="vllm.yuan_grpc.model")
    cache = "%s KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx"
    record(logging.INFO, cache, "GPU", "348,224", "8,192", 42.51)
    record(logging.WARNING, "the disk is slow")
    lines = [line.split(" ", 2)[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "INFO loading weights",
        "INFO loading weights: 40 %",
        "INFO GPU KV cache size: 348,224 tokens, Maximum concurrency for 8,192 tokens per request: 42.51x",
        "WARNING the disk is slow",
    ]


def test_harmless_warnings_and_details_are_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    for message in engine_log.HARMLESS:
        record(logging.WARNING, message)
    record(logging.INFO, "Initializing a V1 LLM engine")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("variable", "value"), [(engine_log.LEVEL_VARIABLE, "debug"), ("VLLM_LOGGING_LEVEL", "INFO")])
def test_everything_is_shown_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    record(logging.WARNING, engine_log.HARMLESS[0])
    record(logging.INFO, "Initializing a V1 LLM engine")
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_error_of_a_start_goes_to_the_file_and_a_later_one_to_the_log(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with engine_log.failure_file(str(tmp_path)) as file:
        record(logging.ERROR, "WorkerProc failed to start.", error=ValueError("too large"))
        assert engine_log.read_failures(file) == [("ValueError", "too large")]
    assert capsys.readouterr().err == ""
    assert engine_log.FAILURES_VARIABLE not in os.environ
    assert not file.exists()
    record(logging.ERROR, "EngineCore encountered a fatal error.", error=ValueError("too large"))
    assert "ValueError: too large" in capsys.readouterr().err


@pytest.mark.parametrize(("level", "expected"), [(None, logging.INFO), ("debug", logging.DEBUG)])
def test_the_configuration_is_loaded_with_the_level_of_that_moment(
    monkeypatch: pytest.MonkeyPatch, level: str | None, expected: int
) -> None:
    if level:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
    config = json.loads(Path(engine_log.CONFIG_FILE).read_text())
    config["loggers"] = {"vllm_test_level": config["loggers"]["vllm"]}
    logging.config.dictConfig(config)
    logger = logging.getLogger("vllm_test_level")
    assert logger.level == expected
    assert [type(handler) for handler in logger.handlers] == [engine_log.EngineLogHandler]
