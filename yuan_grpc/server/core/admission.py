"""The admission of requests: limits on what callers have running and waiting, and fair turns on the engine."""

import asyncio
import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from yuan_grpc.server.core.convert import is_prompt_only, num_parallel
from yuan_grpc.server.core.limits import MAX_MESSAGES
from yuan_grpc.server.core.pace import Pace
from yuan_grpc.server.core.validation import prompt_size
from yuan_grpc.server.engine.types import ModelInfo, Sampling
from yuan_grpc.server.errors import DeadlineTooShortError, OverloadedError
from yuan_grpc.v1 import yuan_pb2 as pb

SHARE = 8
"""Maximum share of a caller, as a multiple of the free part of the queue. A single caller can fill 8/9 of the queue,
two 8/17 each, and so on, so that a part is always free for the next one."""

QUEUE_FACTOR = 8
"""Limit on running and waiting sequences, as a multiple of those that the engine computes at a time."""
TOKEN_FACTOR = 16
"""Limit on the tokens of running and waiting requests, as a multiple of those that fit into the cache."""
MIN_SEQUENCES = 1024
"""Minimum of the limit on sequences, for engines that compute few at a time."""

LOOKAHEAD = 4
"""Minimum number of sequences waiting in the engine, so that its next step is full."""
CACHE_OVERCOMMIT = 2
"""Limit on the tokens of requests in the engine, as a multiple of its cache: most requests need fewer than expected."""

EXPECTED_TOKENS = 512
"""Tokens that a sequence is expected to have at most: most end long before a large `max_tokens`."""
CHARACTERS_PER_TOKEN = 2
"""Characters of a token, on average: fewer than in English, more than in rare Chinese."""


@dataclass(frozen=True)
class Cost:
    """The size of a request: its sequences, and the expected tokens of all of them together."""

    sequences: int
    tokens: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.sequences + other.sequences, self.tokens + other.tokens)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.sequences - other.sequences, self.tokens - other.tokens)

    def clamp(self, limit: "Cost") -> "Cost":
        """Return the cost, at most `limit`: a larger request can run alone, and validation rejects impossible ones."""
        return Cost(min(self.sequences, limit.sequences), min(self.tokens, limit.tokens))


