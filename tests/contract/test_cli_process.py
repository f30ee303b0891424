"""The client commands as processes: Ctrl-C, terminals, pipes and locales."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, last, more
from serving import served

from yuan_grpc.server.engine.types import EngineRequest, StepOutput

COMMAND = (sys.executable, "-m", "yuan_grpc")


def environment(address: str, **others: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "LANG", "LC_ALL")}
    return {**plain, "YUAN_GRPC_ADDRESS": address, "TERM": "dumb", "PYTHONWARNINGS": "error", **others}


class Process:
    """A command with pipes for its streams."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out = self.err = ""

    @classmethod
    async def start(cls, address: str, *arguments: str | bytes, **variables: str) -> "Process":
        """Starts it; `variables` are of its environment."""
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(address, **variables),
        )
        return cls(process)

    async def said(self, text: str) -> None:
        """Returns when its output has the text."""
        assert self.process.stdout
        while text not in self.out:
            chunk = await self.process.stdout.read(1000)
            assert chunk, self.out
            self.out += chunk.decode()

    async def end(self, stdin: bytes = b"") -> int:
        """Its exit status, when it has ended."""
        out, err = await self.process.communicate(stdin)
        self.out, self.err = self.out + out.decode(), self.err + err.decode()
        assert "Traceback" not in self.err, self.err
        return await self.process.wait()


