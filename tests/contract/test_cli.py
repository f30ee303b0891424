"""The client commands against the real service with an engine by hand, inside this process."""

import argparse
import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_engine import INFO, FakeEngine, last, more
from serving import served

from yuan_grpc.__main__ import main
from yuan_grpc.cli import load_generator
from yuan_grpc.cli.common.output import Output
from yuan_grpc.cli.common.signals import Interruptible
from yuan_grpc.cli.generate_many import Many
from yuan_grpc.client import Result
from yuan_grpc.client.errors import error_with
from yuan_grpc.server.engine.types import ChoiceDelta, EngineRequest, FinishReason, StepOutput
from yuan_grpc.server.errors import OverloadedError
from yuan_grpc.v1 import yuan_pb2 as pb

Captured = pytest.CaptureFixture[str]


async def run(engine: FakeEngine, *arguments: str) -> int:
    """The exit status of a command that is told of a server of this engine's."""
    async with served(engine) as address:
        return await asyncio.to_thread(main, [*arguments, "--address", address])


def prompt_of(engine_request: EngineRequest) -> str:
    return "".join(map(chr, engine_request.prompt))


class Answering(FakeEngine):
    """Answers with the prompt in capitals. One that begins with `!` is refused; one with `2` ends before one with `1`,
    whichever begins first."""

    def __init__(self) -> None:
        super().__init__()
        self.second = asyncio.Event()

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(engine_request)
        prompt = prompt_of(engine_request)
        if prompt.startswith("!"):
            raise OverloadedError("too many requests")
        yield StepOutput()
        if prompt.startswith("1"):
            await self.second.wait()
        yield StepOutput(
            [step for index in range(engine_request.sampling.n) for step in last(prompt.upper(), index).deltas]
        )
        if prompt.startswith("2"):
            self.second.set()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes where a command reads its input."""

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


@pytest.mark.parametrize(("raw", "complaint"), [(b"\n", "stdin has no prompt"), (b"\xff", "stdin is not UTF-8")])
def test_stdin_without_a_prompt_is_misuse(raw: bytes, complaint: str, stdin: Any, capsys: Captured) -> None:
    stdin(raw)
    assert main(["generate"]) == 2
    assert capsys.readouterr().err == f"yuan-grpc: {complaint}\n"


async def test_an_answer_as_json_is_one_line(capsys: Captured) -> None:
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


async def test_several_choices_have_their_numbers(capsys: Captured) -> None:
    assert await run(Answering(), "generate", "ab", "-n", "2") == 0
    assert capsys.readouterr().out == "[1.1] ab\nAB\n\n[1.2] ab\nAB\n\n"


async def test_many_prompts_are_answered_in_their_order(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("1a\n\n2b\n3c\n")
    assert await run(Answering(), "generate", "--file", str(path)) == 0
    assert capsys.readouterr() == ("[1] 1a\n1A\n\n[2] 2b\n2B\n\n[3] 3c\n3C\n\n", "")


async def test_a_prompt_that_fails_is_told_and_harms_no_other(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "top_p": 3, "min_p": 3}\n{"prompt": "c"}\n')
    assert await run(Answering(), "generate", "--file", str(path)) == 1
    out, err = capsys.readouterr()
    assert out == "[1] a\nA\n\n[3] c\nC\n\n"
    assert err == (
        "yuan-grpc: prompt 2: INVALID_ARGUMENT: `top_p` must be between 0 and 1, not 3.0; "
        "`min_p` must be between 0 and 1, not 3.0\n"
        "  top_p: `top_p` must be between 0 and 1, not 3.0\n"
        "  min_p: `min_p` must be between 0 and 1, not 3.0\n"
        "yuan-grpc: 1 of 3 prompts failed\n"
    )


async def test_a_failure_as_json_has_its_fields(tmp_path: Path, capsys: Captured) -> None:
    path, written = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "top_p": 3}\n')
    assert await run(Answering(), "generate", "--file", str(path), "--json", "-o", str(written)) == 1
    assert capsys.readouterr() == ("", "yuan-grpc: 1 of 2 prompts failed\n")
    first, second = map(json.loads, written.read_text().splitlines())
    assert (first["index"], first["text"]) == (0, "A")
    sentence = "`top_p` must be between 0 and 1, not 3.0"
    error = {
        "code": "INVALID_ARGUMENT",
        "reason": "INVALID_REQUEST",
        "message": sentence,
        "violations": [{"field": "top_p", "description": sentence}],
    }
    assert second == {"index": 1, "prompt": "b", "error": error}


class Interrupted:
    """A client whose second answer comes first, and then Ctrl-C."""

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: Any) -> None: ...

    async def generate_many(self, requests: Any, *, concurrency: int, ordered: bool) -> AsyncGenerator[Result, None]:
        error = error_with(grpc.StatusCode.INTERNAL, "no")
        yield Result(1, requests[1], None, error)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()


def test_ctrl_c_loses_no_answer_that_has_come(capsys: Captured, tmp_path: Path) -> None:
    client: Any = Interrupted()
    requests = [pb.GenerateRequest(prompt=name) for name in "abc"]
    options = argparse.Namespace(concurrency=2, json=True, address="")
    with Output(tmp_path / "answers.jsonl") as output, Interruptible() as loop:
        assert Many(client, requests, output, options).run(loop) == 130
    (line,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "b"
    assert capsys.readouterr().err == "yuan-grpc: cancelled: 1 of 3 prompts were answered\n"


def test_a_second_ctrl_c_does_not_wait_for_who_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    before, (end, start) = signal.getsignal(signal.SIGINT), os.pipe()

    async def work() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        print("x" * 1_000_000, flush=True)  # more than a pipe holds
        await asyncio.Event().wait()

    async def next_work() -> None:
        print("heard again", flush=True)

    with open(end) as reader, open(start, "w") as paused, Interruptible() as loop:
        monkeypatch.setattr(sys, "stdout", paused)
        with pytest.raises(KeyboardInterrupt):
            loop.run(work())
        loop.run(next_work())
        assert reader.readline() == "heard again\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_takes_no_words_away_where_they_are_read(capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            signal.raise_signal(signal.SIGINT)
            print("the last words", flush=True)

    with Interruptible() as loop, pytest.raises(KeyboardInterrupt):
        loop.run(work())
    assert capfd.readouterr().out == "the last words\n"


def test_where_fcntl_is_not_there_humaneval_alone_is_missing() -> None:
    program = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; import yuan_grpc.__main__ as m; m.main()"
    )
    told = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert "generate" in told.stdout
    assert "humaneval" not in told.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("a", "--file", "b"), "a prompt and --file do not go together"),
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
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: tuple[str, ...], complaint: str, capsys: Captured, request: pytest.FixtureRequest
) -> None:
    status = main(["generate", "--retries", "0", "--address", "127.0.0.1:1", *arguments])
    told = capsys.readouterr().err
    if complaint != "--tls":  # a file that is no certificate is found out when it is used
        assert status == 2
        assert told.startswith(f"yuan-grpc: {complaint}")
    assert status in (1, 2)
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        (("--tls", "a prompt"), "there is no file 'a prompt' (a prompt goes before the options, or behind --)"),
        (("--timeout", "0"), "must be a number of seconds above 0, not '0'"),
        (("--proxy", "foo"), "must be http://host:port, not 'foo'"),
        (("--metadata", "a"), "must be KEY=VALUE, "),
        (("--metadata", "a=é"), "the value of a must be printable ASCII"),
        (("--metadata", "x-bin=1"), "must be KEY=VALUE, "),
        (("--set", "foo=1"), "GenerateRequest has no field `foo`"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
    ],
)
def test_an_option_that_is_wrong_is_named(option: tuple[str, ...], complaint: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["generate", "a", *option])
    assert raised.value.code == 2
    assert complaint in capsys.readouterr().err


async def test_the_answers_do_not_overwrite_the_prompts(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a\n")
    assert await run(Answering(), "generate", "--file", str(path), "-o", str(path)) == 2
    assert path.read_text() == "a\n"
    assert "would overwrite" in capsys.readouterr().err


def test_who_finds_no_server_is_told_what_to_try(capsys: Captured) -> None:
    assert main(["generate", "a", "--address", "127.0.0.1:1", "--retries", "0"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("yuan-grpc: UNAVAILABLE: ")
    assert "Nothing answers on 127.0.0.1:1. `yuan-grpc serve` or `make serve` starts a server there" in told


def test_the_address_can_come_from_the_environment(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YUAN_GRPC_ADDRESS", "127.0.0.1:2")
    assert main(["generate", "a", "--retries", "0"]) == 1
    assert "Nothing answers on 127.0.0.1:2." in capsys.readouterr().err


async def test_an_error_after_the_first_words_leaves_them(capsys: Captured) -> None:
    assert await run(FakeEngine(more("half"), OverloadedError("no more")), "generate", "a") == 1
    assert capsys.readouterr() == ("half\n", "yuan-grpc: RESOURCE_EXHAUSTED: no more\n")


async def test_a_deadline_is_an_error_of_one_line(capsys: Captured) -> None:
    assert await run(FakeEngine(hangs=True), "generate", "a", "--timeout", "0.2") == 1
    assert capsys.readouterr().err.startswith("yuan-grpc: DEADLINE_EXCEEDED: ")


# chat


class Parrot(FakeEngine):
    """Answers with the last turn, but `empty` with nothing and `!` with a refusal."""

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(engine_request)
        turn = prompt_of(engine_request).removesuffix(">").split("|")[-1]
        if turn == "!":
            raise OverloadedError("too many requests")
        yield StepOutput()
        yield (
            StepOutput([ChoiceDelta(0, "", [0], finish_reason=FinishReason.STOP)])
            if turn == "empty"
            else last(f"<{turn}")
        )


async def chat(stdin: Any, *lines: str, options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    """The exit status, and what the engine was asked at each turn."""
    stdin("".join(f"{line}\n" for line in lines).encode())
    engine = Parrot()
    status = await run(engine, "chat", "--retries", "0", *options)
    return status, [prompt_of(engine_request) for engine_request in engine.requests]


async def test_each_turn_has_all_that_was_said_before(stdin: Any, capsys: Captured) -> None:
    assert await chat(stdin, "一", "", "二", "//x") == (0, ["一>", "一|<一|二>", "一|<一|二|<二|/x>"])
    assert capsys.readouterr() == ("<一\n<二\n</x\n", "")


async def test_a_system_text_stands_before_all_turns(stdin: Any) -> None:
    _, asked = await chat(stdin, "a", "/reset", "b", options=("--system", "S"))
    assert asked == ["S|a>", "S|b>"]


async def test_turns_can_be_taken_back(stdin: Any, capsys: Captured) -> None:
    _, asked = await chat(stdin, "a", "b", "/undo", "c", "/undo", "/undo", "/undo", "d")
    assert asked == ["a>", "a|<a|b>", "a|<a|c>", "d>"]
    assert capsys.readouterr().err == "yuan-grpc: there is no turn to take back\n"


async def test_a_conversation_can_be_saved_and_gone_on_with(stdin: Any, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    status, asked = await chat(stdin, "你", f"/save {path}", "/reset", "b", f"/load {path}", "c")
    assert (status, asked) == (0, ["你>", "b>", "你|<你|c>"])
    said = [{"role": "user", "content": "你"}, {"role": "assistant", "content": "<你"}]
    assert json.loads(path.read_text()) == {"messages": said}


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"messages": 3}', '[{"role": "x", "content": "a"}]', '[{"role": "user", "content": ""}]']
)
async def test_what_is_no_conversation_is_not_loaded(stdin: Any, tmp_path: Path, text: str, capsys: Captured) -> None:
    path = tmp_path / "saved.json"
    path.write_text(text)
    assert await chat(stdin, "a", f"/load {path}", "b") == (1, ["a>", "a|<a|b>"])
    assert capsys.readouterr().err.startswith(f"yuan-grpc: {path} has no conversation: ")


async def test_fields_can_be_set_while_talking(stdin: Any, capsys: Captured) -> None:
    lines = ("a", "/set top_k=5", "/set", "/set top_k", "/set", "/set foo=1", "/set prompt=x", "/nope")
    stdin("".join(f"{line}\n" for line in (*lines, "b")).encode())
    engine = Parrot()
    assert await run(engine, "chat") == 1
    assert capsys.readouterr().err == (
        '{"max_tokens": 512, "top_k": 5}\n'
        '{"max_tokens": 512}\n'
        "yuan-grpc: GenerateRequest has no field `foo`\n"
        "yuan-grpc: `prompt` cannot be set in a chat\n"
        "yuan-grpc: there is no /nope; /help lists what there is, and // sends a line that begins with a stroke\n"
    )


async def test_a_turn_that_fails_is_forgotten(stdin: Any, capsys: Captured) -> None:
    assert await chat(stdin, "a", "!", "empty", "b", "/quit", "c") == (
        1,
        ["a>", "a|<a|!>", "a|<a|empty>", "a|<a|b>"],
    )
    assert capsys.readouterr().err == (
        "yuan-grpc: RESOURCE_EXHAUSTED: too many requests\n[an empty answer; the turn is not kept]\n"
    )


async def test_a_conversation_that_is_too_long_can_go_on(stdin: Any, capsys: Captured) -> None:
    half = "x" * (INFO.max_model_len // 2)
    truncating = "/set truncate_prompt_tokens=-1"
    status, asked = await chat(stdin, half, half, truncating, "b", options=("--max-tokens", "8"))
    assert (status, len(asked), len(asked[-1])) == (1, 2, INFO.max_model_len - 8)
    told = capsys.readouterr().err
    assert "The conversation is too long, and this turn is not kept." in told


async def test_truncation_forgets_the_beginning(stdin: Any) -> None:
    half = "x" * (INFO.max_model_len // 2)
    status, asked = await chat(stdin, half, half, "b", options=("--max-tokens", "8", "--truncate"))
    assert (status, [len(prompt) for prompt in asked[1:]]) == (0, [INFO.max_model_len - 8] * 2)


class Keyboard(io.StringIO):
    """A terminal at which somebody sits."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("key", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave_a_chat(
    key: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def pressed(prompt: str) -> str:
        raise key

    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr("builtins.input", pressed)
    assert main(["chat"]) == 0
    assert capsys.readouterr().out == "\n"


