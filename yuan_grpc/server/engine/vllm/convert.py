"""Conversion between the service's plain values and vLLM's."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.metrics.stats import RequestStateStats

from yuan_grpc.server.engine.types import (
    CONTEXT_TOKENS,
    ChoiceDelta,
    Constraint,
    EngineRequest,
    FinishReason,
    RankedToken,
    Sampling,
    StepOutput,
    TokenLogprobs,
)
from yuan_grpc.server.errors import InvalidRequestError, NotEnabledError, ServiceError, UnavailableError, Violation

MIN_TEMPERATURE = 0.01
"""Lowest temperature of sampling. vLLM raises lower ones to it, and logs a line each time."""
MAX_BAD_WORD_TOKENS = 1024
"""Capacity in vLLM's V2 model runner. With more tokens its worker would die."""

UNSUPPORTED_WITH_DRAFTS = ("min_p", "logit_bias", "logprob_token_ids")
"""Parameters that vLLM does not apply to draft tokens.

vLLM rejects the first two. With the third, the engine dies if a request of the same step has `logprobs`; otherwise no
log-probabilities are returned.
"""

SOURCE_LINE = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""Prefix of xgrammar's messages, with its own file and line."""

_FINISH_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "repetition": FinishReason.REPETITION,
}


def to_sampling_params(sampling: Sampling, stream: bool) -> SamplingParams:
    """Return vLLM's sampling parameters, without bad words. Greedy sampling is temperature 0 in vLLM."""
    fields = vars(sampling) | {
        "temperature": max(sampling.temperature, MIN_TEMPERATURE),
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "bad_words": [],  # set by `set_bad_words`
        "logit_bias": dict(sampling.logit_bias) or None,
        "allowed_token_ids": list(sampling.allowed_token_ids) or None,
        "logprob_token_ids": list(sampling.logprob_token_ids) or None,
        "structured_outputs": sampling.structured_outputs and _constraint(sampling.structured_outputs),
    }
    if sampling.repetition_detection:
        fields["repetition_detection"] = RepetitionDetectionParams(**vars(sampling.repetition_detection))
    if sampling.is_greedy:
        fields |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if sampling.prompt_logprobs is not None:  # for cached tokens vLLM returns uninitialized memory
        fields["skip_reading_prefix_cache"] = True
    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**fields, output_kind=kind, flat_logprobs=True)


def _constraint(constraint: Constraint) -> StructuredOutputsParams:
    specification = constraint.specification
    return StructuredOutputsParams(
        **{constraint.kind: list(specification) if isinstance(specification, tuple) else specification}
    )


def check_drafts(params: SamplingParams) -> None:
    """Raise NotEnabledError if a request for an engine that drafts has a parameter in `UNSUPPORTED_WITH_DRAFTS`."""
    for field in UNSUPPORTED_WITH_DRAFTS:
        if getattr(params, field):
            raise NotEnabledError(f"`{field}` needs a server that was started without --speculative-config")


def set_bad_words(sampling: Sampling, params: SamplingParams, tokenizer: TokenizerLike) -> None:
    """Set the token sequences of the bad words, as written at the beginning of a text and within one.

    Replaces vLLM's encoding of a word with and without a space before it: Yuan's tokenizer adds a space in both cases.

    Raises:
        InvalidRequestError: the words have too many tokens, or exclude every allowed token.
    """
    sequences = [ids for word in sampling.bad_words for ids in tokenizer.encode_word(word.strip()) if ids]
    if (tokens := sum(map(len, sequences))) > MAX_BAD_WORD_TOKENS:
        description = f"`bad_words` must have at most {MAX_BAD_WORD_TOKENS} tokens in total, not {tokens}"
        raise InvalidRequestError([Violation("bad_words", description)])
    params._bad_words_token_ids = sequences or None
    excluded = {ids[0] for ids in sequences if len(ids) == 1}
    if sampling.min_tokens:
        excluded.update(sampling.stop_token_ids, [tokenizer.eos_token_id])
    if sampling.allowed_token_ids and excluded.issuperset(sampling.allowed_token_ids):
        description = "`bad_words` and `min_tokens` must not exclude every token in `allowed_token_ids`"
        raise InvalidRequestError([Violation("allowed_token_ids", description)])