class Terminal:
    """A command whose streams are a terminal."""

    def __init__(self, address: str, arguments: tuple[str, ...], variables: dict[str, str], stdout: Any = None) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=environment(address, **variables),
        )
        os.close(slave)
        self.seen = self.past = ""

    async def shows(self, text: str) -> None:
        """Returns when it has shown the text, behind what was asked for before."""
        while text not in self.seen:
            chunk = await asyncio.to_thread(self._read)
            assert chunk, self.seen
            self.seen += chunk
        before, _, self.seen = self.seen.partition(text)
        self.past += before + text

    def _read(self) -> str:
        try:
            return os.read(self._master, 4096).decode(errors="replace")
        except OSError:  # which is how a terminal says that the other side is closed
            return ""

    def type(self, text: str) -> None:
        """Presses keys."""
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    async def end(self) -> int:
        """Its exit status, when it has ended; `past` has all that it showed."""
        while chunk := await asyncio.to_thread(self._read):
            self.seen += chunk
        self.past += self.seen
        assert "Traceback" not in self.past, self.past
        return await asyncio.to_thread(self.process.wait)

    def close(self) -> None:
        """Ends it for good."""
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Starts a command in a terminal; none outlives the test."""
    started: list[Terminal] = []

    def start(address: str, *arguments: str, stdout: Any = None, **variables: str) -> Terminal:
        started.append(Terminal(address, arguments, variables, stdout))
        return started[-1]

    yield start
    for one in started:
        one.close()


class Picky(FakeEngine):
    """Answers all prompts but `hang`, which gets a part of an answer."""

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        self.requests.append(request)
        prompt = "".join(map(chr, request.prompt))
        try:
            yield StepOutput()
            if prompt.removesuffix(">") == "hang":
                self.began.set()
                yield more("part")
                await asyncio.Event().wait()
            yield last("whole")
        finally:
            if prompt.removesuffix(">") == "hang":
                self.freed.set()


def prompts_of(engine: FakeEngine) -> list[str]:
    return ["".join(map(chr, request.prompt)) for request in engine.requests]


async def test_ctrl_c_cancels_a_stream_on_the_server() -> None:
    engine = FakeEngine(more("half an answer"), hangs=True)
    async with served(engine) as address:
        process = await Process.start(address, "generate", "AB")
        await process.said("half an answer")
        process.process.send_signal(signal.SIGINT)
        assert await process.end() == 130
        await engine.freed.wait()
    assert (process.out, process.err) == ("half an answer\n", "yuan-grpc: cancelled\n")


async def test_ctrl_c_cancels_what_still_runs_of_many(tmp_path: Path) -> None:
    path, engine = tmp_path / "prompts.txt", Picky()
    path.write_text("a\nhang\n")
    async with served(engine) as address:
        process = await Process.start(address, "generate", "--file", str(path), "--json")
        await process.said("\n")
        await engine.began.wait()
        process.process.send_signal(signal.SIGINT)
        assert await process.end() == 130
        await engine.freed.wait()
    assert json.loads(process.out)["text"] == "whole"
    assert process.err == "yuan-grpc: cancelled: 1 of 2 prompts were answered\n"


async def test_ctrl_c_ends_a_bench() -> None:
    engine = FakeEngine(hangs=True)
    async with served(engine) as address:
        process = await Process.start(address, "bench", "--prompt-tokens", "4", "--max-tokens", "4")
        await engine.began.wait()
        process.process.send_signal(signal.SIGINT)
        assert await process.end() == 130
        await engine.freed.wait()
    assert process.err == "yuan-grpc: cancelled after 0 of 3 levels\n"


async def test_a_pipe_that_is_closed_ends_it_quietly() -> None:
    engine = FakeEngine(*[more("x" * 50) for _ in range(5000)], hangs=True)
    async with served(engine) as address:
        process = await Process.start(address, "generate", "AB")
        await process.said("x")
        process.process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]  # as `head` does
        assert await process.process.wait() == 141
        assert process.process.stderr
        assert await process.process.stderr.read() == b""
        await engine.freed.wait()


@pytest.mark.parametrize("variables", [{"LANG": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
async def test_texts_are_utf_8_in_every_locale(variables: dict[str, str]) -> None:
    engine = FakeEngine(last("珠穆朗玛峰"))
    async with served(engine) as address:
        given = await Process.start(address, "generate", "山".encode(), **variables)
        assert await given.end() == 0
        piped = await Process.start(address, "generate", **variables)
        assert await piped.end("山\n".encode()) == 0
    assert (given.out, piped.out) == ("珠穆朗玛峰\n", "珠穆朗玛峰\n")
    assert prompts_of(engine) == ["山", "山"]


async def test_an_argument_that_is_not_utf_8_is_misuse() -> None:
    process = await Process.start("127.0.0.1:1", "generate", b"\xff")
    assert await process.end() == 2
    assert process.err == "yuan-grpc: the prompt is not UTF-8\n"


async def test_a_pipe_gets_neither_colours_nor_bars_nor_notes(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    async with served(FakeEngine(last("\x1b[31mred"))) as address:
        process = await Process.start(address, "generate", "--file", str(tmp_path / "prompts.txt"))
        assert await process.end() == 0
    assert (process.out, process.err) == ("[1] a\n\x1b[31mred\n\n[2] b\n\x1b[31mred\n\n", "")


async def test_a_terminal_gets_colours_and_no_commands_from_a_model(terminal: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    async with served(FakeEngine(last("\x1b[31mred\tand\x07"))) as address:
        one = terminal(address, "generate", "--file", str(tmp_path / "prompts.txt"))
        assert await one.end() == 0
        assert one.past.startswith("\x1b[1m[1] a\x1b[0m\r\n�[31mred\tand�\r\n")
        assert re.search(r"\x1b\[2m\[1 answers, 13 tokens, \d+\.\d tokens/s\]\x1b\[0m", one.past)
        plain = terminal(address, "generate", "a", NO_COLOR="1")
        assert await plain.end() == 0
        assert re.fullmatch(r"�\[31mred\tand�\r\n\[length, 13 tokens, \d+\.\d tokens/s\]\r\n", plain.past)


async def test_without_a_prompt_a_terminal_is_not_read(terminal: Any) -> None:
    one = terminal("127.0.0.1:1", "generate")
    assert await one.end() == 2
    assert "a prompt, --file, or something on stdin is needed" in one.past


async def test_a_wait_of_over_a_second_shows_a_clock(terminal: Any) -> None:
    pytest.importorskip("tqdm")
    engine = FakeEngine(hangs=True)
    async with served(engine) as address:
        one = terminal(address, "generate", "AB")
        await one.shows("waiting for the first token 00:01")
        one.interrupt()
        assert await one.end() == 130
        await engine.freed.wait()


async def test_many_prompts_that_take_over_a_second_show_a_bar(terminal: Any, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    path, engine = tmp_path / "prompts.txt", Picky()
    path.write_text("a\nhang\n")
    async with served(engine) as address:
        one = terminal(address, "generate", "--file", str(path), "-o", str(tmp_path / "answers"))
        await one.shows("answers:  50%")
        await one.shows("1/2")
        one.interrupt()
        assert await one.end() == 130
    assert (tmp_path / "answers").read_text() == "[1] a\nwhole\n\n"
    assert "cancelled: 1 of 2 prompts were answered" in one.past


async def test_without_tqdm_nothing_is_shown(terminal: Any, tmp_path: Path) -> None:
    (tmp_path / "tqdm.py").write_text("raise ModuleNotFoundError('as if it were not installed')")
    engine = FakeEngine(last("yes"))
    async with served(engine) as address:
        one = terminal(address, "generate", "AB", PYTHONPATH=str(tmp_path))
        assert await one.end() == 0
    assert one.past.startswith("yes\r\n")


async def test_in_a_chat_ctrl_c_stops_the_answer_and_keeps_the_part(terminal: Any) -> None:
    engine = Picky()
    async with served(engine) as address:
        one = terminal(address, "chat")
        await one.shows("> ")
        one.type("hang\n")
        await one.shows("part")
        one.interrupt()
        await one.shows("[stopped]")
        await engine.freed.wait()
        await one.shows("> ")
        one.type("你好\n")
        await one.shows("whole")
        await one.shows("> ")
        one.type("\x04")
        assert await one.end() == 0
    assert prompts_of(engine) == ["hang>", "hang|part|你好>"]
