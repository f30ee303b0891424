"""`yuan-grpc chat`: an interactive conversation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common import connection, request_fields
from yuan_grpc.cli.common.errors import (
    EXIT_FAILURE,
    UsageError,
    handle_errors,
    print_failed_call,
)
from yuan_grpc.cli.common.message_prompt import read_messages
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.rates import ReplyTimer
from yuan_grpc.cli.common.signals import InterruptibleLoop
from yuan_grpc.cli.common.terminal import (
    DIM,
    is_terminal,
    print_error,
    print_note,
    print_stderr,
    sanitize,
    sanitize_line,
)
from yuan_grpc.client import AsyncClient, YuanError
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_TOKENS = 512
ROLES = ("system", "user", "assistant")

COMMANDS = '''\
/reset              clear the conversation
/undo               remove the last message and its reply
/save FILE          save the conversation as JSON
/load FILE          load a saved conversation
/set FIELD=VALUE    set a request field for later messages
/set FIELD          unset it
/set                show the fields that are set
/verbose            show times and rates after each reply, or stop it
/help               show this list
/quit               leave (or Ctrl-D)
//TEXT              send a message that begins with /
"""                 begin or end a message of several lines
\\                   at the end of a line: continue on the next
Ctrl-C              stop the reply and keep the text received so far\
'''

Message = dict[str, str]
"""A message's role and content."""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help=SUMMARIES["chat"],
        description="Chat with the model, which sees the whole conversation.",
        epilog=f"In the chat:\n{COMMANDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--system", metavar="TEXT", help="system message that starts the conversation")
    parser.add_argument("--truncate", action="store_true", help="drop the start of a conversation that is too long")
    parser.add_argument("--verbose", action="store_true", help="show times and rates after each reply, on stderr")
    parser.add_argument("--no-history", action="store_true", help="neither read nor keep the lines of earlier chats")
    request_fields.add_options(parser, MAX_TOKENS)
    connection.add_options(parser)
    parser.set_defaults(run=handle_errors(_run))


def _run(options: argparse.Namespace) -> int:
    fields = request_fields.from_options(options)
    if any(name in fields for name in request_fields.PROMPT_FIELDS):
        raise UsageError("chat builds its own prompts: use --system, or the generate command")
    if fields.get("n", 1) != 1:
        raise UsageError("-n must be 1 in a chat")
    if options.truncate:
        fields["truncate_prompt_tokens"] = -1
    client = connection.connect(options)
    with InterruptibleLoop() as loop:
        if is_terminal(sys.stdin):
            loop.run(_print_greeting(client, options))
        chat = Chat(client, loop, fields, options)
        for line in _read_lines(options):
            if not chat.handle_line(line):
                break
        loop.run(client.close())
    return EXIT_FAILURE if chat.has_failed and not is_terminal(sys.stdin) else 0


def _read_lines(options: argparse.Namespace) -> Iterator[str]:
    """Yield messages and commands: from a terminal, or one for each line of stdin."""
    if is_terminal(sys.stdin):
        yield from read_messages(keeps_history=not options.no_history)
    else:
        yield from (line.rstrip("\r\n") for line in sys.stdin or ())


async def _print_greeting(client: AsyncClient, options: argparse.Namespace) -> None:
    model = await client.model()
    name = f"{options.model} on {model.name}" if options.model else model.name
    print_note(sanitize_line(f"{name} at {options.address}"))
    print_note('/help lists commands. """ begins and ends a message of several lines.')


class Chat:
    """A conversation in progress.

    Attributes:
        messages: the messages so far.
        has_failed: whether a message or a command failed.
    """

    def __init__(
        self,
        client: AsyncClient,
        loop: InterruptibleLoop,
        fields: request_fields.Fields,
        options: argparse.Namespace,
    ) -> None:
        self._client, self._loop, self._fields, self._options = client, loop, fields, options
        self._initial_messages: list[Message] = [_message("system", options.system)] if options.system else []
        self.messages: list[Message] = list(self._initial_messages)
        self.has_failed = False
        self._is_verbose: bool = options.verbose

    def handle_line(self, line: str) -> bool:
        """Send a line as a message, or run it as a command. Return False if the chat should end."""
        if not line.strip():
            return True
        if line.startswith("//"):
            line = line[1:]
        elif line.startswith("/"):
            return self._run_command(line)
        self._send(line)
        return True

    def _run_command(self, line: str) -> bool:
        name, _, argument = line[1:].partition(" ")
        if name == "quit":
            return False
        commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "undo": self._undo,
            "save": self._save,
            "load": self._load,
            "set": self._set,
            "verbose": self._toggle_verbose,
            "help": lambda _: print_stderr(COMMANDS),
        }
        if name in commands:
            commands[name](argument.strip())
        else:
            print_error(f"unknown command /{name}: /help lists commands, // sends a message that begins with /")
        return True

    def _send(self, text: str) -> None:
        messages, deltas = [*self.messages, _message("user", text)], list[str]()
        try:
            request = request_fields.build_request({**self._fields, "messages": messages})
            self._loop.run(self._stream_reply(request, deltas))
        except request_fields.FieldError as error:
            self._fail(str(error))
            return
        except YuanError as error:
            self._fail_call(error)
            return
        except KeyboardInterrupt:
            print_stderr("[stopped]", DIM)
        self._append_reply(messages, "".join(deltas))

    async def _stream_reply(self, request: pb.GenerateRequest, deltas: list[str]) -> None:
        """Print the reply while it streams, and append its text deltas to the list."""
        timer, to_terminal = ReplyTimer(), is_terminal(sys.stdout)
        async with self._client.stream(request) as stream:
            try:
                with Progress("waiting for the first token") as progress:
                    async for delta in stream:
                        progress.end()
                        timer.record_text()
                        deltas.append(delta)
                        print(sanitize(delta) if to_terminal else delta, end="", flush=True)
            finally:
                if deltas:
                    print(flush=True)
            if self._is_verbose:
                print_stderr(timer.format_rates(stream.completion), DIM)
            elif is_terminal(sys.stderr):
                print_note(timer.format_summary(stream.completion))

    def _append_reply(self, messages: list[Message], reply: str) -> None:
        if reply:
            self.messages = [*messages, _message("assistant", reply)]
        else:  # the server rejects messages without content
            print_stderr("[empty reply; the message was dropped]", DIM)

    def _fail_call(self, error: YuanError) -> None:
        self.has_failed = True
        print_failed_call(error, self._options)
        if any(one.field == "messages" and "tokens long" in one.description for one in error.violations):
            print_stderr("The conversation is too long; the message was dropped. Use /undo or /reset to shorten it, or")
            print_stderr("/set truncate_prompt_tokens=-1 (or start with --truncate) to drop its beginning.")

    def _fail(self, message: str) -> None:
        self.has_failed = True
        print_error(message)

    def _reset(self, _: str) -> None:
        self.messages = list(self._initial_messages)
        _confirm("conversation cleared")

    def _undo(self, _: str) -> None:
        user_indices = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if user_indices:
            text = self.messages[user_indices[-1]]["content"]
            del self.messages[user_indices[-1] :]
            _confirm(f"removed: {text[:60]}")
        else:
            print_error("there is no message to undo")

    def _toggle_verbose(self, _: str) -> None:
        self._is_verbose = not self._is_verbose
        _confirm(f"times and rates are {'on' if self._is_verbose else 'off'}")

    def _save(self, path: str) -> None:
        try:
            text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
            Path(path).write_text(text + "\n", encoding="utf-8")
            _confirm(f"saved {len(self.messages)} messages to {path}")
        except OSError as error:
            self._fail(f"{path or 'a file without a name'} cannot be written: {error.strerror}")

    def _load(self, path: str) -> None:
        try:
            self.messages = _parse_messages(json.loads(Path(path).read_bytes().decode("utf-8-sig")))
            _confirm(f"loaded {len(self.messages)} messages from {path}")
        except OSError as error:
            self._fail(f"{path or 'a file without a name'} cannot be read: {error.strerror}")
        except (ValueError, RecursionError) as error:
            self._fail(f"{path} is not a conversation: {error}")

    def _set(self, assignment: str) -> None:
        name, equals, _ = assignment.partition("=")
        try:
            if equals:
                field, value = request_fields.parse_assignment(assignment)
                if field in (*request_fields.PROMPT_FIELDS, "n"):
                    raise argparse.ArgumentTypeError(f"`{field}` cannot be set in a chat")
                self._fields[field] = value
                _confirm(f"{field} = {json.dumps(value, ensure_ascii=False)}")
            elif name:
                self._fields.pop(request_fields.field_name(name), None)
                _confirm(f"{request_fields.field_name(name)} is unset")
            else:
                print_stderr(json.dumps(self._fields, ensure_ascii=False))
        except (argparse.ArgumentTypeError, request_fields.FieldError) as error:
            self._fail(str(error))


def _confirm(text: str) -> None:
    """Print at a terminal what a command has done."""
    if is_terminal(sys.stderr):
        print_note(sanitize_line(f"[{text}]"))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _parse_messages(value: Any) -> list[Message]:
    """Return the messages of JSON: `{"messages": [...]}`, or the list alone.

    Raises:
        ValueError: the value has another form.
    """
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise ValueError('must be {"messages": [{"role": "user", "content": "…"}, …]}')
    for number, message in enumerate(messages):
        is_message = isinstance(message, dict) and set(message) == {"role", "content"} and message["role"] in ROLES
        if not (is_message and isinstance(message["content"], str) and message["content"]):
            raise ValueError(f"message {number} must have a role ({', '.join(ROLES)}) and nonempty content")
    return messages
