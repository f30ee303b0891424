"""`yuan-grpc chat`: a conversation."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from yuan_grpc.cli.common import connection, request_fields
from yuan_grpc.cli.common.connection import FAILED
from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.signals import Interruptible
from yuan_grpc.cli.common.terminal import DIM, complain, is_terminal, tell, visible
from yuan_grpc.cli.generate import ending
from yuan_grpc.client import AsyncClient, YuanError
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_TOKENS = 512
ROLES = ("system", "user", "assistant")

COMMANDS = """\
/reset              forget the conversation
/undo               take the last turn and its answer back
/save FILE          write the conversation, as JSON
/load FILE          go on with one that was written
/set FIELD=VALUE    set a field of the requests to come; /set FIELD takes it back, /set shows them
/help               this
/quit               leave, as Ctrl-D does
A line that begins with // is sent with one of them. Ctrl-C stops an answer, and keeps what has come of it.\
"""

Message = dict[str, str]
"""A message's role and content."""


def add_command(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk with the model",
        description="A conversation, all of which the model sees at each turn. Turns are lines.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--system", metavar="TEXT", help="what stands before the conversation")
    parser.add_argument(
        "--truncate", action="store_true", help="forget the beginning of a conversation that gets too long"
    )
    request_fields.add_options(parser, MAX_TOKENS)
    connection.add_options(parser)
    parser.set_defaults(run=connection.at_the_edge(_run))


def _run(options: argparse.Namespace) -> int:
    given = request_fields.of(options)
    if any(name in given for name in request_fields.PROMPTS):
        raise UsageError("a chat makes its prompts itself: use generate, or --system")
    if given.get("n", 1) != 1:
        raise UsageError("a chat has one answer to each turn: -n must be 1")
    if options.truncate:
        given["truncate_prompt_tokens"] = -1
    client = connection.connect(options)
    with Interruptible() as loop:
        chat = Chat(client, loop, given, options.system or "", options.address)
        for line in _lines():
            if not chat.take(line):
                break
        loop.run(client.close())
    return FAILED if chat.failed and not is_terminal(sys.stdin) else 0


def _lines() -> Iterator[str]:
    """What is typed, or the lines of stdin. Ends at Ctrl-C and Ctrl-D."""
    if not is_terminal(sys.stdin):
        yield from (line.rstrip("\r\n") for line in sys.stdin or ())
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - which gives `input` its history and its editing
    tell("/help lists what can be done besides talking; Ctrl-D leaves.", DIM)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


