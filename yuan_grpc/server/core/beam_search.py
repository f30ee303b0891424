"""Beam search over any engine, which each step asks for the most likely next tokens of every beam."""

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from uuid import uuid4

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

RETRY_SECONDS = 0.05
"""So long a beam waits that a full engine has refused: the other beams and callers make room."""

PROGRESS_TOKENS = 64
"""Of the best beam, whose text is told as it is now."""

Top = Sequence[RankedToken]


@dataclass(frozen=True)
class _Hypothesis:
    """What follows the prompt: a beam while it has no finish reason, a choice once it has one."""

    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class _Candidate:
    """A beam and a token that may follow it; cheap, for most come to nothing."""

    beam: _Hypothesis
    token: RankedToken
    top: Top
    cumulative_logprob: float


@dataclass(frozen=True)
class _Frontier:
    """Where a search is: beams of so many tokens, the most likely first; and what is finished, by score."""

    tokens: int = 0
    running: Sequence[_Hypothesis] = (_Hypothesis(),)
    finished: Sequence[_Hypothesis] = ()


class BeamSearch:
    """Searches for the most likely continuations of a prompt, as vLLM 0.2 did, of which Yuan's engine was a fork.

    What is finished is ranked by its cumulative log-probability / length ** `length_penalty`. The length is that of
    prompt and generated tokens together, less an end-of-text token: so it was in the fork, and vLLM counts the prompt
    to this day. transformers does not, so that behind a long prompt its penalty is the stronger one.

    Args:
        engine: what gives the next tokens' log-probabilities: of one token for each beam and step.
        job: what to continue. Of its sampling parameters those count that say how long and up to what to generate, and
            what to return.
        beam: the search's own parameters; `n` is at most `width`.
        stream: whether progress is told, which takes a text for each token.
        cut: see `Engine.generate`; then the choices are the best of what there is, finished or not.
    """

    def __init__(
        self,
        engine: Engine,
        request: EngineRequest,
        beam: BeamSearchParams,
        *,
        stream: bool = True,
        deadline: asyncio.Event | None = None,
    ) -> None:
        info, sampling = engine.info, request.sampling
        self._engine = engine
        self._request = request
        self._beam = beam
        self._stream = stream
        self._deadline = deadline
        self._end_of_text = frozenset(info.end_token_ids)
        self._held_back = self._end_of_text.union(sampling.stop_token_ids)
        self._ends = frozenset(sampling.stop_token_ids) if sampling.ignore_eos else self._held_back
        # Whether the tokens that end are held back or taken, `width` others are left to go on with.
        needed = beam.width + max(beam.width, len(self._held_back))
        self._logprobs = min(max(needed, sampling.logprobs or 0), info.vocab_size)
        self._max_tokens = min(sampling.max_tokens, info.max_model_len - len(request.prompt))
        self._plain = replace(request, sampling=replace(sampling, stop=()))
        # A character is four tokens at most, and a byte that is no character's is held back for as long.
        self._tail = 4 * max(map(len, sampling.stop), default=0) + 8
        self._frontier = _Frontier()
        self._cached_tokens = 0

    async def run(self) -> AsyncGenerator[StepOutput, None]:
        """Acceptance; progress after each token; and the `n` best choices, best first.

        There are fewer only if there are not so many different continuations at all.

        Raises:
            ServiceError: what `Engine.generate` raises. A refusal for lack of room is final for the first token alone:
                later the refused beam tries again, for the work that is done would be lost.
        """
        async with AsyncExitStack() as held:
            if self._request.lora:  # whose children come and go
                lora = await held.enter_async_context(self._engine.pin_lora(self._request.lora))
                self._request = replace(self._request, lora=lora)
            first = StepOutput()
            async with aclosing(self._next_tokens(_Hypothesis())) as outputs:
                async for output in outputs:
                    if output.deltas:
                        first = output
                    else:
                        yield output
            self._cached_tokens = first.cached_tokens
            if (top := _top_of(first)) is not None:
                yield await self._advance([top], first.prompt_logprobs)
            while self._goes_on() and not self._past_deadline:
                if tops := await self._tops():
                    yield await self._advance(tops)
            yield await asyncio.to_thread(self._best, self._ends_of_search())

    @property
    def _past_deadline(self) -> bool:
        return self._deadline is not None and self._deadline.is_set()

    def _ends_of_search(self) -> Sequence[_Hypothesis]:
        """What is finished; and where the search was cut short all that is not, at least `n` in all."""
        finished, running = self._frontier.finished, self._frontier.running
        if not self._goes_on():
            return finished
        empty = _Hypothesis(finish_reason=FinishReason.DEADLINE)
        unfinished = [replace(beam, finish_reason=FinishReason.DEADLINE) for beam in running]
        return [*finished, *unfinished, *[empty] * (self._beam.n - len(finished) - len(unfinished))]

    async def _tops(self) -> list[Top]:
        """Of each running beam; nothing at all where the search was cut short first."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._top_behind(beam)) for beam in self._frontier.running]
        except ExceptionGroup as errors:
            error = errors.exceptions[0]
            raise error from error.__cause__
        tops = [top for task in tasks if (top := task.result()) is not None]
        return tops if len(tops) == len(tasks) else []

    async def _top_behind(self, beam: _Hypothesis) -> Top | None:
        while not self._past_deadline:
            try:
                async with aclosing(self._next_tokens(beam)) as outputs:
                    tops = [_top_of(output) async for output in outputs if output.deltas]
                    return tops[0]
            except OverloadedError:
                await asyncio.sleep(RETRY_SECONDS)
        return None

    def _next_tokens(self, beam: _Hypothesis) -> AsyncGenerator[StepOutput, None]:
        return self._engine.generate(self._child(beam), stream=False, deadline=self._deadline)

    def _child(self, beam: _Hypothesis) -> EngineRequest:
        """The first one gets ready what the others find in the prefix cache, and alone sees to the prompt."""
        sampling = Sampling(max_tokens=1, temperature=0, logprobs=self._logprobs, ignore_eos=True)
        if not beam.token_ids:
            asked = self._request.sampling
            sampling = replace(
                sampling,
                prompt_logprobs=asked.prompt_logprobs,
                skip_reading_prefix_cache=asked.skip_reading_prefix_cache,
            )
        return replace(
            self._request,
            request_id=f"{self._request.request_id}-{uuid4().hex}",
            prompt=[*self._request.prompt, *beam.token_ids],
            sampling=sampling,
        )

    async def _advance(self, tops: Sequence[Top], prompt_logprobs: Sequence[TokenLogprobs] = ()) -> StepOutput:
        """One token further. In a thread, for a wide beam's long texts would hold up every stream."""
        self._frontier = await asyncio.to_thread(self._next, tops)
        progress = await asyncio.to_thread(self._progress) if self._stream else None
        return StepOutput(cached_tokens=self._cached_tokens, prompt_logprobs=prompt_logprobs, progress=progress)

    def _next(self, tops: Sequence[Top]) -> _Frontier:
        """The next beams. As in transformers, only the `width` best candidates may end; others that do are dropped."""
        width, running, finished = self._beam.width, list[_Hypothesis](), list(self._frontier.finished)
        candidates = self._candidates(tops)
        tokens = self._frontier.tokens + 1
        is_last = tokens == self._max_tokens
        for place, candidate in enumerate(candidates):
            if len(running) == width or (is_last and place == width):
                break
            hypothesis = self._extended(candidate, is_last)
            if hypothesis.finish_reason is None:
                running.append(hypothesis)
            elif place < width:
                finished.append(hypothesis)
        if not running and not finished:
            raise RuntimeError("the model gives no token a probability")
        return _Frontier(tokens, running, self._ranked(finished)[:width])

    def _candidates(self, tops: Sequence[Top]) -> list[_Candidate]:
        candidates = [
            _Candidate(beam, token, top, beam.cumulative_logprob + token.logprob)
            for beam, top in zip(self._frontier.running, tops, strict=True)
            for token in top
            if token.logprob > -math.inf and not self._is_held_back(token.token_id, len(beam.token_ids))
        ]
        return sorted(candidates, key=lambda candidate: candidate.cumulative_logprob, reverse=True)

    def _is_held_back(self, token_id: int, before: int) -> bool:
        """vLLM holds the end-of-text token back until `min_tokens` even where it would not end anything."""
        return before < self._request.sampling.min_tokens and token_id in self._held_back

    def _extended(self, candidate: _Candidate, is_last: bool) -> _Hypothesis:
        """With a finish reason where it ends. A stop string comes before all else, as it does in vLLM."""
        sampling, beam, token = self._request.sampling, candidate.beam, candidate.token
        token_ids, reason = (*beam.token_ids, token.token_id), None
        stop_reason: str | int | None = None
        if sampling.stop and len(token_ids) > sampling.min_tokens:
            stop_reason = self._stop_string(token_ids)
        if stop_reason is None and token.token_id in self._ends:
            stop_reason = token.token_id
        if stop_reason is not None:
            reason = FinishReason.STOP
        elif is_last:
            reason = FinishReason.LENGTH
        logprobs = beam.logprobs
        if sampling.logprobs is not None:
            logprobs = (*logprobs, TokenLogprobs(token, candidate.top[: sampling.logprobs]))
        return _Hypothesis(token_ids, candidate.cumulative_logprob, logprobs, reason, stop_reason)

    def _stop_string(self, token_ids: tuple[int, ...]) -> str | None:
        """The stop string that the last token completes, the one that ends first. Looks at no more than it must."""
        *before, last = token_ids[-self._tail :]
        context = token_ids[: -len(before) - 1]
        shorter, longer = self._text_behind(context, before), self._text_behind(context, [*before, last])
        found = []
        for stop in self._request.sampling.stop:
            at = longer.find(stop, max(0, len(shorter) - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), stop))
        return min(found, key=lambda one: one[0])[1] if found else None

    def _text_behind(self, context: Sequence[int], token_ids: Sequence[int]) -> str:
        request = replace(self._plain, prompt=[*self._request.prompt[-CONTEXT_TOKENS:], *context][-CONTEXT_TOKENS:])
        return self._text(request, token_ids)

    def _goes_on(self) -> bool:
        """Whether a beam may yet become one of the best."""
        running, finished = self._frontier.running, self._frontier.finished
        if not running or len(finished) < self._beam.width:
            return bool(running)
        if self._beam.early_stopping is True:
            return False
        tokens = self._frontier.tokens
        if self._beam.early_stopping == "never" and self._beam.length_penalty > 0:  # which favours the longest
            tokens = self._max_tokens
        return self._normalized(running[0].cumulative_logprob, tokens) > self._score(finished[-1])

    def _score(self, hypothesis: _Hypothesis) -> float:
        if not hypothesis.token_ids:  # nothing is no good
            return -math.inf
        at_end_of_text = hypothesis.stop_reason in self._end_of_text
        return self._normalized(hypothesis.cumulative_logprob, len(hypothesis.token_ids) - at_end_of_text)

    def _normalized(self, cumulative_logprob: float, tokens: int) -> float:
        return cumulative_logprob / math.pow(len(self._request.prompt) + tokens, self._beam.length_penalty)

    def _ranked(self, hypotheses: Iterable[_Hypothesis]) -> list[_Hypothesis]:
        return sorted(hypotheses, key=self._score, reverse=True)

    def _progress(self) -> Progress:
        running, finished = self._frontier.running, self._frontier.finished
        best = (running or finished)[0]
        recent, earlier = best.token_ids[-PROGRESS_TOKENS:], best.token_ids[:-PROGRESS_TOKENS]
        text = self._text_behind(earlier, recent)
        return Progress(self._frontier.tokens, len(finished), text, best.cumulative_logprob)

    def _best(self, hypotheses: Iterable[_Hypothesis]) -> StepOutput:
        ranked, n = self._ranked(hypotheses), self._beam.n
        return StepOutput(
            [self._piece(index, hypothesis) for index, hypothesis in enumerate(ranked[:n])],
            cached_tokens=self._cached_tokens,
            discarded_tokens=sum(len(hypothesis.token_ids) for hypothesis in ranked[n:]),
        )

    def _piece(self, index: int, hypothesis: _Hypothesis) -> ChoiceDelta:
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
        ended = bool(token_ids) and token_ids[-1] in self._ends
        text, _ = self._engine.decode_continuation(request, token_ids, ended=ended)
        return text


def _top_of(output: StepOutput) -> Top | None:
    """The most likely next tokens; None where the job was cut short before it had any."""
    delta = output.deltas[0]
    return None if delta.finish_reason is FinishReason.DEADLINE else delta.logprobs[0].top
