"""Feeding the requests of one call through the engine's queue."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from yuan_grpc.server.core.backoff import Backoff
from yuan_grpc.server.core.limits import MAX_IN_FLIGHT, WeightedSemaphore
from yuan_grpc.server.errors import OverloadedError

Result = TypeVar("Result")


class QueueFeeder:
    """Runs the requests of one call, at most as many at a time as a call may run and the queue can hold.

    Other calls may fill the queue. Once a request of this call was accepted, the others wait for their turn. Otherwise
    the call is refused like any other.

    Args:
        queue_limit: maximum number of running and waiting choices of the engine; None for no limit.

    Attributes:
        permits: a permit for each choice or beam that may run.
    """

    def __init__(self, queue_limit: int | None) -> None:
        self.permits = WeightedSemaphore(MAX_IN_FLIGHT if queue_limit is None else min(MAX_IN_FLIGHT, queue_limit))
        self._num_running = 0
        self._has_finished = False

    async def run(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Return the result of a request that has its permits.

        Args:
            call: sends the request to the engine. It raises OverloadedError only before the engine has accepted it.

        Raises:
            OverloadedError: the queue is full, and no request of this call has been accepted.
        """
        backoff = Backoff()
        while True:
            self._num_running += 1
            try:
                result = await call()
                self._has_finished = True
                return result
            except OverloadedError:
                if not self._has_finished and self._num_running == 1:
                    raise
            finally:
                self._num_running -= 1
            await backoff.wait()
