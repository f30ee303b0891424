"""Beam search over any engine: at each step, every beam asks the engine for its most likely next tokens."""

import asyncio
import heapq
import math
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from uuid import uuid4

from yuan_grpc.server.core.backoff import Backoff
from yuan_grpc.server.core.limits import BeamLimits
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import (
    CONTEXT_TOKENS,
    BeamSearchParams,
    ChoiceDelta,
    EngineRequest,
    FinishReason,
    Progress,
    RankedToken,
    Sampling,
    StepOutput,
    TokenLogprobs,
)
from yuan_grpc.server.errors import OverloadedError

PROGRESS_TOKENS = 64
"""Number of last tokens of the best beam whose text is reported as progress."""

TopTokens = Sequence[RankedToken]
"""The most likely next tokens of one beam, in order."""


@dataclass(frozen=True)
class _Hypothesis:
    """Tokens after the prompt: a running beam without a finish reason, a finished choice with one."""

    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class _Candidate:
    """A beam and a possible next token. Cheap to create, because most candidates are dropped."""

    beam: _Hypothesis
    token: RankedToken
    top: TopTokens
    cumulative_logprob: float


@dataclass(frozen=True)
class _Frontier:
    """State of a search: running beams of `tokens` tokens, most likely first, and finished hypotheses by score."""

    tokens: int = 0
    running: Sequence[_Hypothesis] = (_Hypothesis(),)
    finished: Sequence[_Hypothesis] = ()


