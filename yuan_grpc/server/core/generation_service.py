"""Generation for gRPC and HTTP: parse, validate, plan and run a request, and build its response."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from uuid import uuid4

from yuan_grpc.server.core.best_of import OutputAccumulator
from yuan_grpc.server.core.convert import parse_request
from yuan_grpc.server.core.deadline import deadline_event
from yuan_grpc.server.core.heartbeat import with_heartbeats
from yuan_grpc.server.core.inflight import InflightRequests
from yuan_grpc.server.core.plan import RequestPlan, plan_request, run_plan
from yuan_grpc.server.core.response import ResponseBuilder
from yuan_grpc.server.core.validation import validate_generate
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import INLINE_ENTRIES, StepOutput
from yuan_grpc.server.errors import UnavailableError
from yuan_grpc.v1 import yuan_pb2 as pb


@dataclass(frozen=True)
class ResponseStream:
    """The messages of a streamed response, in order.

    Attributes:
        echo: text that each choice begins with; the first message of a choice includes it.
    """

    echo: str
    _messages: AsyncGenerator[pb.GenerateStreamResponse, None]

    def __aiter__(self) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        return self._messages


class GenerationService:
    """Runs generate requests on an engine. Its methods raise the errors of `server.errors`.

    Args:
        engine: the engine to run them on.

    Attributes:
        inflight: the requests that are running.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.inflight = InflightRequests()

    @property
    def engine(self) -> Engine:
        """The engine, ready for requests.

        Raises:
            UnavailableError: the engine is not ready.
        """
        if not self._engine.is_ready:
            raise UnavailableError("the model is not being served: it is still loading, or the server is stopping")
        return self._engine

    async def generate(self, request: pb.GenerateRequest, remaining: float | None = None) -> pb.GenerateResponse:
        """Return the response once all choices have finished. Cancellation frees the engine request.

        Args:
            request: gets a `request_id` if it has none.
            remaining: seconds until the caller's deadline, used with `partial_on_deadline`; None without one.
        """
        with self._track(request, remaining) as deadline:
            plan = await self._plan(request)
            output = await _all_outputs(run_plan(plan, self._engine, stream=False, deadline=deadline), plan.n)
            builder = _response_builder(request, plan)
            if output.num_entries > INLINE_ENTRIES:
                return await asyncio.to_thread(builder.build_response, output)
            return builder.build_response(output)

    @asynccontextmanager
    async def stream(
        self, request: pb.GenerateRequest, remaining: float | None = None
    ) -> AsyncGenerator[ResponseStream, None]:
        """Yield the response as a stream. Leaving the block frees the engine request; arguments as for `generate`."""
        with self._track(request, remaining) as deadline:
            plan = await self._plan(request)
            outputs = run_plan(plan, self._engine, stream=True, deadline=deadline)
            messages = _messages(_response_builder(request, plan), with_heartbeats(outputs, plan.heartbeat_seconds))
            async with aclosing(messages):
                yield ResponseStream(plan.echo, messages)

    @contextmanager
    def _track(self, request: pb.GenerateRequest, remaining: float | None) -> Iterator[asyncio.Event | None]:
        """Track the request under its id, and yield the event that ends it with partial output."""
        request.request_id = request.request_id or uuid4().hex
        with (
            self.inflight.track(request.request_id),
            deadline_event(remaining if request.partial_on_deadline else None) as deadline,
        ):
            yield deadline

    async def _plan(self, request: pb.GenerateRequest) -> RequestPlan:
        engine = self.engine
        parsed = await parse_request(request, engine)
        validate_generate(parsed, engine.info, engine.loras)
        return plan_request(parsed, engine)


def _response_builder(request: pb.GenerateRequest, plan: RequestPlan) -> ResponseBuilder:
    engine_request = plan.engine_request
    return ResponseBuilder(request, plan.model, engine_request.prompt, plan.echo, engine_request.sampling.seed)


async def _all_outputs(outputs: AsyncGenerator[StepOutput, None], choices: int) -> StepOutput:
    accumulator = OutputAccumulator(choices)
    async with aclosing(outputs):
        async for output in outputs:
            accumulator.add(output)
    return accumulator.combined()


async def _messages(
    builder: ResponseBuilder, outputs: AsyncGenerator[StepOutput | None, None]
) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
    async with aclosing(outputs):
        async for output in outputs:
            for message in builder.heartbeat() if output is None else builder.build_stream_messages(output):
                yield message