def decode_continuation(
    request: EngineRequest, token_ids: Sequence[int], ended: bool, tokenizer: TokenizerLike
) -> tuple[str, str | None]:
    """Decode with vLLM's own detokenizer, so that the text equals a sampled one; see `Engine.decode_continuation`."""
    core_request = EngineCoreRequest(
        request_id=request.request_id,
        prompt_token_ids=list(request.prompt[-CONTEXT_TOKENS:]),
        mm_features=None,
        sampling_params=to_sampling_params(request.sampling, stream=False),
        pooling_params=None,
        arrival_time=0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer, stop = IncrementalDetokenizer.from_new_request(tokenizer, core_request), None
    for index, token_id in enumerate(token_ids):
        stop = detokenizer.update([token_id], ended and index == len(token_ids) - 1)
        if stop:
            break
    return detokenizer.get_next_output_text(finished=True, delta=False), stop


def to_invalid_request_error(error: Exception, request: EngineRequest) -> InvalidRequestError:
    """Return the error for a request that vLLM rejects, usually for a constraint, which only vLLM can parse."""
    constraint = request.sampling.structured_outputs
    field = getattr(error, "parameter", None)
    if field is None and constraint is not None:
        field = f"structured_outputs.{constraint.kind}"
    reason = SOURCE_LINE.sub("", str(error.args[0] if error.args else error)).partition("\n")[0]
    description = f"`{field or 'request'}` must be one that vLLM accepts: {reason}"
    return InvalidRequestError([Violation(field or "", description)])


def num_logprobs(output: RequestOutput) -> int:
    """Return the number of log-probabilities in an output."""
    count = len(output.prompt_logprobs.token_ids) if output.prompt_logprobs else 0
    for completion in output.outputs:
        if completion.logprobs:
            count += len(completion.logprobs.token_ids)
    return count


class OutputConverter:
    """Converts vLLM's outputs for one request.

    Args:
        request: the request.
        tokenizer: the model's tokenizer.
        deadline: set if the deadline aborts the request; vLLM then reports the finish reason "abort".
    """

    def __init__(self, request: EngineRequest, tokenizer: TokenizerLike, deadline: asyncio.Event | None) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._deadline = deadline
        self._allowed = frozenset(request.sampling.allowed_token_ids)
        self._needs_prompt_logprobs = request.sampling.prompt_logprobs is not None
        self._needs_times = True

    def step(self, output: RequestOutput) -> StepOutput:
        """Return an output in plain values. The first one has the prompt's log-probabilities.

        Raises:
            InvalidRequestError: no allowed token was left, or the constraint could not be satisfied.
            UnavailableError: the engine dropped the request.
        """
        prompt_logprobs: list[TokenLogprobs] = []
        if self._needs_prompt_logprobs and output.prompt_logprobs:
            self._needs_prompt_logprobs = False
            prompt_logprobs = self._prompt_logprobs(output.prompt_logprobs)
        step = StepOutput(
            [self._delta(completion) for completion in output.outputs],
            cached_tokens=output.num_cached_tokens or 0,
            prompt_logprobs=prompt_logprobs,
        )
        if self._needs_times and step.deltas and output.metrics:  # no metrics with --disable-log-stats
            self._needs_times = False
            return _with_times(step, output.metrics)
        return step

    def _delta(self, completion: CompletionOutput) -> ChoiceDelta:
        finish_reason = self._finish_reason(completion.finish_reason) if completion.finish_reason else None
        if self._allowed and not self._allowed.issuperset(completion.token_ids):  # vLLM samples any if none is left
            description = "other parameters exclude every token in `allowed_token_ids` at some position"
            raise InvalidRequestError([Violation("allowed_token_ids", description)])
        stop_reason = completion.stop_reason if finish_reason is FinishReason.STOP else None
        if finish_reason is FinishReason.STOP and stop_reason is None:  # vLLM's value for the end-of-text token
            stop_reason = self._tokenizer.eos_token_id
        return ChoiceDelta(
            index=completion.index,
            text=completion.text,
            token_ids=completion.token_ids,
            logprobs=self._logprobs(completion.logprobs) if completion.logprobs else (),
            cumulative_logprob=completion.cumulative_logprob,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _logprobs(self, logprobs: FlatLogprobs) -> list[TokenLogprobs]:
        sampling = self._request.sampling
        return list(_token_logprobs(logprobs, sampling.logprobs or 0, sampling.logprob_token_ids))

    def _finish_reason(self, reason: str) -> FinishReason:
        if reason == "abort" and self._deadline and self._deadline.is_set():
            return FinishReason.DEADLINE
        if reason not in _FINISH_REASONS:
            raise self._dropped_error(reason)
        return _FINISH_REASONS[reason]

    def _dropped_error(self, reason: str | None) -> ServiceError:
        constraint = self._request.sampling.structured_outputs
        if constraint and reason == "error":
            field = f"structured_outputs.{constraint.kind}"
            description = f"`{field}` must be one that the engine can compile and satisfy with the other parameters"
            return InvalidRequestError([Violation(field, description)])
        return UnavailableError("the engine dropped the request")

    def _prompt_logprobs(self, logprobs: FlatLogprobs) -> list[TokenLogprobs]:
        first = self._request.prompt[0]
        text = self._tokenizer.convert_tokens_to_string(self._tokenizer.convert_ids_to_tokens([first]))
        others = _token_logprobs(logprobs[1:], self._request.sampling.prompt_logprobs or 0, ())
        return [TokenLogprobs(RankedToken(first, text, 0.0, 0), ()), *others]


def _with_times(step: StepOutput, times: RequestStateStats) -> StepOutput:
    """Return the first output of a request with the times of its first token."""
    return replace(
        step,
        queue_seconds=max(0.0, times.scheduled_ts - times.queued_ts),
        prefill_seconds=max(0.0, times.first_token_ts - times.scheduled_ts),
        first_token_seconds=times.first_token_latency,
    )


def _token_logprobs(logprobs: FlatLogprobs, top: int, requested: Sequence[int]) -> Iterator[TokenLogprobs]:
    """Yield the log-probabilities of each position, given the number of top tokens or the requested token ids.

    vLLM lists the chosen token first, then the `top` most likely or the `requested` tokens. For a requested token it
    gives the index in that list instead of a rank, so the rank is dropped. That includes a chosen token that is also
    requested: after vLLM has merged two outputs, it is listed once, with that index.
    """
    for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True):
        listed = [_ranked_token(logprobs, index) for index in range(start, end)]
        chosen, by_id = listed[0], {token.token_id: token for token in listed}
        if requested:
            others = [RankedToken(i, by_id[i].text, by_id[i].logprob, 0) for i in requested]
            if chosen.token_id in requested:
                chosen = RankedToken(chosen.token_id, chosen.text, chosen.logprob, 0)
        else:
            others = sorted((token for token in by_id.values() if token.rank <= top), key=lambda token: token.rank)
        yield TokenLogprobs(chosen, others)


def _ranked_token(logprobs: FlatLogprobs, index: int) -> RankedToken:
    return RankedToken(
        logprobs.token_ids[index],
        logprobs.decoded_tokens[index] or "",
        logprobs.logprobs[index],
        logprobs.ranks[index] or 0,
    )
