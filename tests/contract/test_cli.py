"""The client commands in this process, against the real service with a fake engine."""

import argparse
import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import INFO, FakeEngine, last, more
from servers import serve_grpc

from yuan_grpc.__main__ import main
from yuan_grpc.cli import bench_table, load_generator
from yuan_grpc.cli.common.output import Output
from yuan_grpc.cli.common.signals import InterruptibleLoop
from yuan_grpc.cli.generate_many import PromptBatch
from yuan_grpc.client import Result
from yuan_grpc.client.errors import error_from_code
from yuan_grpc.server.engine.types import ChoiceDelta, EngineRequest, FinishReason, StepOutput
from yuan_grpc.server.errors import OverloadedError
from yuan_grpc.v1 import yuan_pb2 as pb

Captured = pytest.CaptureFixture[str]


async def run(engine: FakeEngine, *arguments: str) -> int:
    """Run a command against a server with this engine, and return the exit status."""
    async with serve_grpc(engine) as address:
        return await asyncio.to_thread(main, [*arguments, "--address", address])


def prompt_of(engine_request: EngineRequest) -> str:
    return "".join(map(chr, engine_request.prompt))


class UppercaseEngine(FakeEngine):
    """Returns the prompt in capitals. Rejects one that starts with `!`. Ends one with `1` only after one with `2`."""

    def __init__(self) -> None:
        super().__init__()
        self.second_finished = asyncio.Event()

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(engine_request)
        prompt = prompt_of(engine_request)
        if prompt.startswith("!"):
            raise OverloadedError("too many requests")
        yield StepOutput()
        if prompt.startswith("1"):
            await self.second_finished.wait()
        yield StepOutput(
            [step for index in range(engine_request.sampling.n) for step in last(prompt.upper(), index).deltas]
        )
        if prompt.startswith("2"):
            self.second_finished.set()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Set the bytes that a command reads from stdin."""

    def put(raw: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))

    return put


# generate


async def test_generate_prints_the_text_and_a_line_break(capsys: Captured) -> None:
    engine = FakeEngine(more("珠穆"), last("朗玛"))
    assert await run(engine, "generate", "山", "--top-k", "5", "--seed", "7", "--stop", "x", "--set", "min_p=0.5") == 0
    assert capsys.readouterr() == ("珠穆朗玛\n", "")
    (engine_request,) = engine.requests
    assert prompt_of(engine_request) == "山"
    assert (engine_request.sampling.max_tokens, engine_request.sampling.top_k, engine_request.sampling.seed) == (
        256,
        5,
        7,
    )
    assert (engine_request.sampling.stop, engine_request.sampling.min_p) == (("x",), 0.5)


@pytest.mark.parametrize("arguments", [(), ("-",)])
async def test_a_prompt_can_come_from_stdin(arguments: tuple[str, ...], stdin: Any, capsys: Captured) -> None:
    stdin("\ufeff两行\n文字\r\n".encode())
    engine = FakeEngine(last("yes"))
    assert await run(engine, "generate", *arguments) == 0
    assert prompt_of(engine.requests[0]) == "两行\n文字"
    assert capsys.readouterr().out == "yes\n"


@pytest.mark.parametrize(("raw", "message"), [(b"\n", "stdin has no prompt"), (b"\xff", "stdin is not UTF-8")])
def test_stdin_without_a_prompt_is_a_usage_error(raw: bytes, message: str, stdin: Any, capsys: Captured) -> None:
    stdin(raw)
    assert main(["generate"]) == 2
    assert capsys.readouterr().err == f"yuan-grpc: {message}\n"


async def test_json_output_is_one_line_per_prompt(capsys: Captured) -> None:
    assert await run(FakeEngine(last("是\n的")), "generate", "AB", "--json", "--set", "request_id=mine") == 0
    (line,) = capsys.readouterr().out.splitlines()
    answer = json.loads(line)
    assert isinstance(answer.pop("seed"), int)
    assert answer == {
        "index": 0,
        "request_id": "mine",
        "prompt": "AB",
        "text": "是\n的",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "cached_tokens": 0},
        "model": "fake",
        "choices": [{"index": 0, "text": "是\n的", "token_ids": [26159, 10, 30340], "finish_reason": "length"}],
    }


async def test_several_choices_are_numbered(capsys: Captured) -> None:
    assert await run(UppercaseEngine(), "generate", "ab", "-n", "2") == 0
    assert capsys.readouterr().out == "[1.1] ab\nAB\n\n[1.2] ab\nAB\n\n"


async def test_many_prompts_are_written_in_input_order(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("1a\n\n2b\n3c\n")
    assert await run(UppercaseEngine(), "generate", "--file", str(path)) == 0
    assert capsys.readouterr() == ("[1] 1a\n1A\n\n[2] 2b\n2B\n\n[3] 3c\n3C\n\n", "")


async def test_a_failed_prompt_is_reported_and_the_others_complete(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "top_p": 3, "min_p": 3}\n{"prompt": "c"}\n')
    assert await run(UppercaseEngine(), "generate", "--file", str(path)) == 1
    out, err = capsys.readouterr()
    assert out == "[1] a\nA\n\n[3] c\nC\n\n"
    assert err == (
        "yuan-grpc: prompt 2: INVALID_ARGUMENT: `top_p` must be between 0 and 1, not 3.0; "
        "`min_p` must be between 0 and 1, not 3.0\n"
        "  top_p: `top_p` must be between 0 and 1, not 3.0\n"
        "  min_p: `min_p` must be between 0 and 1, not 3.0\n"
        "yuan-grpc: 1 of 3 prompts failed\n"
    )


async def test_json_output_of_a_failed_prompt_has_the_error(tmp_path: Path, capsys: Captured) -> None:
    path, written = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "top_p": 3}\n')
    assert await run(UppercaseEngine(), "generate", "--file", str(path), "--json", "-o", str(written)) == 1
    assert capsys.readouterr() == ("", "yuan-grpc: 1 of 2 prompts failed\n")
    first, second = map(json.loads, written.read_text().splitlines())
    assert (first["index"], first["text"]) == (0, "A")
    assert re.fullmatch("[0-9a-f]{32}", second.pop("request_id"))
    sentence = "`top_p` must be between 0 and 1, not 3.0"
    error = {
        "code": "INVALID_ARGUMENT",
        "reason": "INVALID_REQUEST",
        "message": sentence,
        "violations": [{"field": "top_p", "description": sentence}],
    }
    assert second == {"index": 1, "prompt": "b", "error": error}


class InterruptedClient:
    """A client that yields its second result first and then receives Ctrl-C."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: Any) -> None: ...

    async def generate_many(self, requests: Any, *, concurrency: int, ordered: bool) -> AsyncGenerator[Result, None]:
        error = error_from_code(grpc.StatusCode.INTERNAL, "no")
        yield Result(1, requests[1], None, error)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()


