"""Many requests over one call, a bounded number of them at a time."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from grpc import StatusCode

from yuan_grpc.server.core.access_log import log_call, log_error
from yuan_grpc.server.core.limits import IN_FLIGHT
from yuan_grpc.server.errors import AnswerTooLargeError, status_of
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_ANSWER = (4 << 20) - 4096  # beside which a batch has the request's place and name

Answer = Callable[[pb.GenerateRequest], Awaitable[pb.GenerateResponse]]
Write = Callable[[pb.GenerateBatchResponse], Awaitable[None]]


async def run_batch(items: AsyncIterator[pb.GenerateBatchRequest], answer: Answer, write: Write) -> None:
    """Answers each request as soon as it is finished; one that fails is told so, and harms no other.

    Returns when all are answered. Cancelled, or when the items themselves fail, it ends all that run.
    """
    places, writing = asyncio.Semaphore(IN_FLIGHT), asyncio.Lock()

    async def run(index: int, request: pb.GenerateRequest) -> None:
        try:
            response = await _one(index, request, answer)
            async with writing:  # a place is taken until the caller has read so far: nothing piles up here
                await write(response)
        finally:
            places.release()

    running: set[asyncio.Task[None]] = set()

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not task.exception():  # an answer that could not be written stays, to end the call
            running.discard(task)

    try:
        index = 0
        await places.acquire()
        async for item in items:
            running.add(task := asyncio.create_task(run(index, item.request)))
            task.add_done_callback(ended)
            index += 1
            await places.acquire()
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _check_size(response: pb.GenerateResponse) -> None:
    """Most clients take no message of more, and would lose the call with all its other requests."""
    if (size := response.ByteSize()) > MAX_ANSWER:
        raise AnswerTooLargeError(f"a request's answer must be at most {MAX_ANSWER} bytes in a batch, not {size}")


async def _one(index: int, request: pb.GenerateRequest, answer: Answer) -> pb.GenerateBatchResponse:
    with log_call("GenerateBatch") as outcome:
        reply = pb.GenerateBatchResponse(index=index)
        try:
            reply.response.CopyFrom(await answer(request))
            _check_size(reply.response)
            outcome.code = StatusCode.OK
        except Exception as error:
            outcome.code, status = status_of(error)
            log_error(error, outcome.code, request.request_id)
            reply.error.MergeFromString(status.SerializeToString())  # the same fields
        finally:
            outcome.subject = reply.request_id = request.request_id
        return reply
