"""Generation for gRPC and HTTP: parse, validate, plan and run a request, and build its response."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from uuid import uuid4

from yuan_grpc.server.core.access_log import current_outcome
from yuan_grpc.server.core.admission import Admission, Ticket, limits_of, min_output_tokens, request_cost
from yuan_grpc.server.core.best_of import OutputAccumulator
from yuan_grpc.server.core.convert import parse_request
from yuan_grpc.server.core.deadline import deadline_event
from yuan_grpc.server.core.heartbeat import with_heartbeats
from yuan_grpc.server.core.inflight import ANY_CONNECTION, InflightRequests, call_owner
from yuan_grpc.server.core.limits import MAX_INLINE_CHARACTERS, BeamLimits, WeightedSemaphore
from yuan_grpc.server.core.message_interval import with_pauses
from yuan_grpc.server.core.plan import RequestPlan, plan_request, run_plan
from yuan_grpc.server.core.request_stats import RequestStats
from yuan_grpc.server.core.response import ResponseBuilder
from yuan_grpc.server.core.validation import prompt_size, validate_generate, validate_prompt_size
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import INLINE_ENTRIES, StepOutput
from yuan_grpc.server.errors import UnavailableError
from yuan_grpc.server.security.identity import current_share
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
        engine: the engine that runs the requests.
        admission: limits and orders the requests; by default, those of this process alone.
        message_interval: shortest time between the messages of a stream, in seconds; 0 to send tokens at once.

    Attributes:
        inflight: the requests that are running.
        is_stalled: whether the engine makes no progress, so that new requests are refused.
        is_withdrawing: whether the server is about to stop, and still serves new requests.
    """

    def __init__(self, engine: Engine, admission: Admission | None = None, message_interval: float = 0) -> None:
        self._engine = engine
        self._message_interval = message_interval
        self.inflight = InflightRequests()
        self._admission = admission or Admission()
        self.is_stalled = self.is_withdrawing = False
        self._tokenization = WeightedSemaphore(1)
        self._beam_limits = BeamLimits()

    @property
    def engine(self) -> Engine:
        """The engine, ready for requests.

        Raises:
            UnavailableError: the engine is not ready, or makes no progress.
        """
        if not self._engine.is_ready:
            raise UnavailableError("the model is not being served: it is still loading, or the server is stopping")
        if self.is_stalled:
            raise UnavailableError("the engine makes no progress")
        return self._engine

    @property
    def queue_limit(self) -> int | None:
        """Maximum number of running and waiting choices; None before the engine is ready."""
        return limits_of(self._engine.info).queue.sequences if self._engine.is_ready else None

    def tokenization_permit(self, characters: int) -> AbstractAsyncContextManager[None]:
        """Return a context in which to tokenize a text. Long texts wait for each other, to leave cores to others."""
        return self._tokenization.hold() if characters > MAX_INLINE_CHARACTERS else nullcontext()

    async def generate(
        self,
        request: pb.GenerateRequest,
        remaining: float | None = None,
        connection: str | None = None,
    ) -> pb.GenerateResponse:
        """Return the response once all choices have finished. Cancellation frees the engine request.

        Args:
            request: gets a `request_id` if it has none.
            remaining: seconds until the caller's deadline, used with `partial_on_deadline`; None without one.
            connection: the caller's connection, on which its request id is valid; None if it is valid nowhere.
        """
        with self._track(request, remaining, connection) as (ticket, deadline):
            plan = await self._plan(request, stats := RequestStats())
            outputs = self._run(plan, ticket, stats, stream=False, deadline=deadline)
            output = await _all_outputs(outputs, plan.n, stats)
            self._observe_pace(ticket, stats)
            builder = _response_builder(request, plan, stats)
            if output.num_entries > INLINE_ENTRIES:
                return await asyncio.to_thread(builder.build_response, output)
            return builder.build_response(output)

    @asynccontextmanager
    async def stream(
        self,
        request: pb.GenerateRequest,
        remaining: float | None = None,
        connection: str | None = None,
    ) -> AsyncGenerator[ResponseStream, None]:
        """Yield the response as a stream. Leaving the block frees the engine request; arguments as for `generate`."""
        with self._track(request, remaining, connection) as (ticket, deadline):
            plan = await self._plan(request, stats := RequestStats(stream=True))
            outputs = self._run(plan, ticket, stats, stream=True, deadline=deadline)
            if self._message_interval:
                outputs = with_pauses(outputs, self._message_interval, deadline)
            outputs_and_heartbeats = with_heartbeats(outputs, plan.heartbeat_seconds)
            messages = _messages(_response_builder(request, plan, stats), outputs_and_heartbeats, stats)
            async with aclosing(messages):
                yield ResponseStream(plan.echo, messages)
            self._observe_pace(ticket, stats)

    @contextmanager
    def _track(
        self, request: pb.GenerateRequest, remaining: float | None, connection: str | None
    ) -> Iterator[tuple[Ticket, asyncio.Event | None]]:
        """Admit and track the request; yield its ticket, and the event that ends it with partial output."""
        if not request.request_id:
            request.request_id = uuid4().hex
            connection = ANY_CONNECTION
        owner = call_owner(connection)
        self.inflight.check_admitting()
        info, is_partial = self.engine.info, request.partial_on_deadline
        with (
            self._admission.admit(
                current_share(),
                request_cost(request, info),
                limits_of(info),
                min_tokens=min_output_tokens(request, info),
                remaining=None if is_partial else remaining,
            ) as ticket,
            self.inflight.track(request.request_id, owner),
            deadline_event(remaining if is_partial else None) as deadline,
        ):
            yield ticket, deadline

    async def _plan(self, request: pb.GenerateRequest, stats: RequestStats) -> RequestPlan:
        engine, outcome = self.engine, current_outcome()
        validate_prompt_size(request, engine.info)
        async with self.tokenization_permit(prompt_size(request)):
            parsed = await parse_request(request, engine)
        validate_generate(parsed, engine.info, engine.loras)
        plan = plan_request(parsed, engine, outcome.trace_headers)
        outcome.begin(stats, plan.model, len(plan.engine_request.prompt))
        return plan

    def _run(
        self, plan: RequestPlan, ticket: Ticket, stats: RequestStats, *, stream: bool, deadline: asyncio.Event | None
    ) -> AsyncGenerator[StepOutput, None]:
        outputs = run_plan(plan, self._engine, self._beam_limits, stream=stream, deadline=deadline)
        if self._admission.try_start(ticket, limits_of(self._engine.info)):
            return outputs
        return self._after_turn(ticket, stats, outputs, deadline)

    async def _after_turn(
        self,
        ticket: Ticket,
        stats: RequestStats,
        outputs: AsyncGenerator[StepOutput, None],
        deadline: asyncio.Event | None,
    ) -> AsyncGenerator[StepOutput, None]:
        """Yield the outputs of a request, which begins when it is its turn."""
        async with aclosing(outputs):
            await self._admission.wait_for_turn(ticket, deadline)
            stats.turn_seconds = ticket.waited
            async for output in outputs:
                yield output

    def _observe_pace(self, ticket: Ticket, stats: RequestStats) -> None:
        if ticket.started is not None:
            seconds = asyncio.get_running_loop().time() - ticket.started
            tokens = stats.completion_tokens / ticket.engine_cost.sequences
            self._admission.pace.observe(tokens, seconds)


def _response_builder(request: pb.GenerateRequest, plan: RequestPlan, stats: RequestStats) -> ResponseBuilder:
    engine_request = plan.engine_request
    return ResponseBuilder(request, plan.model, engine_request.prompt, plan.echo, engine_request.sampling.seed, stats)


async def _all_outputs(outputs: AsyncGenerator[StepOutput, None], choices: int, stats: RequestStats) -> StepOutput:
    accumulator = OutputAccumulator(choices)
    async with aclosing(outputs):
        async for output in outputs:
            stats.observe(output)
            accumulator.add(output)
    return accumulator.combined()


async def _messages(
    builder: ResponseBuilder, outputs: AsyncGenerator[StepOutput | None, None], stats: RequestStats
) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
    async with aclosing(outputs):
        async for output in outputs:
            if output is not None:
                stats.observe(output)
            for message in builder.heartbeat() if output is None else builder.build_stream_messages(output):
                yield message