def test_ctrl_c_writes_every_received_result(capsys: Captured, tmp_path: Path) -> None:
    client: Any = InterruptedClient()
    requests = [pb.GenerateRequest(prompt=name) for name in "abc"]
    options = argparse.Namespace(concurrency=2, json=True, address="")
    with Output(tmp_path / "answers.jsonl") as output, InterruptibleLoop() as loop:
        assert PromptBatch(client, requests, output, options).run(loop) == 130
    (line,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "b"
    assert capsys.readouterr().err == "yuan-grpc: cancelled: 1 of 3 prompts completed\n"


def test_a_second_ctrl_c_does_not_wait_for_a_paused_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    handler, (read_end, write_end) = signal.getsignal(signal.SIGINT), os.pipe()

    async def block_in_write() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        print("x" * 1_000_000, flush=True)  # more than a pipe holds
        await asyncio.Event().wait()

    async def print_again() -> None:
        print("printed again", flush=True)

    with open(read_end) as reader, open(write_end, "w") as writer, InterruptibleLoop() as loop:
        monkeypatch.setattr(sys, "stdout", writer)
        with pytest.raises(KeyboardInterrupt):
            loop.run(block_in_write())
        loop.run(print_again())
        assert reader.readline() == "printed again\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_keeps_the_output_of_a_cancelled_coroutine(capfd: pytest.CaptureFixture[str]) -> None:
    async def print_when_cancelled() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            signal.raise_signal(signal.SIGINT)
            print("final output", flush=True)

    with InterruptibleLoop() as loop, pytest.raises(KeyboardInterrupt):
        loop.run(print_when_cancelled())
    assert capfd.readouterr().out == "final output\n"


def test_without_fcntl_only_humaneval_is_missing() -> None:
    program = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import yuan_grpc.__main__ as m; m.main()"
    )
    result = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert "generate" in result.stdout
    assert "humaneval" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "last_line"),
    [
        (("genrate", "a"), "yuan-grpc: error: unknown command 'genrate': did you mean generate?"),
        (("x", "a"), "yuan-grpc: error: unknown command 'x'"),
        (
            ("generate", "a", "--max_token=3"),
            "yuan-grpc generate: error: unrecognized arguments: --max_token=3: did you mean --max-tokens?",
        ),
        (("bench", "-z"), "yuan-grpc bench: error: unrecognized arguments: -z"),
        (
            ("bench", "--concurency", "4"),
            "yuan-grpc bench: error: unrecognized arguments: --concurency 4: did you mean --concurrency?",
        ),
        (
            ("humaneval", "score", "r", "--problem", "x"),
            "yuan-grpc humaneval score: error: unrecognized arguments: --problem x: did you mean --problems?",
        ),
    ],
)
def test_an_unknown_name_gets_a_suggestion(arguments: tuple[str, ...], last_line: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == last_line


def test_without_arguments_the_help_is_an_error(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "complete one prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "--file", "b"), "a prompt argument and --file are mutually exclusive"),
        (("--file", "no/such.txt"), "no/such.txt cannot be read: No such file or directory"),
        (("a", "-o", "no/such.txt"), "no/such.txt cannot be written: No such file or directory"),
        (("a", "--concurrency", "0"), "--concurrency must be at least 1, not 0"),
        (("\udcff",), "the prompt is not UTF-8"),
        (("a", "--address", "nowhere"), "`target` must be host:port or a gRPC target"),
        (("a", "--address", "example.org:1", "--token", "x"), "`token` needs `tls`"),
        (("a", "--retries", "-1"), "`retries` must be at least 0, not -1"),
        (("a", "--tls", __file__), "--tls"),
    ],
)
def test_a_usage_error_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: Captured, request: pytest.FixtureRequest
) -> None:
    status = main(["generate", "--retries", "0", "--address", "127.0.0.1:1", *arguments])
    stderr = capsys.readouterr().err
    if message != "--tls":  # gRPC rejects a file that is not a certificate only when it connects
        assert status == 2
        assert stderr.startswith(f"yuan-grpc: {message}")
    assert status in (1, 2)
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--tls", "a prompt"), "no such file: 'a prompt' (put the prompt before the options or after --)"),
        (("--timeout", "0"), "must be a number of seconds above 0, not '0'"),
        (("--proxy", "foo"), "must be http://host:port, not 'foo'"),
        (("--metadata", "a"), "must be KEY=VALUE with "),
        (("--metadata", "a=é"), "the value of a must be printable ASCII"),
        (("--metadata", "x-bin=1"), "the key must not end with '-bin'"),
        (("--metadata", "grpc-x=1"), "the key must not begin with 'grpc-'"),
        (("--set", "foo=1"), "GenerateRequest has no field `foo`"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
    ],
)
def test_the_error_for_an_invalid_option_gives_the_reason(
    option: tuple[str, ...], message: str, capsys: Captured
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["generate", "a", *option])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


