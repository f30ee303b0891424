"""Bounded concurrent execution of the requests of a batch call."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from grpc import StatusCode

from yuan_grpc.server.core.access_log import log_call, log_error
from yuan_grpc.server.core.convert import num_parallel
from yuan_grpc.server.core.queue_feeder import QueueFeeder
from yuan_grpc.server.errors import AnswerTooLargeError, to_status
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_RESPONSE_BYTES = (4 << 20) - 4096  # leaves space in the 4 MiB message for the index and the request id

Generate = Callable[[pb.GenerateRequest], Awaitable[pb.GenerateResponse]]
Write = Callable[[pb.GenerateBatchResponse], Awaitable[None]]


async def run_batch(
    items: AsyncIterator[pb.GenerateBatchRequest], generate: Generate, write: Write, feeder: QueueFeeder
) -> None:
    """Run the requests concurrently and write each result when it is finished.

    A request counts as many times as it has choices or beams, so that a batch takes no more of the engine than
    `MAX_IN_FLIGHT` requests with one choice, and no more than the queue can hold.
    A failed request is reported in its own result and does not affect the others. Returns after the last result. If the
    call is cancelled, or the items cannot be read, all running requests are cancelled.
    """
    permits, writing = feeder.permits, asyncio.Lock()

    async def run(index: int, request: pb.GenerateRequest, weight: int) -> None:
        try:
            result = await _run_one(index, request, lambda request: feeder.run(lambda: generate(request)))
            async with writing:  # the permit stays taken until the client has read the result, so none pile up here
                await write(result)
        finally:
            permits.release(weight)

    running: set[asyncio.Task[None]] = set()

    def forget(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not task.exception():  # `gather` raises a failed write, which ends the call
            running.discard(task)

    try:
        index = 0
        async for item in items:
            weight = await permits.acquire(num_parallel(item.request))
            running.add(task := asyncio.create_task(run(index, item.request, weight)))
            task.add_done_callback(forget)
            index += 1
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _check_size(response: pb.GenerateResponse) -> None:
    """Raise if the response is too large: most clients reject larger messages and would lose the whole batch."""
    if (size := response.ByteSize()) > MAX_RESPONSE_BYTES:
        raise AnswerTooLargeError(
            f"the response to a request of a batch must be at most {MAX_RESPONSE_BYTES} bytes, not {size}"
        )


async def _run_one(index: int, request: pb.GenerateRequest, generate: Generate) -> pb.GenerateBatchResponse:
    with log_call("GenerateBatch", method="GenerateBatch.request") as outcome:
        result = pb.GenerateBatchResponse(index=index)
        try:
            result.response.CopyFrom(await generate(request))
            _check_size(result.response)
            outcome.code = StatusCode.OK
        except Exception as error:
            code, status = to_status(error)
            outcome.set_error(error, code)
            log_error(error, outcome.code, request.request_id)
            result.error.MergeFromString(status.SerializeToString())  # yuan.v1's status has google.rpc.Status's fields
        finally:
            outcome.subject = result.request_id = request.request_id
        return result
