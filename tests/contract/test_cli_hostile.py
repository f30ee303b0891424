"""The commands against broken and hostile servers: one line on stderr, an exit status, and no escape sequences."""

import asyncio
import json
import struct
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from hostile_server import GOAWAY, Answer, HostileServer, frame, serve, serve_frames

from yuan_grpc.__main__ import main
from yuan_grpc.v1 import yuan_pb2 as pb

HOSTILE = "a\x1b[2J\x9b31m\u202eexe\u2066\u2028b\nc\td"
AT_TERMINAL = "a\ufffd[2J\ufffd31m\ufffdexe\ufffd\ufffdb\nc\td"
AS_LINE = "a\ufffd[2J\ufffd31m\ufffdexe\ufffd\ufffdb c d"

MODEL = pb.GetModelResponse(
    name="m", dtype="fake", sizes=pb.ModelSizes(tokens=9), limits=pb.Limits(max_model_len=1024, max_num_seqs=1)
)
COMMANDS = [
    ("generate", "a"),
    ("generate", "a", "--json"),
    ("generate", "a", "-n", "2"),
    ("chat",),
    ("bench", "--requests", "1", "--prompt-tokens", "2"),
]


def run(server: HostileServer, *arguments: str, retries: str = "0") -> int:
    """Run a command against the server and return the exit status."""
    with serve(server) as address:
        return main([*arguments, "--retries", retries, "--address", address])


def finished(text: str) -> pb.Choice:
    return pb.Choice(text=text, finish_reason=pb.FINISH_REASON_LENGTH)