async def test_generate_does_not_overwrite_the_prompt_file(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\n")
    assert await run(UppercaseEngine(), "generate", "--file", str(path), "-o", str(path)) == 2
    assert path.read_text() == "a\n"
    assert "would overwrite" in capsys.readouterr().err


def test_an_unreachable_server_gives_a_hint(capsys: Captured) -> None:
    assert main(["generate", "a", "--address", "127.0.0.1:1", "--retries", "0"]) == 1
    assert capsys.readouterr().err == (
        "yuan-grpc: UNAVAILABLE: nothing listens on 127.0.0.1:1: start a server with `yuan-grpc serve`, "
        "or name another with --address or YUAN_GRPC_ADDRESS\n"
    )


def test_the_address_is_read_from_the_environment(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YUAN_GRPC_ADDRESS", "127.0.0.1:2")
    assert main(["generate", "a", "--retries", "0"]) == 1
    assert "nothing listens on 127.0.0.1:2:" in capsys.readouterr().err


async def test_an_error_keeps_the_text_already_printed(capsys: Captured) -> None:
    assert await run(FakeEngine(more("half"), OverloadedError("no more")), "generate", "a") == 1
    assert capsys.readouterr() == ("half\n", "yuan-grpc: RESOURCE_EXHAUSTED: no more\n")


async def test_an_exceeded_deadline_is_an_error(capsys: Captured) -> None:
    assert await run(FakeEngine(hangs=True), "generate", "a", "--timeout", "0.2") == 1
    assert capsys.readouterr().err.startswith("yuan-grpc: DEADLINE_EXCEEDED: ")


# chat


class EchoEngine(FakeEngine):
    """Returns the last message. Returns no text for `empty`; rejects `!`."""

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(engine_request)
        message = prompt_of(engine_request).removesuffix(">").split("|")[-1]
        if message == "!":
            raise OverloadedError("too many requests")
        yield StepOutput()
        yield (
            StepOutput([ChoiceDelta(0, "", [0], finish_reason=FinishReason.STOP)])
            if message == "empty"
            else last(f"<{message}")
        )


async def chat(stdin: Any, *lines: str, options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    """Run a chat with these lines on stdin, and return the exit status and the engine's prompts."""
    stdin("".join(f"{line}\n" for line in lines).encode())
    engine = EchoEngine()
    status = await run(engine, "chat", "--retries", "0", *options)
    return status, [prompt_of(engine_request) for engine_request in engine.requests]


async def test_each_message_is_sent_with_the_whole_conversation(stdin: Any, capsys: Captured) -> None:
    assert await chat(stdin, "一", "", "二", "//x") == (0, ["一>", "一|<一|二>", "一|<一|二|<二|/x>"])
    assert capsys.readouterr() == ("<一\n<二\n</x\n", "")


async def test_the_system_message_starts_every_conversation(stdin: Any) -> None:
    _, prompts = await chat(stdin, "a", "/reset", "b", options=("--system", "S"))
    assert prompts == ["S|a>", "S|b>"]


async def test_undo_removes_the_last_message_and_its_reply(stdin: Any, capsys: Captured) -> None:
    _, prompts = await chat(stdin, "a", "b", "/undo", "c", "/undo", "/undo", "/undo", "d")
    assert prompts == ["a>", "a|<a|b>", "a|<a|c>", "d>"]
    assert capsys.readouterr().err == "yuan-grpc: there is no message to undo\n"


async def test_a_conversation_can_be_saved_and_loaded(stdin: Any, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    status, prompts = await chat(stdin, "你", f"/save {path}", "/reset", "b", f"/load {path}", "c")
    assert (status, prompts) == (0, ["你>", "b>", "你|<你|c>"])
    messages = [{"role": "user", "content": "你"}, {"role": "assistant", "content": "<你"}]
    assert json.loads(path.read_text()) == {"messages": messages}


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"messages": 3}', '[{"role": "x", "content": "a"}]', '[{"role": "user", "content": ""}]']
)
async def test_an_invalid_conversation_file_is_rejected(
    stdin: Any, tmp_path: Path, text: str, capsys: Captured
) -> None:
    path = tmp_path / "saved.json"
    path.write_text(text)
    assert await chat(stdin, "a", f"/load {path}", "b") == (1, ["a>", "a|<a|b>"])
    assert capsys.readouterr().err.startswith(f"yuan-grpc: {path} is not a conversation: ")


async def test_fields_can_be_set_during_a_chat(stdin: Any, capsys: Captured) -> None:
    lines = ("a", "/set top_k=5", "/set", "/set top_k", "/set", "/set foo=1", "/set prompt=x", "/nope")
    stdin("".join(f"{line}\n" for line in (*lines, "b")).encode())
    engine = EchoEngine()
    assert await run(engine, "chat") == 1
    assert capsys.readouterr().err == (
        '{"max_tokens": 512, "top_k": 5}\n'
        '{"max_tokens": 512}\n'
        "yuan-grpc: GenerateRequest has no field `foo`\n"
        "yuan-grpc: `prompt` cannot be set in a chat\n"
        "yuan-grpc: unknown command /nope: /help lists commands, // sends a message that begins with /\n"
    )


async def test_a_failed_message_is_dropped(stdin: Any, capsys: Captured) -> None:
    assert await chat(stdin, "a", "!", "empty", "b", "/quit", "c") == (
        1,
        ["a>", "a|<a|!>", "a|<a|empty>", "a|<a|b>"],
    )
    assert capsys.readouterr().err == (
        "yuan-grpc: RESOURCE_EXHAUSTED: too many requests\n[empty reply; the message was dropped]\n"
    )


async def test_a_conversation_that_is_too_long_can_continue(stdin: Any, capsys: Captured) -> None:
    half = "x" * (INFO.max_model_len // 2)
    truncating = "/set truncate_prompt_tokens=-1"
    status, prompts = await chat(stdin, half, half, truncating, "b", options=("--max-tokens", "8"))
    assert (status, len(prompts), len(prompts[-1])) == (1, 2, INFO.max_model_len - 8)
    assert "The conversation is too long; the message was dropped." in capsys.readouterr().err


async def test_truncate_drops_the_start_of_the_conversation(stdin: Any) -> None:
    half = "x" * (INFO.max_model_len // 2)
    status, prompts = await chat(stdin, half, half, "b", options=("--max-tokens", "8", "--truncate"))
    assert (status, [len(prompt) for prompt in prompts[1:]]) == (0, [INFO.max_model_len - 8] * 2)


class TerminalInput(io.StringIO):
    """An input stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Let `input` return these lines or raise these exceptions, and then end as at Ctrl-D."""
    rest = iter((*lines, EOFError))

    def read(prompt: str) -> str:
        line = next(rest)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", TerminalInput())
    monkeypatch.setattr("builtins.input", read)


@pytest.mark.parametrize("key", [KeyboardInterrupt, EOFError])
async def test_ctrl_c_and_ctrl_d_at_the_prompt_leave_a_chat(
    key: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    type_lines(monkeypatch, key, "not read")
    assert await run(EchoEngine(), "chat") == 0
    assert capsys.readouterr().out == "\n"


async def test_a_chat_names_the_model(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    type_lines(monkeypatch)
    assert await run(EchoEngine(), "chat") == 0
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"fake at 127\.0\.0\.1:\d+", first)
    assert "/help" in second


async def test_a_quiet_chat_prints_replies_only(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    type_lines(monkeypatch, "a")
    assert await run(EchoEngine(), "chat", "--quiet") == 0
    assert capsys.readouterr() == ("<a\n\n", "")


async def test_a_chat_shows_times_and_rates_on_request(stdin: Any, capsys: Captured) -> None:
    assert (await chat(stdin, "ab", "/verbose", "c", options=("--verbose",)))[0] == 0
    output, rates = capsys.readouterr()
    assert output == "<ab\n<c\n"
    names = [line.partition(":")[0] for line in rates.splitlines()]
    assert names == ["prompt", "reply", "first token", "rate", "total"]
    assert "reply:        3 tokens, finish reason length\n" in rates


async def test_a_chat_keeps_no_history_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    type_lines(monkeypatch, "a")
    assert await run(EchoEngine(), "chat", "--no-history") == 0
    assert os.listdir(tmp_path) == []
    type_lines(monkeypatch, "a")
    assert await run(EchoEngine(), "chat") == 0
    assert os.listdir(tmp_path / "yuan-grpc") == ["chat_history"]


def test_a_chat_without_a_server_ends_before_the_first_message(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    type_lines(monkeypatch, AssertionError)
    assert main(["chat", "--address", "127.0.0.1:1", "--retries", "0"]) == 1
    assert "nothing listens on 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "prompts"),
    [
        (['"""a', "", 'b"""', "c"], ["a\n\nb>", "a\n\nb|<a\n\nb|c>"]),
        (['"""', "/a", '"""'], ["/a>"]),
        (["a\\", "b\\", "c"], ["a\nb\nc>"]),
        (['"""a', KeyboardInterrupt, "b"], ["b>"]),
        (['"""a', EOFError], []),
        (['"""one line"""'], ["one line>"]),
    ],
    ids=["quotes", "slash", "backslash", "ctrl-c", "ctrl-d", "one line"],
)
async def test_a_message_can_have_several_lines(
    lines: list[Any], prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    type_lines(monkeypatch, *lines)
    engine = EchoEngine()
    assert await run(engine, "chat") == 0
    assert [prompt_of(engine_request) for engine_request in engine.requests] == prompts


# bench


class TwoTokenEngine(FakeEngine):
    """Generates exactly max_tokens, two per step. If `rejects` is set, rejects every third request."""

    def __init__(self, *, rejects: bool = False) -> None:
        super().__init__()
        self.rejects = rejects

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(engine_request)
        if self.rejects and len(self.requests) % 3 == 0:
            raise OverloadedError("too many requests")
        yield StepOutput()
        for _ in range(engine_request.sampling.max_tokens // 2 - 1):
            yield more("ab")
        yield last("ab")


async def test_bench_prints_a_row_for_each_level(capsys: Captured) -> None:
    engine = TwoTokenEngine()
    sizes = ("--prompt-tokens", "16", "--max-tokens", "8", "--shared-prefix", "4")
    assert await run(engine, "bench", "--concurrency", "1,4", "--requests", "8", *sizes) == 0
    model, head, groups, names, *rows = capsys.readouterr().out.splitlines()
    assert model.startswith("fake (")
    assert head.startswith("16 prompt tokens (4 shared), 8 generated; --prompt-seed ")
    assert groups.split("  ")[-1].strip() == "ITL (ms)"
    assert names.split()[:6] == ["conc", "reqs", "errs", "req/s", "tokens/s", "p50"]
    assert {len(line) for line in (groups, names, *rows)} == {78}
    assert [row.split()[:3] for row in rows] == [["1", "8", "0"], ["4", "8", "0"]]
    assert all(float(cell) > 0 for row in rows for cell in row.split()[3:6])
    assert {len(row.split()) for row in rows} == {11}
    assert len(engine.requests) == 1 + 8 + 8
    assert {len(engine_request.prompt) for engine_request in engine.requests} == {16}
    assert len({tuple(engine_request.prompt[:4]) for engine_request in engine.requests}) == 1
    assert len({tuple(engine_request.prompt[4:]) for engine_request in engine.requests}) == 17
    assert all(
        engine_request.sampling.ignore_eos and engine_request.sampling.max_tokens == 8
        for engine_request in engine.requests
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "  0.00"), (12.345, " 12.35"), (1234.56, "1234.6"), (123456.7, "123457"), (12345678.9, "12345679")],
)
def test_a_number_keeps_its_column_while_it_can(value: float, text: str) -> None:
    assert bench_table.format_number(value, 6) == text


async def test_bench_prints_the_errors_of_a_level_below_its_row(capsys: Captured) -> None:
    sizes = ("--prompt-tokens", "4", "--max-tokens", "8", "--retries", "0")
    assert await run(TwoTokenEngine(rejects=True), "bench", "--concurrency", "1", "--requests", "8", *sizes) == 1
    row, errors = capsys.readouterr().out.splitlines()[-2:]
    assert row.split()[:3] == ["1", "5", "3"]
    assert errors == "     errors: 3 RESOURCE_EXHAUSTED"


async def test_bench_counts_errors_in_its_json_output(capsys: Captured) -> None:
    options = ("--prompt-tokens", "4", "--max-tokens", "8", "--json", "--retries", "0", "--prompt-seed", "5")
    assert await run(TwoTokenEngine(rejects=True), "bench", "--concurrency", "1", "--requests", "8", *options) == 1
    document = json.loads(capsys.readouterr().out)
    (level,) = document["levels"]
    assert (document["model"], document["prompt_seed"]) == ("fake", 5)
    assert (level["requests"], level["errors"], level["output_tokens"]) == (5, {"RESOURCE_EXHAUSTED": 3}, 40)
    assert level["output_tokens_per_second"] == pytest.approx(40 / level["seconds"])
    assert 0 < level["ttft_seconds"]["p50"] <= level["ttft_seconds"]["p99"]


async def test_a_level_runs_for_the_given_seconds(capsys: Captured) -> None:
    sizes = ("--prompt-tokens", "4", "--max-tokens", "2")
    assert await run(TwoTokenEngine(), "bench", "--json", "--concurrency", "2", "--seconds", "0.05", *sizes) == 0
    (level,) = json.loads(capsys.readouterr().out)["levels"]
    assert level["requests"] >= 2
    assert level["seconds"] >= 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--prompt-tokens", "60", "--max-tokens", "8"),
            "--prompt-tokens plus --max-tokens must be at most 64, not 68",
        ),
        (("--prompt-tokens", "4", "--shared-prefix", "5"), "--shared-prefix must be between 0 and --prompt-tokens"),
        (("--seconds", "0"), "--seconds must be above 0, not 0.0"),
        (("--set", "prompt=a"), "`prompt` cannot be set: bench generates it"),
    ],
)
async def test_an_invalid_workload_is_a_usage_error(options: tuple[str, ...], message: str, capsys: Captured) -> None:
    assert await run(TwoTokenEngine(), "bench", *options) == 2
    assert capsys.readouterr().err.startswith(f"yuan-grpc: {message}")


async def test_a_failed_warm_up_request_ends_the_bench(capsys: Captured) -> None:
    engine = FakeEngine(OverloadedError("too many requests"))
    options = ("--prompt-tokens", "4", "--max-tokens", "8", "--json", "--retries", "0")
    assert await run(engine, "bench", *options) == 1
    assert capsys.readouterr() == ("", "yuan-grpc: RESOURCE_EXHAUSTED: too many requests\n")


def test_tokens_of_one_message_share_the_time_since_the_previous_one() -> None:
    timer = load_generator.RequestTimer()
    for text in ("abc", "", "de"):
        timer.record(pb.GenerateStreamResponse(choices=[pb.Choice(text=text, token_ids=range(len(text)))]))
    assert timer.output_tokens == 5
    assert timer.ttft is not None
    assert len(timer.itls) == 2
    assert timer.itls[0] == timer.itls[1] >= 0


def test_a_quantile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    fractions = load_generator.PERCENTILES.values()
    assert [load_generator.quantile(values, fraction) for fraction in fractions] == [50, 90, 99]
    assert load_generator.quantile([3.0], 0.99) == 3
    assert load_generator.quantile([], 0.5) is None


def test_the_same_seed_gives_the_same_prompts_for_the_same_level() -> None:
    def prompts(seed: int, name: str) -> list[list[int]]:
        requests = load_generator.Workload(pb.GenerateRequest(), 8, 2, seed, 1000).requests(name)
        return [list(next(requests).prompt_token_ids.ids) for _ in range(3)]

    assert prompts(1, "a") == prompts(1, "a")
    assert prompts(1, "a") != prompts(1, "b")
    assert prompts(1, "a") != prompts(2, "a")


# completion


def test_bash_completes_commands_options_and_files(capsys: Captured, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "prompts.txt").touch()

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        script = f"source ./completion; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_yuan_grpc"
        command = ["bash", "--norc", "-c", f'{script}; echo "${{COMPREPLY[@]}}"']
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()

    assert {"serve", "generate", "chat", "bench", "completion"} <= set(completed("yuan-grpc", ""))
    assert completed("yuan-grpc", "chat", "--max-t") == ["--max-tokens"]
    assert completed("yuan-grpc", "generate", "--file", "pro") == ["prompts.txt"]
    assert completed("yuan-grpc", "completion", "z") == ["zsh"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(shell: str, capsys: Captured) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    assert "max-tokens" in capsys.readouterr().out


def test_completion_without_shtab_names_the_extra_to_install(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "yuan-grpc: completion requires shtab: install yuan-grpc[cli]\n"


def test_run_does_not_overwrite_the_prompt_file(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\n")
    assert main(["run", "--file", str(file), "-o", str(file)]) == 2
    assert "--output would overwrite" in capsys.readouterr().err
    assert file.read_text() == "a\n"