# bench


class Slow(FakeEngine):
    """Answers with so many tokens as are asked for, two in a step; every third request after the first is refused."""

    def __init__(self, *, refuses: bool = False) -> None:
        super().__init__()
        self.refuses = refuses

    async def generate(
        self, engine_request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(engine_request)
        if self.refuses and len(self.requests) % 3 == 0:
            raise OverloadedError("too many requests")
        yield StepOutput()
        for _ in range(engine_request.sampling.max_tokens // 2 - 1):
            yield more("ab")
        yield last("ab")


async def test_bench_prints_a_row_for_each_level(capsys: Captured) -> None:
    engine = Slow()
    sizes = ("--prompt-tokens", "16", "--max-tokens", "8", "--shared-prefix", "4")
    assert await run(engine, "bench", "--concurrency", "1,4", "--requests", "8", *sizes) == 0
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert "16 prompt tokens (4 shared), 8 generated" in head
    assert names.split()[:5] == ["concurrency", "requests", "errors", "requests/s", "tokens/s"]
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


async def test_bench_as_json_counts_errors(capsys: Captured) -> None:
    options = ("--prompt-tokens", "4", "--max-tokens", "8", "--json", "--retries", "0", "--prompt-seed", "5")
    assert await run(Slow(refuses=True), "bench", "--concurrency", "1", "--requests", "8", *options) == 1
    document = json.loads(capsys.readouterr().out)
    (level,) = document["levels"]
    assert (document["model"], document["prompt_seed"]) == ("fake", 5)
    assert (level["requests"], level["errors"], level["output_tokens"]) == (5, {"RESOURCE_EXHAUSTED": 3}, 40)
    assert level["output_tokens_per_second"] == pytest.approx(40 / level["seconds"])
    assert 0 < level["ttft_seconds"]["p50"] <= level["ttft_seconds"]["p99"]


async def test_a_level_ends_with_its_time(capsys: Captured) -> None:
    assert await run(Slow(), "bench", "--concurrency", "2", "--seconds", "0.05", "--prompt-tokens", "4", "--json",
                     "--max-tokens", "2") == 0  # fmt: skip
    (level,) = json.loads(capsys.readouterr().out)["levels"]
    assert level["requests"] >= 2
    assert level["seconds"] >= 0.05


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            ("--prompt-tokens", "60", "--max-tokens", "8"),
            "--prompt-tokens and --max-tokens must be at most 64 together",
        ),
        (("--prompt-tokens", "4", "--shared-prefix", "5"), "--shared-prefix must be between 0 and --prompt-tokens"),
        (("--seconds", "0"), "--seconds must be above 0, not 0.0"),
        (("--set", "prompt=a"), "`prompt` cannot be set: bench makes it up"),
    ],
)
async def test_a_load_that_cannot_be_is_said_in_a_line(
    options: tuple[str, ...], complaint: str, capsys: Captured
) -> None:
    assert await run(Slow(), "bench", *options) == 2
    assert capsys.readouterr().err.startswith(f"yuan-grpc: {complaint}")