NOTHING = Cost(0, 0)


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
        queue: of running and waiting requests together.
        engine: of the requests in the engine; None if it schedules by priority, for which it must see all of them.
    """

    queue: Cost
    engine: Cost | None


def limits_of(info: ModelInfo) -> Limits:
    """Return the limits for a model: from `--max-num-queued-reqs`, the cache and the sequences computed at a time."""
    running = info.max_num_seqs * info.data_parallel
    sequences = info.max_num_queued_reqs or max(MIN_SEQUENCES, QUEUE_FACTOR * running)
    cache = info.cache_tokens or running * info.max_model_len
    tokens = max(TOKEN_FACTOR * cache, sequences * info.max_model_len // 4)
    lookahead = max(LOOKAHEAD, running // 8)
    engine_tokens = max(CACHE_OVERCOMMIT * cache, info.max_model_len)
    engine = None if info.priority_scheduling else Cost(running + lookahead, engine_tokens)
    return Limits(Cost(sequences, tokens), engine)


def request_cost(request: pb.GenerateRequest, info: ModelInfo) -> Cost:
    """Return the cost of a request whose prompt is not tokenized yet, with its choices and beams multiplied in."""
    sequences = max(1, num_parallel(request))
    prompt = len(request.prompt_token_ids.ids) or _characters(request, info) // CHARACTERS_PER_TOKEN
    max_tokens = request.max_tokens if request.HasField("max_tokens") else Sampling.max_tokens
    tokens = min(prompt, info.max_model_len) + min(max(0, max_tokens), EXPECTED_TOKENS, info.max_model_len)
    return Cost(sequences, sequences * max(1, tokens))


def _characters(request: pb.GenerateRequest, info: ModelInfo) -> int:
    """Return the prompt's length; the context's length if there are more messages than validation accepts."""
    return prompt_size(request) if len(request.messages) <= MAX_MESSAGES else info.max_model_len


def min_output_tokens(request: pb.GenerateRequest, info: ModelInfo) -> int:
    """Return the minimum number of tokens that each sequence of a request generates."""
    if is_prompt_only(request):
        return 0
    max_tokens = request.max_tokens if request.HasField("max_tokens") else Sampling.max_tokens
    least = max_tokens if request.ignore_eos else min(request.min_tokens, max_tokens)
    longest_prompt = len(request.prompt_token_ids.ids) or _characters(request, info)
    return max(1, min(least, info.max_model_len - longest_prompt))


class Budget(Protocol):
    """Counts of the sequences and tokens of requests. Processes that serve the same engine share them."""

    poll_seconds: float | None
    """Interval for retrying `reserve_engine`; None if no other process can make room in the engine."""

    def reserve_queue(self, caller: str, cost: Cost, limit: Cost) -> str:
        """Reserve a part of the queue. Return the reason if that is refused, else an empty string."""

    def release_queue(self, caller: str, cost: Cost) -> None:
        """Release a part of the queue."""

    def reserve_engine(self, cost: Cost, limit: Cost) -> bool:
        """Reserve a part of the engine; return False if it is full.

        The last request may exceed the limit. Otherwise a large one would wait until the engine is empty, and all
        others would wait for it.
        """

    def release_engine(self, cost: Cost) -> None:
        """Release a part of the engine."""


class LocalBudget:
    """The counts of one process."""

    poll_seconds: float | None = None

    def __init__(self) -> None:
        self._queued = self._started = NOTHING
        self._by_caller: dict[str, Cost] = {}

    def reserve_queue(self, caller: str, cost: Cost, limit: Cost) -> str:
        """Reserve a part of the queue; see `Budget.reserve_queue`."""
        used_by_caller = self._by_caller.get(caller, NOTHING)
        if refusal := refusal_of(cost, limit, self._queued, used_by_caller):
            return refusal
        self._queued += cost
        self._by_caller[caller] = used_by_caller + cost
        return ""

    def release_queue(self, caller: str, cost: Cost) -> None:
        """Release a part of the queue."""
        self._queued -= cost
        self._by_caller[caller] -= cost
        if self._by_caller[caller] == NOTHING:  # forget callers that have left
            del self._by_caller[caller]

    def reserve_engine(self, cost: Cost, limit: Cost) -> bool:
        """Reserve a part of the engine; see `Budget.reserve_engine`."""
        if self._started.sequences >= limit.sequences or self._started.tokens >= limit.tokens:
            return False
        self._started += cost
        return True

    def release_engine(self, cost: Cost) -> None:
        """Release a part of the engine."""
        self._started -= cost


def refusal_of(cost: Cost, limit: Cost, used: Cost, used_by_caller: Cost) -> str:
    """Return why a part of the queue cannot be reserved; an empty string if it can."""
    return _refusal_of(
        "the request queue", cost.sequences, limit.sequences, used.sequences, used_by_caller.sequences
    ) or _refusal_of("the queue of tokens", cost.tokens, limit.tokens, used.tokens, used_by_caller.tokens)


def _refusal_of(queue: str, size: int, limit: int, used: int, used_by_caller: int) -> str:
    if used + size > limit:
        return f"{queue} is full (limit {limit})"
    if used_by_caller + size > SHARE * (limit - used):
        return f"{queue} has no more for this caller, which has {used_by_caller} of {limit}"
    return ""


@dataclass(eq=False)
class Ticket:
    """The admission of one request.

    Attributes:
        queue_cost: its part of the queue, until it ends.
        engine_cost: its part of the engine, from its turn until it ends.
        min_tokens: minimum number of tokens of each sequence.
        deadline: the loop's time at which the caller stops waiting; None for none.
        start_tag: its position in the order; the lowest one is next.
        turn: set when the request may start; None if it did not have to wait.
        has_engine: whether its part of the engine is reserved.
        waited: seconds until its turn.
        started: the loop's time of its turn; None before.
    """

    caller: str
    queue_cost: Cost
    engine_cost: Cost
    min_tokens: int
    deadline: float | None
    start_tag: float = 0.0
    turn: "asyncio.Future[None] | None" = None
    has_engine: bool = False
    waited: float = 0.0
    started: float | None = None


class Admission:
    """Admits requests, and starts them in fair order.

    The order is that of start-time fair queueing. Each request is placed after the caller's previous one, at a distance
    of the latter's tokens. A caller with few tokens thus starts before one with many, even if that one came first.

    Args:
        budget: the counts, shared between processes.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self._budget: Budget = budget or LocalBudget()
        self._waiting: list[tuple[float, int, Ticket]] = []
        self._arrivals = 0
        self._virtual_time = 0.0
        self._next_tags: dict[str, float] = {}
        self._limit: Cost | None = None
        self._poll: asyncio.TimerHandle | None = None
        self.pace = Pace()

    @contextmanager
    def admit(
        self, caller: str, cost: Cost, limits: Limits, *, min_tokens: int = 0, remaining: float | None = None
    ) -> Iterator[Ticket]:
        """Yield the ticket of a request, whose parts of the queue and of the engine are released after the block.

        Args:
            caller: a name that the requests of one caller share.
            min_tokens: minimum number of tokens of each sequence.
            remaining: seconds until the caller's deadline; None if there is none, or if a partial result is accepted.

        Raises:
            OverloadedError: the queue is full, or the caller's share of it.
            DeadlineTooShortError: the request cannot finish before its deadline.
        """
        queue_cost, engine_cost = cost.clamp(limits.queue), cost.clamp(limits.engine or cost)
        now = asyncio.get_running_loop().time()
        ticket = Ticket(caller, queue_cost, engine_cost, min_tokens, None if remaining is None else now + remaining)
        self._check_deadline(ticket)
        if refusal := self._budget.reserve_queue(caller, queue_cost, limits.queue):
            raise OverloadedError(refusal)
        try:
            yield ticket
        finally:
            self._budget.release_queue(caller, queue_cost)
            if ticket.has_engine:
                self._budget.release_engine(engine_cost)
            self._start_waiting_requests()

    def try_start(self, ticket: Ticket, limits: Limits) -> bool:
        """Give a request its turn, if no other request waits and the engine has capacity."""
        self._limit = limits.engine
        if self._waiting or not self._reserve_engine(ticket):
            return False
        self._set_start_tag(ticket)
        self._record_start(ticket)
        return True

    async def wait_for_turn(self, ticket: Ticket, stop_waiting: asyncio.Event | None = None) -> None:
        """Wait for the turn of a request, or until `stop_waiting` is set, after which the request ends without a turn.

        Raises:
            DeadlineTooShortError: the request can no longer finish before its deadline. Its turn goes to the next one.
        """
        loop = asyncio.get_running_loop()
        begin, ticket.turn = loop.time(), loop.create_future()
        self._set_start_tag(ticket)
        self._arrivals += 1
        heapq.heappush(self._waiting, (ticket.start_tag, self._arrivals, ticket))
        self._start_waiting_requests()
        stop = asyncio.ensure_future(stop_waiting.wait()) if stop_waiting else None
        try:
            awaited: list[asyncio.Future[Any]] = [ticket.turn, stop] if stop else [ticket.turn]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ticket.waited = loop.time() - begin
            ticket.turn.cancel()
            if stop:
                stop.cancel()
        self._check_deadline(ticket)

    def _set_start_tag(self, ticket: Ticket) -> None:
        """Set the position of a request in the order."""
        ticket.start_tag = max(self._virtual_time, self._next_tags.get(ticket.caller, 0.0))
        self._next_tags[ticket.caller] = ticket.start_tag + ticket.engine_cost.tokens

    def _reserve_engine(self, ticket: Ticket) -> bool:
        """Reserve the request's part of the engine; return False if the engine is full."""
        if self._limit is None:
            return True
        ticket.has_engine = self._budget.reserve_engine(ticket.engine_cost, self._limit)
        return ticket.has_engine

    def _record_start(self, ticket: Ticket) -> None:
        ticket.started = asyncio.get_running_loop().time()
        self._virtual_time = max(self._virtual_time, ticket.start_tag)
        if len(self._next_tags) > 2 * len(self._waiting) + MIN_SEQUENCES:  # forget callers whose next tag has passed
            self._next_tags = {caller: tag for caller, tag in self._next_tags.items() if tag > self._virtual_time}

    def _start_waiting_requests(self) -> None:
        """Give turns to requests in order, as long as the engine has capacity."""
        while self._waiting:
            ticket = self._waiting[0][2]
            assert ticket.turn is not None
            if not ticket.turn.done():
                if not self._reserve_engine(ticket):
                    self._poll_later()
                    return
                self._record_start(ticket)
                ticket.turn.set_result(None)
            heapq.heappop(self._waiting)

    def _poll_later(self) -> None:
        """Try again later, if requests of other processes may end meanwhile."""
        if self._budget.poll_seconds is not None:
            if self._poll:
                self._poll.cancel()
            self._poll = asyncio.get_running_loop().call_later(self._budget.poll_seconds, self._start_waiting_requests)

    def _check_deadline(self, ticket: Ticket) -> None:
        if ticket.deadline is None:
            return
        seconds = self.pace.min_seconds(ticket.min_tokens)
        remaining = ticket.deadline - asyncio.get_running_loop().time()
        if seconds > remaining:
            if remaining > 0:
                self.pace.relax()
            raise DeadlineTooShortError(
                f"the request cannot finish before its deadline: {ticket.min_tokens} tokens take at least "
                f"{seconds:.3g} s, and {max(0, remaining):.3g} s are left"
            )
