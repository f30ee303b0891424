"""The start of an engine's processes, which blocks for long and can be interrupted."""

import asyncio
import multiprocessing
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import TypeVar

from yuan_grpc.server.engine.vllm import engine_log, failure
from yuan_grpc.server.engine.vllm.folders import TemporaryFolder
from yuan_grpc.server.start_error import StartError

POLL_SECONDS = 0.1

Result = TypeVar("Result")


class Launch:
    """One start of an engine: its private folder, its thread, and the cause of its failure."""

    def __init__(self) -> None:
        self._folder: TemporaryFolder | None = None
        self._thread: Thread | None = None

    @contextmanager
    def failures_described(self) -> Generator[None, None, None]:
        """Turn an exception of the block into a `StartError` with the cause that the engine's processes logged.

        Raises:
            StartError: the engine could not be started.
        """
        self._folder = TemporaryFolder()
        with engine_log.failure_file(self._folder.name) as failures:
            try:
                yield
            except Exception as error:
                raise StartError(failure.describe(error, engine_log.read_failures(failures))) from error

    async def run(self, start: Callable[[str], Result]) -> Result:
        """Run a function in a daemon thread, which does not keep the process from ending, and return its result.

        Args:
            start: gets the private folder for sockets and temporary files.
        """
        self._thread, started = _in_daemon_thread(lambda: start(self.folder))
        return await started

    @property
    def folder(self) -> str:
        """The private folder, once the start has begun."""
        assert self._folder is not None
        return self._folder.name

    def kill(self) -> None:
        """Kill the processes that have been started, until the function has returned."""
        while self._thread and (self._thread.is_alive() or multiprocessing.active_children()):
            for process in multiprocessing.active_children():  # the thread may start another one
                process.kill()  # during its setup, the engine ignores other signals
            self._thread.join(POLL_SECONDS)

    def clean_up(self) -> None:
        """Remove the private folder."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _in_daemon_thread(call: Callable[[], Result]) -> tuple[Thread, asyncio.Future[Result]]:
    done: Future[Result] = Future()
    done.set_running_or_notify_cancel()  # cancelling the waiting task must not cancel the call

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    thread = Thread(target=run, name="engine-start", daemon=True)
    thread.start()
    return thread, asyncio.wrap_future(done)