@pytest.fixture
def question(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line on stdin, which is no terminal."""
    monkeypatch.setattr(sys, "stdin", ["hello\n"])
    monkeypatch.setattr("yuan_grpc.cli.chat.is_terminal", lambda stream: stream is sys.stdout and stream.isatty())


@pytest.mark.usefixtures("question")
@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ((pb.GenerateResponse(), pb.GenerateStreamResponse()), "has no choices"),
        ((b"\xff\xff", b"\xff\xff"), "is missing or malformed"),
        (
            (
                pb.GenerateResponse(choices=[finished("a"), finished("b")]),
                pb.GenerateStreamResponse(choices=[pb.Choice(index=2**31)]),
            ),
            "the wrong index",
        ),
        (
            (pb.GenerateResponse(choices=[pb.Choice()]), pb.GenerateStreamResponse(choices=[pb.Choice()])),
            "ends before choice 0 is finished",
        ),
    ],
    ids=["no choices", "malformed", "wrong index", "unfinished"],
)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_broken_response_is_one_error_line(
    command: tuple[str, ...], answers: tuple[Answer, Answer], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = HostileServer({"Generate": [answers[0]], "GenerateStream": [answers[1]], "GetModel": [MODEL]})
    assert run(server, *command) == 1
    out, err = capsys.readouterr()
    if "--json" in command:
        assert problem in json.loads(out)["error"]["message"]
    else:
        assert err.startswith("yuan-grpc: INTERNAL: the server's response ")
        assert problem in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(("tokens", "limit"), [(0, 1024), (9, 0), (0, 0)])
def test_bench_rejects_a_model_without_tokens(tokens: int, limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = pb.GetModelResponse(sizes=pb.ModelSizes(tokens=tokens), limits=pb.Limits(max_model_len=limit))
    assert run(HostileServer({"GetModel": [model]}), "bench", "--requests", "1") in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("question")
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_error_of_a_server_is_one_visible_line(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    server = HostileServer({"GetModel": [MODEL]}, code=grpc.StatusCode.PERMISSION_DENIED, details=HOSTILE)
    assert run(server, *command) == 1
    out, err = capsys.readouterr()
    if "--json" in command:
        assert json.loads(out)["error"]["message"] == HOSTILE
    else:
        assert err == f"yuan-grpc: PERMISSION_DENIED: {AS_LINE}\n"


def test_the_table_of_bench_has_no_text_of_the_server_that_is_not_visible(capsys: pytest.CaptureFixture[str]) -> None:
    model = pb.GetModelResponse.FromString(MODEL.SerializeToString())
    model.name = model.dtype = HOSTILE
    stream = [pb.GenerateStreamResponse(choices=[finished(HOSTILE)])]
    server = HostileServer({"GetModel": [model], "GenerateStream": stream})
    assert run(server, "bench", "--requests", "1", "--concurrency", "1", "--prompt-tokens", "2") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{AS_LINE} ({AS_LINE}) at ")
    assert out.count("\n") == 5


@pytest.mark.usefixtures("question")
@pytest.mark.parametrize("command", COMMANDS[:4], ids=" ".join)
@pytest.mark.parametrize("at_terminal", [True, False], ids=["terminal", "pipe"])
def test_generated_text_is_changed_at_a_terminal_only(
    command: tuple[str, ...], at_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: at_terminal)
    choices = [finished(HOSTILE)]
    server = HostileServer(
        {
            "Generate": [pb.GenerateResponse(choices=choices)],
            "GenerateStream": [pb.GenerateStreamResponse(choices=choices)],
        }
    )
    assert run(server, *command) == 0
    out = capsys.readouterr().out
    expected = AT_TERMINAL if at_terminal else HOSTILE
    if "--json" in command:
        expected = json.dumps(expected, ensure_ascii=False)[1:-1].replace("\ufffd[2J", "\\u001b[2J")
    assert expected in out
    assert ("\x9b" in out) != at_terminal


def test_generated_text_is_written_to_a_file_unchanged(tmp_path: Path) -> None:
    server = HostileServer({"GenerateStream": [pb.GenerateStreamResponse(choices=[finished(HOSTILE)])]})
    assert run(server, "generate", "a", "-o", str(tmp_path / "text")) == 0
    assert (tmp_path / "text").read_bytes().decode() == f"{HOSTILE}\n"


def test_the_error_of_a_failed_prompt_has_the_request_id(capsys: pytest.CaptureFixture[str]) -> None:
    server = HostileServer(code=grpc.StatusCode.INTERNAL, details="see the log")
    assert run(server, "generate", "a", "--set", "request_id=mine") == 1
    assert capsys.readouterr().err == "yuan-grpc: INTERNAL: see the log (request mine)\n"
    response = pb.GenerateResponse(request_id="from-server")
    assert run(HostileServer({"Generate": [response]}), "generate", "a", "--json") == 1
    assert json.loads(capsys.readouterr().out)["request_id"] == "from-server"


@pytest.mark.timeout(60)
def test_the_log_of_grpc_does_not_print_text_of_the_server() -> None:
    goaway = frame(GOAWAY, 0, 0, struct.pack(">II", 0, 2) + HOSTILE.encode())
    with serve_frames(lambda stream_id: goaway) as address:
        command = [sys.executable, "-m", "yuan_grpc", "generate", "a", "--retries", "0", "--address", address]
        result = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert result.returncode == 1
    stderr = result.stderr.decode()
    assert stderr.startswith("yuan-grpc: UNAVAILABLE: ")
    assert "exe" in stderr  # the text, without the characters that no line may have
    assert not set(stderr) & set("\x1b\x9b\u202e\u2066\u2028\t")
    assert stderr.count("\n") <= 3


@pytest.mark.parametrize(("reported", "concurrency"), [(0, 1), (1, 1), (64, 64), (2**32 - 1, 1024)])
def test_humaneval_bounds_the_concurrency_that_a_server_reports(reported: int, concurrency: int) -> None:
    humaneval = pytest.importorskip("yuan_grpc.cli.humaneval")
    model = pb.GetModelResponse(limits=pb.Limits(max_num_seqs=reported))
    assert humaneval._default_concurrency(model) == concurrency


def test_humaneval_records_no_sample_of_a_response_without_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"task_id": "HumanEval/0", "prompt": "a"}\n')
    health = b"\x08\x01"
    answers: dict[str, list[Answer]] = {
        "Watch": [health],
        "GetModel": [MODEL],
        "Tokenize": [pb.TokenizeResponse()],
        "Generate": [pb.GenerateResponse()],
    }
    monkeypatch.setattr("yuan_grpc.humaneval.generation.MIN_BACKOFF", 0.001)
    server, folder = HostileServer(answers), tmp_path / "run"
    with serve(server) as address:
        status = main(["humaneval", "generate", str(folder), "--prompts", str(prompts), "--target", address])
    assert status == 1
    assert "samples failed, the first for HumanEval/0: INTERNAL: the server's response has no choices" in (
        capsys.readouterr().err
    )
    (record,) = map(json.loads, (folder / "generations.jsonl").read_text().splitlines()[1:])
    assert record["error"]["code"] == "INTERNAL"


async def test_humaneval_waits_at_most_its_patience_for_a_retry() -> None:
    generation = pytest.importorskip("yuan_grpc.humaneval.generation")
    target = generation.Target("one", None, 1)
    waiting = generation.Generation(None, [target], patience=5.0, clock=lambda: 0.0, sleep=asyncio.sleep)
    waiting._back_off(target, 0.0, 3600.0)
    assert target.backoff_until == 5.0
    for _ in range(2_000):
        waiting._back_off(target, target.backoff_until, None)
    assert target.failures == 2_001
