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
from servers import serve_grpc

from yuan_grpc.server.engine.types import EngineRequest, StepOutput

pytestmark = pytest.mark.timeout(60)  # each command is a process

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
        """Start a command; `variables` are added to its environment."""
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(address, **variables),
        )
        return cls(process)

    async def wait_for(self, text: str) -> None:
        """Wait until stdout contains the text."""
        assert self.process.stdout
        while text not in self.out:
            chunk = await self.process.stdout.read(1000)
            assert chunk, self.out
            self.out += chunk.decode()

    async def end(self, stdin: bytes = b"") -> int:
        """Wait for the end of the process and return its exit status."""
        out, err = await self.process.communicate(stdin)
        self.out, self.err = self.out + out.decode(), self.err + err.decode()
        assert "Traceback" not in self.err, self.err
        return await self.process.wait()


class Terminal:
    """A command with a terminal for its streams."""

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
        self._unmatched = self.output = ""

    async def wait_for(self, text: str) -> None:
        """Wait until the terminal shows the text, after the text of earlier waits."""
        while text not in self._unmatched:
            chunk = await asyncio.to_thread(self._read)
            assert chunk, self._unmatched
            self._unmatched += chunk
        before, _, self._unmatched = self._unmatched.partition(text)
        self.output += before + text

    def _read(self) -> str:
        try:
            return os.read(self._master, 4096).decode(errors="replace")
        except OSError:  # the other side is closed
            return ""

    def type(self, text: str) -> None:
        """Type text."""
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    async def end(self) -> int:
        """Wait for the end of the process and return its exit status. `output` then has all of its output."""
        while chunk := await asyncio.to_thread(self._read):
            self._unmatched += chunk
        self.output += self._unmatched
        assert "Traceback" not in self.output, self.output
        return await asyncio.to_thread(self.process.wait)

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def start_in_terminal() -> Iterator[Callable[..., Terminal]]:
    """Start commands in terminals and kill them after the test."""
    started: list[Terminal] = []

    def start(address: str, *arguments: str, stdout: Any = None, **variables: str) -> Terminal:
        started.append(Terminal(address, arguments, variables, stdout))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


class HangingEngine(FakeEngine):
    """Generates `part` for the prompt `hang` and then hangs; completes every other prompt."""

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
            yield last("complete")
        finally:
            if prompt.removesuffix(">") == "hang":
                self.freed.set()


def prompts_of(engine: FakeEngine) -> list[str]:
    return ["".join(map(chr, request.prompt)) for request in engine.requests]


async def test_ctrl_c_cancels_a_stream_on_the_server() -> None:
    engine = FakeEngine(more("partial text"), hangs=True)
    async with serve_grpc(engine) as address:
        process = await Process.start(address, "generate", "AB")
        await process.wait_for("partial text")
        process.process.send_signal(signal.SIGINT)
        assert await process.end() == 130
        await engine.freed.wait()
    assert (process.out, process.err) == ("partial text\n", "yuan-grpc: cancelled\n")


async def test_ctrl_c_cancels_the_running_requests_of_a_batch(tmp_path: Path) -> None:
    path, engine = tmp_path / "prompts.txt", HangingEngine()
    path.write_text("a\nhang\n")
    async with serve_grpc(engine) as address:
        process = await Process.start(address, "generate", "--file", str(path), "--json")
        await process.wait_for("\n")
        await engine.began.wait()
        process.process.send_signal(signal.SIGINT)
        assert await process.end() == 130
        await engine.freed.wait()
    assert json.loads(process.out)["text"] == "complete"
    assert process.err == "yuan-grpc: cancelled: 1 of 2 prompts completed\n"


async def test_ctrl_c_ends_a_bench() -> None:
    engine = FakeEngine(hangs=True)
    async with serve_grpc(engine) as address:
        process = await Process.start(address, "bench", "--prompt-tokens", "4", "--max-tokens", "4")
        await engine.began.wait()
        process.process.send_signal(signal.SIGINT)
        assert await process.end() == 130
        await engine.freed.wait()
    assert process.err == "yuan-grpc: cancelled: 0 of 3 levels completed\n"