async def test_a_server_that_refuses_the_first_request_ends_the_bench(capsys: Captured) -> None:
    engine = FakeEngine(OverloadedError("too many requests"))
    options = ("--prompt-tokens", "4", "--max-tokens", "8", "--json", "--retries", "0")
    assert await run(engine, "bench", *options) == 1
    assert capsys.readouterr() == ("", "yuan-grpc: RESOURCE_EXHAUSTED: too many requests\n")


def test_tokens_that_come_together_share_the_time_since_the_last() -> None:
    clock = load_generator.Clock()
    for text in ("abc", "", "de"):
        clock.saw(pb.GenerateStreamResponse(choices=[pb.Choice(text=text, token_ids=range(len(text)))]))
    assert clock.tokens == 5
    assert clock.first is not None
    assert len(clock.gaps) == 2
    assert clock.gaps[0] == clock.gaps[1] >= 0


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [load_generator.percentile(values, share) for share in load_generator.SHARES] == [50, 90, 99]
    assert load_generator.percentile([3.0], 0.99) == 3
    assert load_generator.percentile([], 0.5) is None


def test_the_same_seed_makes_the_same_prompts_but_not_for_another_level() -> None:
    def prompts(seed: int, name: str) -> list[list[int]]:
        requests = load_generator.Shape(pb.GenerateRequest(), 8, 2, seed, 1000).requests(name)
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
def test_other_shells_have_a_script_too(shell: str, capsys: Captured) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    assert "max-tokens" in capsys.readouterr().out


def test_without_shtab_completion_says_what_to_install(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "yuan-grpc: completion needs shtab: install yuan-grpc[cli]\n"


def test_run_does_not_write_over_its_prompts(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\n")
    assert main(["run", "--file", str(file), "-o", str(file)]) == 2
    assert "--output would overwrite" in capsys.readouterr().err
    assert file.read_text() == "a\n"
