"""Calls between the supervisor and a front end, over a pipe."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from traceback import format_exception
from typing import Any

Handler = Callable[..., Awaitable[object]]


class PeerLostError(Exception):
    """The process at the other end of the pipe has ended, or is ending."""


class ControlChannel:
    """One end of a pipe. Both processes can call the functions of the other one.

    Messages are tuples of a kind, a number and the rest: `call` with the name and the arguments of a function, its
    `result` or `error`, and `cancel`. A call without a result has the number 0.

    Args:
        connection: the end of the pipe.
        handlers: the functions that the other process can call, by name.
    """

    def __init__(self, connection: Connection, handlers: Mapping[str, Handler]) -> None:
        self._connection = connection
        self._handlers = handlers
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._last_number = 0
        self.closed = asyncio.Event()

    def start(self) -> None:
        """Handle the messages of the other process until it ends."""
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._read)

    async def call(self, name: str, *arguments: object) -> Any:
        """Call a function of the other process, and return its result. Cancelling cancels it there, too.

        Raises:
            PeerLostError: the other process has ended.
            Exception: the exception of the function.
        """
        self._last_number += 1
        number = self._last_number
        self._waiting[number] = future = asyncio.get_running_loop().create_future()
        try:
            self._send("call", number, name, arguments)
            return await future
        except asyncio.CancelledError:
            self._send("cancel", number)
            raise
        finally:
            del self._waiting[number]

    def notify(self, name: str, *arguments: object) -> None:
        """Call a function of the other process without waiting for its result."""
        self._send("call", 0, name, arguments)

    def close(self) -> None:
        """Close the pipe, and fail the calls that wait for a result."""
        if self.closed.is_set():
            return
        self.closed.set()
        asyncio.get_running_loop().remove_reader(self._connection.fileno())
        self._connection.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(PeerLostError())
        for task in (*self._running.values(), *self._background):
            task.cancel()

    def _send(self, *message: object) -> None:
        if not self.closed.is_set():
            with suppress(BrokenPipeError, ConnectionResetError):  # the reader notices
                self._connection.send(message)

    def _read(self) -> None:
        try:
            while not self.closed.is_set() and self._connection.poll():
                self._dispatch(*self._connection.recv())
        except (EOFError, OSError):
            self.close()

    def _dispatch(self, kind: str, number: int, *rest: Any) -> None:
        match kind:
            case "call":
                task = asyncio.ensure_future(self._run_handler(number, *rest))
                if number:
                    self._running[number] = task
                else:
                    self._background.add(task)
                    task.add_done_callback(self._background.discard)
            case "cancel" if number in self._running:
                self._running[number].cancel()
            case "result" | "error" if (future := self._waiting.get(number)) and not future.done():
                if kind == "result":
                    future.set_result(rest[0])
                else:
                    future.set_exception(rest[0])

    async def _run_handler(self, number: int, name: str, arguments: tuple[object, ...]) -> None:
        try:
            result = await self._handlers[name](*arguments)
        except Exception as error:
            if not number:
                raise
            error.add_note(f"In the other process:\n{''.join(format_exception(error))}")  # the pipe drops the traceback
            self._send("error", number, error)
        else:
            if number:
                self._send("result", number, result)
        finally:
            self._running.pop(number, None)