class OneThenHangingEngine(FakeEngine):
    """Completes the first request, which is the warm-up of a bench, and no other.

    Attributes:
        third: set when three others are running.
        idle: set when they have been freed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.third, self.idle = asyncio.Event(), asyncio.Event()

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        is_first = not self.requests
        self.requests.append(request)
        yield StepOutput()
        if is_first:
            yield last()
            return
        self.running += 1
        try:
            if self.running == 3:
                self.third.set()
            await asyncio.Event().wait()
        finally:
            self.running -= 1
            if not self.running:
                self.idle.set()


async def test_ctrl_c_ends_a_bench_at_a_rate() -> None:
    engine = OneThenHangingEngine()
    options = ("--prompt-tokens", "4", "--max-tokens", "4", "--request-rate", "50", "--burstiness", "inf")
    async with serve_grpc(engine) as address:
        process = await Process.start(address, "bench", *options)
        await engine.third.wait()
        process.process.send_signal(signal.SIGINT)
        assert await process.end() == 130
        await engine.idle.wait()
    assert process.err == "yuan-grpc: cancelled: 0 of 1 levels completed\n"


async def test_a_closed_pipe_ends_the_command_without_an_error() -> None:
    engine = FakeEngine(*[more("x" * 50) for _ in range(5000)], hangs=True)
    async with serve_grpc(engine) as address:
        process = await Process.start(address, "generate", "AB")
        await process.wait_for("x")
        process.process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]  # as `head` does
        assert await process.process.wait() == 141
        assert process.process.stderr
        assert await process.process.stderr.read() == b""
        await engine.freed.wait()


@pytest.mark.parametrize("variables", [{"LANG": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
async def test_text_is_utf_8_in_every_locale(variables: dict[str, str]) -> None:
    engine = FakeEngine(last("珠穆朗玛峰"))
    async with serve_grpc(engine) as address:
        argument = await Process.start(address, "generate", "山".encode(), **variables)
        assert await argument.end() == 0
        piped = await Process.start(address, "generate", **variables)
        assert await piped.end("山\n".encode()) == 0
    assert (argument.out, piped.out) == ("珠穆朗玛峰\n", "珠穆朗玛峰\n")
    assert prompts_of(engine) == ["山", "山"]


async def test_an_argument_that_is_not_utf_8_is_a_usage_error() -> None:
    process = await Process.start("127.0.0.1:1", "generate", b"\xff")
    assert await process.end() == 2
    assert process.err == "yuan-grpc: the prompt is not UTF-8\n"


async def test_a_pipe_receives_no_colors_bars_or_notes(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    async with serve_grpc(FakeEngine(last("\x1b[31mred"))) as address:
        process = await Process.start(address, "generate", "--file", str(tmp_path / "prompts.txt"))
        assert await process.end() == 0
    assert (process.out, process.err) == ("[1] a\n\x1b[31mred\n\n[2] b\n\x1b[31mred\n\n", "")


async def test_a_terminal_receives_colors_but_no_control_characters_from_the_model(
    start_in_terminal: Any, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    async with serve_grpc(FakeEngine(last("\x1b[31mred\tand\x07"))) as address:
        terminal = start_in_terminal(address, "generate", "--file", str(tmp_path / "prompts.txt"))
        assert await terminal.end() == 0
        assert terminal.output.startswith("\x1b[1m[1] a\x1b[0m\r\n�[31mred\tand�\r\n")
        assert re.search(r"\x1b\[2m\[1 completed, 13 tokens, \d+\.\d tokens/s\]\x1b\[0m", terminal.output)
        plain = start_in_terminal(address, "generate", "a", NO_COLOR="1")
        assert await plain.end() == 0
        assert re.fullmatch(r"�\[31mred\tand�\r\n\[length, 13 tokens, \d+\.\d tokens/s\]\r\n", plain.output)


async def test_without_a_prompt_stdin_is_not_read_at_a_terminal(start_in_terminal: Any) -> None:
    terminal = start_in_terminal("127.0.0.1:1", "generate")
    assert await terminal.end() == 2
    assert "no prompt: pass one as an argument, with --file or on stdin" in terminal.output


async def test_waiting_over_a_second_shows_a_clock(start_in_terminal: Any) -> None:
    pytest.importorskip("tqdm")
    engine = FakeEngine(hangs=True)
    async with serve_grpc(engine) as address:
        terminal = start_in_terminal(address, "generate", "AB")
        await terminal.wait_for("waiting for the first token 00:01")
        terminal.interrupt()
        assert await terminal.end() == 130
        await engine.freed.wait()


async def test_a_batch_of_over_a_second_shows_a_bar(start_in_terminal: Any, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    path, engine = tmp_path / "prompts.txt", HangingEngine()
    path.write_text("a\nhang\n")
    async with serve_grpc(engine) as address:
        terminal = start_in_terminal(address, "generate", "--file", str(path), "-o", str(tmp_path / "output"))
        await terminal.wait_for("generating:  50%")
        await terminal.wait_for("1/2")
        terminal.interrupt()
        assert await terminal.end() == 130
    assert (tmp_path / "output").read_text() == "[1] a\ncomplete\n\n"
    assert "cancelled: 1 of 2 prompts completed" in terminal.output


async def test_without_tqdm_there_is_no_progress_bar(start_in_terminal: Any, tmp_path: Path) -> None:
    (tmp_path / "tqdm.py").write_text("raise ModuleNotFoundError('not installed')")
    engine = FakeEngine(last("yes"))
    async with serve_grpc(engine) as address:
        terminal = start_in_terminal(address, "generate", "AB", PYTHONPATH=str(tmp_path))
        assert await terminal.end() == 0
    assert terminal.output.startswith("yes\r\n")


async def test_ctrl_c_in_a_chat_stops_the_reply_and_keeps_its_text(start_in_terminal: Any) -> None:
    engine = HangingEngine()
    async with serve_grpc(engine) as address:
        terminal = start_in_terminal(address, "chat")
        await terminal.wait_for("> ")
        terminal.type("hang\n")
        await terminal.wait_for("part")
        terminal.interrupt()
        await terminal.wait_for("[stopped]")
        await engine.freed.wait()
        await terminal.wait_for("> ")
        terminal.type("你好\n")
        await terminal.wait_for("complete")
        await terminal.wait_for("> ")
        terminal.type("\x04")
        assert await terminal.end() == 0
    assert prompts_of(engine) == ["hang>", "hang|part|你好>"]


async def test_a_chat_confirms_its_commands_and_keeps_a_history(start_in_terminal: Any, tmp_path: Path) -> None:
    saved, history = tmp_path / "saved.json", tmp_path / "state/yuan-grpc/chat_history"
    async with serve_grpc(FakeEngine(last("yes"))) as address:
        for lines in (
            {"你好": "yes", f"/save {saved}": f"[saved 2 messages to {saved}]", "/undo": "[removed: 你好]"},
            {f"/load {saved}": f"[loaded 2 messages from {saved}]", "/set top_k=3": "[top_k = 3]", "/reset": "[conv"},
        ):
            terminal = start_in_terminal(address, "chat", XDG_STATE_HOME=str(tmp_path / "state"), COLUMNS="200")
            await terminal.wait_for("fake at ")
            for line, answer in lines.items():
                await terminal.wait_for("> ")
                terminal.type(f"{line}\n")
                await terminal.wait_for(answer)
            await terminal.wait_for("> ")
            terminal.type("\x04")
            assert await terminal.end() == 0
    assert history.read_text().splitlines()[:2] == ["你好", f"/save {saved}"]
    assert history.read_text().splitlines()[-1] == "/reset"
    assert history.stat().st_mode & 0o777 == 0o600