class Chat:
    """A conversation under way.

    Attributes:
        turns: what has been said.
        failed: whether some turn got no answer.
    """

    def __init__(
        self, client: AsyncClient, loop: Interruptible, given: request_fields.Fields, system: str, address: str
    ) -> None:
        self._client, self._loop, self._fields, self._address = client, loop, given, address
        self._opening: list[Message] = [_turn("system", system)] if system else []
        self.turns: list[Message] = list(self._opening)
        self.failed = False

    def take(self, line: str) -> bool:
        """A line of the person's, a turn or a command. Returns whether to go on."""
        if not line.strip():
            return True
        if line.startswith("//"):
            line = line[1:]
        elif line.startswith("/"):
            return self._command(line)
        self._answer(line)
        return True

    def _command(self, line: str) -> bool:
        name, _, rest = line[1:].partition(" ")
        if name == "quit":
            return False
        commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "undo": self._undo,
            "save": self._save,
            "load": self._load,
            "set": self._set,
            "help": lambda _: tell(COMMANDS),
        }
        if name in commands:
            commands[name](rest.strip())
        else:
            complain(f"there is no /{name}; /help lists what there is, and // sends a line that begins with a stroke")
        return True

    def _answer(self, text: str) -> None:
        turns, pieces = [*self.turns, _turn("user", text)], list[str]()
        try:
            request = request_fields.request_of({**self._fields, "messages": turns})
            self._loop.run(self._print(request, pieces))
        except request_fields.FieldError as error:
            self._fail(str(error))
            return
        except YuanError as error:
            self._tell_error(error)
            return
        except KeyboardInterrupt:
            tell("[stopped]", DIM)
        self._keep(turns, "".join(pieces))

    async def _print(self, request: pb.GenerateRequest, pieces: list[str]) -> None:
        """Prints an answer as it comes, and adds its pieces to the list."""
        began, is_shown = time.monotonic(), is_terminal(sys.stdout)
        async with self._client.stream(request) as stream:
            try:
                with Progress("waiting for the first token") as waiting:
                    async for delta in stream:
                        waiting.end()
                        pieces.append(delta)
                        print(visible(delta) if is_shown else delta, end="", flush=True)
            finally:
                if pieces:
                    print(flush=True)
            if is_terminal(sys.stderr):
                tell(ending(stream.answer, time.monotonic() - began), DIM)

    def _keep(self, turns: list[Message], answer: str) -> None:
        if answer:
            self.turns = [*turns, _turn("assistant", answer)]
        else:  # no conversation may have one
            tell("[an empty answer; the turn is not kept]", DIM)

    def _tell_error(self, error: YuanError) -> None:
        self.failed = True
        connection.tell_error(error)
        connection.suggest(error, self._address)
        if any(one.field == "messages" and "tokens long" in one.description for one in error.violations):
            tell("The conversation is too long, and this turn is not kept. /undo takes the last one back too, /reset")
            tell("begins anew, and with /set truncate_prompt_tokens=-1 (or --truncate) its beginning is forgotten.")

    def _fail(self, sentence: str) -> None:
        self.failed = True
        complain(sentence)

    def _reset(self, _: str) -> None:
        self.turns = list(self._opening)

    def _undo(self, _: str) -> None:
        asked = [index for index, turn in enumerate(self.turns) if turn["role"] == "user"]
        if asked:
            del self.turns[asked[-1] :]
        else:
            complain("there is no turn to take back")

    def _save(self, path: str) -> None:
        try:
            text = json.dumps({"messages": self.turns}, ensure_ascii=False, indent=2)
            Path(path).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self._fail(f"{path or 'a file that has no name'} cannot be written: {error.strerror}")

    def _load(self, path: str) -> None:
        try:
            self.turns = _conversation(json.loads(Path(path).read_bytes().decode("utf-8-sig")))
        except OSError as error:
            self._fail(f"{path or 'a file that has no name'} cannot be read: {error.strerror}")
        except (ValueError, RecursionError) as error:
            self._fail(f"{path} has no conversation: {error}")

    def _set(self, assignment: str) -> None:
        name, equals, _ = assignment.partition("=")
        try:
            if equals:
                field, value = request_fields.assignment(assignment)
                if field in (*request_fields.PROMPTS, "n"):
                    raise argparse.ArgumentTypeError(f"`{field}` cannot be set in a chat")
                self._fields[field] = value
            elif name:
                self._fields.pop(request_fields.named(name), None)
            else:
                tell(json.dumps(self._fields, ensure_ascii=False))
        except (argparse.ArgumentTypeError, request_fields.FieldError) as error:
            self._fail(str(error))


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _conversation(value: Any) -> list[Message]:
    """The turns of JSON: `{"messages": [...]}`, or the list alone.

    Raises:
        ValueError: it is something else.
    """
    turns = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(turns, list):
        raise ValueError('it must be {"messages": [{"role": "user", "content": "…"}, …]}')
    for number, turn in enumerate(turns):
        is_turn = isinstance(turn, dict) and set(turn) == {"role", "content"} and turn["role"] in ROLES
        if not (is_turn and isinstance(turn["content"], str) and turn["content"]):
            raise ValueError(f"message {number} must have a role, one of {', '.join(ROLES)}, and a content")
    return turns
