"""The service's plain values to vLLM's, and back."""

import asyncio
import re
from collections.abc import Iterator, Sequence

from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

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
from yuan_grpc.server.errors import InvalidRequestError, ServiceError, UnavailableError, Violation

MIN_TEMPERATURE = 0.01
"""vLLM takes less for so much, and leaves a line in the log each time."""
MAX_BAD_WORD_TOKENS = 1024
"""vLLM's V2 model runner has room for no more, and its worker would die of it."""

_SOURCE = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""How xgrammar begins what it says: with its own file and line."""

_FINISH_REASONS = {
    None: None,
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "repetition": FinishReason.REPETITION,
}


def to_sampling_params(sampling: Sampling, stream: bool) -> SamplingParams:
    """vLLM takes the most likely token at temperature 0."""
    fields = vars(sampling) | {
        "temperature": max(sampling.temperature, MIN_TEMPERATURE),
        "stop": list(sampling.stop),
        "stop_token_ids": list(sampling.stop_token_ids),
        "bad_words": [],  # `ban` sees to them
        "logit_bias": dict(sampling.logit_bias) or None,
        "allowed_token_ids": list(sampling.allowed_token_ids) or None,
        "logprob_token_ids": list(sampling.logprob_token_ids) or None,
        "structured_outputs": sampling.structured_outputs and _constraint(sampling.structured_outputs),
    }
    if sampling.repetition_detection:
        fields["repetition_detection"] = RepetitionDetectionParams(**vars(sampling.repetition_detection))
    if sampling.is_greedy:
        fields |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    if sampling.prompt_logprobs is not None:  # of what the cache had, vLLM would tell whatever is in that memory
        fields["skip_reading_prefix_cache"] = True
    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**fields, output_kind=kind, flat_logprobs=True)


def _constraint(constraint: Constraint) -> StructuredOutputsParams:
    specification = constraint.specification
    return StructuredOutputsParams(
        **{constraint.kind: list(specification) if isinstance(specification, tuple) else specification}
    )


def ban(sampling: Sampling, params: SamplingParams, tokenizer: TokenizerLike) -> None:
    """Bans words as they are written at the beginning of a text and within one, in place of vLLM's own way.

    vLLM encodes a word without and with a space before it. Yuan's tokenizer has one there in either case.

    Raises:
        InvalidRequestError: they have more tokens than there is room for, or no token is left that may come.
    """
    banned = [ids for word in sampling.bad_words for ids in tokenizer.encode_word(word.strip()) if ids]
    if (tokens := sum(map(len, banned))) > MAX_BAD_WORD_TOKENS:
        sentence = f"`bad_words` must have at most {MAX_BAD_WORD_TOKENS} tokens in all, not {tokens}"
        raise InvalidRequestError([Violation("bad_words", sentence)])
    params._bad_words_token_ids = banned or None
    never = {ids[0] for ids in banned if len(ids) == 1}
    if sampling.min_tokens:
        never.update(sampling.stop_token_ids, [tokenizer.eos_token_id])
    if sampling.allowed_token_ids and never.issuperset(sampling.allowed_token_ids):
        sentence = "`allowed_token_ids` must have one that neither `bad_words` nor `min_tokens` holds back"
        raise InvalidRequestError([Violation("allowed_token_ids", sentence)])


def decode_continuation(
    request: EngineRequest, token_ids: Sequence[int], ended: bool, tokenizer: TokenizerLike
) -> tuple[str, str | None]:
    """See `Engine.decode_continuation`: vLLM's own detokenizer, so that no text can differ from a sampled one's."""
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


def refusal(error: Exception, request: EngineRequest) -> InvalidRequestError:
    """What is told of a job that vLLM refuses: mostly a constraint, which it alone can read."""
    constraint = request.sampling.structured_outputs
    field = getattr(error, "parameter", None)
    if field is None and constraint is not None:
        field = f"structured_outputs.{constraint.kind}"
    said = _SOURCE.sub("", str(error.args[0] if error.args else error)).partition("\n")[0]
    return InvalidRequestError([Violation(field or "", f"`{field or 'request'}` must be one that vLLM takes: {said}")])


def entries(output: RequestOutput) -> int:
    """Log-probabilities in it."""
    all_of_them = (output.prompt_logprobs, *(completion.logprobs for completion in output.outputs))
    return sum(len(logprobs.token_ids) for logprobs in all_of_them if logprobs)


class OutputConverter:
    """Turns what vLLM puts out for one job into steps.

    Args:
        job: what was asked for.
        tokenizer: the model's.
        cut: set where the job is cut short, which is how vLLM then says it ended: by an abort.
    """

    def __init__(self, request: EngineRequest, tokenizer: TokenizerLike, deadline: asyncio.Event | None) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._deadline = deadline
        self._allowed = frozenset(request.sampling.allowed_token_ids)
        self._wants_prompt = request.sampling.prompt_logprobs is not None

    def step(self, output: RequestOutput) -> StepOutput:
        """One step; the first has the prompt's log-probabilities.

        Raises:
            UnavailableError: the engine gave the request up.
        """
        prompt_logprobs: list[TokenLogprobs] = []
        if self._wants_prompt and output.prompt_logprobs:
            self._wants_prompt = False
            prompt_logprobs = self._prompt_logprobs(output.prompt_logprobs)
        return StepOutput(
            [self._piece(completion) for completion in output.outputs],
            cached_tokens=output.num_cached_tokens or 0,
            prompt_logprobs=prompt_logprobs,
        )

    def _piece(self, completion: CompletionOutput) -> ChoiceDelta:
        finish_reason = self._finish_reason(completion.finish_reason)
        if self._allowed and not self._allowed.issuperset(completion.token_ids):  # with none left, vLLM takes any
            sentence = "`allowed_token_ids` must have one that `bad_words` and the like leave in each place"
            raise InvalidRequestError([Violation("allowed_token_ids", sentence)])
        stop_reason = completion.stop_reason if finish_reason is FinishReason.STOP else None
        if finish_reason is FinishReason.STOP and stop_reason is None:  # how vLLM says: at the end-of-text token
            stop_reason = self._tokenizer.eos_token_id
        sampling = self._request.sampling
        return ChoiceDelta(
            index=completion.index,
            text=completion.text,
            token_ids=completion.token_ids,
            logprobs=list(_token_logprobs(completion.logprobs, sampling.logprobs or 0, sampling.logprob_token_ids)),
            cumulative_logprob=completion.cumulative_logprob,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _finish_reason(self, reason: str | None) -> FinishReason | None:
        if reason == "abort" and self._deadline and self._deadline.is_set():
            return FinishReason.DEADLINE
        if reason not in _FINISH_REASONS:
            raise self._given_up(reason)
        return _FINISH_REASONS[reason]

    def _given_up(self, reason: str | None) -> ServiceError:
        constraint = self._request.sampling.structured_outputs
        if constraint and reason == "error":
            field = f"structured_outputs.{constraint.kind}"
            sentence = f"`{field}` must be one that the engine can compile, and fulfil with what else is asked for"
            return InvalidRequestError([Violation(field, sentence)])
        return UnavailableError("the engine gave the request up")

    def _prompt_logprobs(self, logprobs: FlatLogprobs) -> list[TokenLogprobs]:
        first = self._request.prompt[0]
        text = self._tokenizer.convert_tokens_to_string(self._tokenizer.convert_ids_to_tokens([first]))
        rest = _token_logprobs(logprobs[1:], self._request.sampling.prompt_logprobs or 0, ())
        return [TokenLogprobs(RankedToken(first, text, 0.0, 0), ()), *rest]


def _token_logprobs(logprobs: FlatLogprobs | None, top: int, wanted: Sequence[int]) -> Iterator[TokenLogprobs]:
    """vLLM lists the chosen token first, then the `top` most likely ones or those that are `wanted`.

    The ranks of wanted tokens are their places in that list, which says nothing. Where two outputs were put together, a
    chosen token that is wanted is listed once, with that rank: so its rank is never told.
    """
    if logprobs is None:
        return
    for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True):
        listed = [_ranked_token(logprobs, index) for index in range(start, end)]
        chosen, by_id = listed[0], {token.token_id: token for token in listed}
        if wanted:
            beside = [RankedToken(i, by_id[i].text, by_id[i].logprob, 0) for i in wanted]
            if chosen.token_id in wanted:
                chosen = RankedToken(chosen.token_id, chosen.text, chosen.logprob, 0)
        else:
            beside = sorted((token for token in by_id.values() if token.rank <= top), key=lambda token: token.rank)
        yield TokenLogprobs(chosen, beside)


def _ranked_token(logprobs: FlatLogprobs, index: int) -> RankedToken:
    return RankedToken(
        logprobs.token_ids[index],
        logprobs.decoded_tokens[index] or "",
        logprobs.logprobs[index],
        logprobs.ranks[index] or 0,
    )
