"""Many requests of one call, a bounded number of them at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from yuan_grpc.server.batch import IN_FLIGHT
from yuan_grpc.v1 import yuan_pb2 as pb

Result = TypeVar("Result")


async def each(
    requests: Sequence[pb.GenerateRequest], work: Callable[[int, pb.GenerateRequest], Awaitable[Result]]
) -> list[Result]:
    """The results of all, in order. The first that fails ends the others, and its error is raised.

    Args:
        requests: one alone is worked at in the current task.
        work: is given a request's place and the request.
    """
    if len(requests) == 1:
        return [await work(0, requests[0])]
    places = asyncio.Semaphore(IN_FLIGHT)

    async def one(place: int, request: pb.GenerateRequest) -> Result:
        async with places:
            return await work(place, request)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*numbered)) for numbered in enumerate(requests)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