class BeamSearch:
    """A search for the most likely continuations of a prompt, as in vLLM 0.2, which the original Yuan server forked.

    Finished hypotheses are ranked by cumulative log-probability / length ** `length_penalty`. The length counts prompt
    and generated tokens without an end-of-text token, as in vLLM 0.2 and 0.32. transformers does not count the prompt,
    so its penalty is stronger after a long prompt.

    Args:
        engine: computes the log-probabilities of the next tokens, in requests of one token per beam and step.
        request: the request to continue. Only its parameters for length, stops and returned fields apply.
        beam: the parameters of the search; `n` is at most `width`.
        limits: the limits that all searches share; None if this is the only one.
        stream: whether to report progress, which requires decoding a text per token.
        deadline: see `Engine.generate`; the choices are then the best hypotheses so far, finished or not.
    """

    def __init__(
        self,
        engine: Engine,
        request: EngineRequest,
        beam: BeamSearchParams,
        limits: BeamLimits | None = None,
        *,
        stream: bool = True,
        deadline: asyncio.Event | None = None,
    ) -> None:
        info, sampling = engine.info, request.sampling
        self._engine = engine
        self._request = request
        self._beam = beam
        self._limits = limits or BeamLimits()
        self._stream = stream
        self._deadline = deadline
        self._end_of_text_ids = frozenset(info.end_token_ids)
        self._suppressed_ids = self._end_of_text_ids.union(sampling.stop_token_ids)
        self._finishing_ids = frozenset(sampling.stop_token_ids) if sampling.ignore_eos else self._suppressed_ids
        # Enough that `width` tokens remain to continue with, even if all tokens that end a choice are among them.
        needed = beam.width + max(beam.width, len(self._suppressed_ids))
        self._logprobs = min(max(needed, sampling.logprobs or 0), info.vocab_size)
        self._max_tokens = min(sampling.max_tokens, info.max_model_len - len(request.prompt))
        self._without_stops = replace(request, sampling=replace(sampling, stop=()))
        # A character has at most four tokens. The window fits two more than a stop string: it may cut one at each end.
        self._stop_window = 4 * max(map(len, sampling.stop), default=0) + 8
        self._frontier = _Frontier()
        self._cached_tokens = 0

    async def run(self) -> AsyncGenerator[StepOutput, None]:
        """Yield an empty output on acceptance, progress after each token, then the `n` best choices, best first.

        There are fewer choices only if fewer different continuations exist.

        Raises:
            ServiceError: an error of `Engine.generate`. OverloadedError is raised for the first token only. Later, a
                rejected beam is retried so that the tokens so far are not lost.
        """
        async with AsyncExitStack() as stack:
            await self._wait_for_permits(stack)
            if self._request.lora:  # keep the adapter loaded between requests
                lora = await stack.enter_async_context(self._engine.pin_lora(self._request.lora))
                self._request = replace(self._request, lora=lora)
            first = StepOutput()
            async with aclosing(self._generate_next(_Hypothesis())) as outputs:
                async for output in outputs:
                    if output.deltas:
                        first = output
                    else:
                        yield output
            self._cached_tokens = first.cached_tokens
            if (top := _top_tokens(first)) is not None:
                yield replace(
                    await self._advance([top], first.prompt_logprobs),
                    queue_seconds=first.queue_seconds,
                    prefill_seconds=first.prefill_seconds,
                    first_token_seconds=first.first_token_seconds,
                )
            while self._can_improve() and not self._is_past_deadline:
                if tops := await self._top_tokens_per_beam():
                    yield await self._advance(tops)
            yield await asyncio.to_thread(self._best_choices, self._final_hypotheses())

    @property
    def _is_past_deadline(self) -> bool:
        return self._deadline is not None and self._deadline.is_set()

    def _final_hypotheses(self) -> Sequence[_Hypothesis]:
        """Return the finished hypotheses; after the deadline also the running ones, at least `n` in total."""
        finished, running = self._frontier.finished, self._frontier.running
        if not self._can_improve():
            return finished
        empty = _Hypothesis(finish_reason=FinishReason.DEADLINE)
        unfinished = [replace(beam, finish_reason=FinishReason.DEADLINE) for beam in running]
        return [*finished, *unfinished, *[empty] * (self._beam.n - len(finished) - len(unfinished))]

    async def _top_tokens_per_beam(self) -> list[TopTokens]:
        """Return the next tokens of each running beam; an empty list if the deadline comes first."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._top_tokens_after(beam)) for beam in self._frontier.running]
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
            raise error from error.__cause__
        tops = [top for task in tasks if (top := task.result()) is not None]
        return tops if len(tops) == len(tasks) else []

    async def _wait_for_permits(self, stack: AsyncExitStack) -> None:
        """Wait for the permits of all beams, or for the deadline."""
        waiting = asyncio.ensure_future(self._limits.beams.acquire(self._beam.width))
        deadline = asyncio.ensure_future(self._deadline.wait() if self._deadline else asyncio.Event().wait())
        try:
            await asyncio.wait([waiting, deadline], return_when=asyncio.FIRST_COMPLETED)
        finally:
            deadline.cancel()
            if waiting.done():
                stack.callback(self._limits.beams.release, waiting.result())
            else:
                waiting.cancel()

    async def _top_tokens_after(self, beam: _Hypothesis) -> TopTokens | None:
        backoff = Backoff()
        while not self._is_past_deadline:
            try:
                return await self._next_top_tokens(beam)
            except OverloadedError:
                await backoff.wait()
        return None

    async def _next_top_tokens(self, beam: _Hypothesis) -> TopTokens | None:
        async with self._limits.requests.hold(), aclosing(self._generate_next(beam)) as outputs:
            tops = [_top_tokens(output) async for output in outputs if output.deltas]
            return tops[0]

    def _generate_next(self, beam: _Hypothesis) -> AsyncGenerator[StepOutput, None]:
        return self._engine.generate(self._beam_request(beam), stream=False, deadline=self._deadline)

    def _beam_request(self, beam: _Hypothesis) -> EngineRequest:
        """Return the request for a beam's next token. The first one fills the prefix cache for all others."""
        sampling = Sampling(max_tokens=1, temperature=0, logprobs=self._logprobs, ignore_eos=True)
        if not beam.token_ids:
            requested = self._request.sampling
            sampling = replace(
                sampling,
                prompt_logprobs=requested.prompt_logprobs,
                skip_reading_prefix_cache=requested.skip_reading_prefix_cache,
            )
        return replace(
            self._request,
            request_id=f"{self._request.request_id}-{uuid4().hex}",
            prompt=[*self._request.prompt, *beam.token_ids],
            sampling=sampling,
        )

    async def _advance(self, tops: Sequence[TopTokens], prompt_logprobs: Sequence[TokenLogprobs] = ()) -> StepOutput:
        """Extend the beams by one token, in a thread: the long texts of a wide beam would block every stream."""
        self._frontier = await asyncio.to_thread(self._next_frontier, tops)
        progress = await asyncio.to_thread(self._progress) if self._stream else None
        return StepOutput(cached_tokens=self._cached_tokens, prompt_logprobs=prompt_logprobs, progress=progress)

    def _next_frontier(self, tops: Sequence[TopTokens]) -> _Frontier:
        """Return the next beams. As in transformers, drop finished candidates that are not among the best `width`."""
        width, running, finished = self._beam.width, list[_Hypothesis](), list(self._frontier.finished)
        tokens = self._frontier.tokens + 1
        is_last = tokens == self._max_tokens
        for index, candidate in enumerate(self._candidates(tops)):
            if len(running) == width or (is_last and index == width):
                break
            hypothesis = self._extend(candidate, is_last)
            if hypothesis.finish_reason is None:
                running.append(hypothesis)
            elif index < width:
                finished.append(hypothesis)
        if not running and not finished:
            raise RuntimeError("the model gives no token a probability")
        return _Frontier(tokens, running, self._ranked(finished)[:width])

    def _candidates(self, tops: Sequence[TopTokens]) -> Iterator[_Candidate]:
        """Yield the candidates, most likely first. Lazy: few of a wide search's tens of thousands are needed."""
        candidates = map(self._candidates_after, self._frontier.running, tops)
        return heapq.merge(*candidates, key=lambda candidate: candidate.cumulative_logprob, reverse=True)

    def _candidates_after(self, beam: _Hypothesis, top: TopTokens) -> Iterator[_Candidate]:
        for token in top:
            if token.logprob > -math.inf and not self._is_suppressed(token.token_id, len(beam.token_ids)):
                yield _Candidate(beam, token, top, beam.cumulative_logprob + token.logprob)

    def _is_suppressed(self, token_id: int, position: int) -> bool:
        """Whether a token is excluded by `min_tokens`. vLLM excludes end-of-text even with `ignore_eos`."""
        return position < self._request.sampling.min_tokens and token_id in self._suppressed_ids

    def _extend(self, candidate: _Candidate, is_last: bool) -> _Hypothesis:
        """Return the beam with its next token, finished if it ends. A stop string takes precedence, as in vLLM."""
        sampling, beam, token = self._request.sampling, candidate.beam, candidate.token
        token_ids, finish_reason = (*beam.token_ids, token.token_id), None
        stop_reason: str | int | None = None
        if sampling.stop and len(token_ids) > sampling.min_tokens:
            stop_reason = self._completed_stop_string(token_ids)
        if stop_reason is None and token.token_id in self._finishing_ids:
            stop_reason = token.token_id
        if stop_reason is not None:
            finish_reason = FinishReason.STOP
        elif is_last:
            finish_reason = FinishReason.LENGTH
        logprobs = beam.logprobs
        if sampling.logprobs is not None:
            logprobs = (*logprobs, TokenLogprobs(token, candidate.top[: sampling.logprobs]))
        return _Hypothesis(token_ids, candidate.cumulative_logprob, logprobs, finish_reason, stop_reason)

    def _completed_stop_string(self, token_ids: tuple[int, ...]) -> str | None:
        """Return the stop string that the last token completes; if several, the one that ends first."""
        *recent, last = token_ids[-self._stop_window :]
        context = token_ids[: -len(recent) - 1]
        before, after = self._text_after(context, recent), self._text_after(context, [*recent, last])
        ends = []
        for stop in self._request.sampling.stop:
            start = after.find(stop, max(0, len(before) - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), stop))
        return min(ends, key=lambda end: end[0])[1] if ends else None

    def _text_after(self, context: Sequence[int], token_ids: Sequence[int]) -> str:
        prompt = [*self._request.prompt[-CONTEXT_TOKENS:], *context][-CONTEXT_TOKENS:]
        return self._text(replace(self._without_stops, prompt=prompt), token_ids)

    def _can_improve(self) -> bool:
        """Return whether a running beam can still become one of the best."""
        running, finished = self._frontier.running, self._frontier.finished
        if not running or len(finished) < self._beam.width:
            return bool(running)
        if self._beam.early_stopping is True:
            return False
        tokens = self._frontier.tokens
        if self._beam.early_stopping == "never" and self._beam.length_penalty > 0:
            tokens = self._max_tokens  # the score bound is highest at the maximum length
        return self._normalize(running[0].cumulative_logprob, tokens) > self._score(finished[-1])

    def _score(self, hypothesis: _Hypothesis) -> float:
        if not hypothesis.token_ids:  # empty choices rank last
            return -math.inf
        ends_text = hypothesis.stop_reason in self._end_of_text_ids
        return self._normalize(hypothesis.cumulative_logprob, len(hypothesis.token_ids) - ends_text)

    def _normalize(self, cumulative_logprob: float, tokens: int) -> float:
        return cumulative_logprob / math.pow(len(self._request.prompt) + tokens, self._beam.length_penalty)

    def _ranked(self, hypotheses: Iterable[_Hypothesis]) -> list[_Hypothesis]:
        return sorted(hypotheses, key=self._score, reverse=True)

    def _progress(self) -> Progress:
        running, finished = self._frontier.running, self._frontier.finished
        best = (running or finished)[0]
        recent, context = best.token_ids[-PROGRESS_TOKENS:], best.token_ids[:-PROGRESS_TOKENS]
        text = self._text_after(context, recent)
        return Progress(self._frontier.tokens, len(finished), text, best.cumulative_logprob)

    def _best_choices(self, hypotheses: Iterable[_Hypothesis]) -> StepOutput:
        ranked, n = self._ranked(hypotheses), self._beam.n
        return StepOutput(
            [self._delta(index, hypothesis) for index, hypothesis in enumerate(ranked[:n])],
            cached_tokens=self._cached_tokens,
            discarded_tokens=sum(len(hypothesis.token_ids) for hypothesis in ranked[n:]),
        )

    def _delta(self, index: int, hypothesis: _Hypothesis) -> ChoiceDelta:
        return ChoiceDelta(
            index=index,
            text=self._text(self._request, hypothesis.token_ids),
            token_ids=hypothesis.token_ids,
            logprobs=hypothesis.logprobs,
            cumulative_logprob=hypothesis.cumulative_logprob,
            finish_reason=hypothesis.finish_reason,
            stop_reason=hypothesis.stop_reason,
        )

    def _text(self, request: EngineRequest, token_ids: Sequence[int]) -> str:
        ended = bool(token_ids) and token_ids[-1] in self._finishing_ids
        text, _ = self._engine.decode_continuation(request, token_ids, ended=ended)
        return text


def _top_tokens(output: StepOutput) -> TopTokens | None:
    """Return the most likely next tokens; None if the deadline ended the request before it had any."""
    delta = output.deltas[0]
    return None if delta.finish_reason is FinishReason.DEADLINE else delta.logprobs[0].top
