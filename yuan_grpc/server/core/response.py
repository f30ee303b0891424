"""Conversion of plain values to protobuf responses."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from google.protobuf.duration_pb2 import Duration

from yuan_grpc.request.fields import MAX_CHOICES
from yuan_grpc.server.core.request_stats import RequestStats
from yuan_grpc.server.engine.load import EngineLoad, utilization
from yuan_grpc.server.engine.types import (
    INLINE_ENTRIES,
    ChoiceDelta,
    FinishReason,
    LoraInfo,
    ModelInfo,
    Progress,
    RankedToken,
    StepOutput,
    TokenLogprobs,
)
from yuan_grpc.server.errors import NotEnabledError
from yuan_grpc.server.security.identity import current_identity
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_ENTRIES_PER_MESSAGE = INLINE_ENTRIES
"""Tokens and log-probabilities in one message of a stream: about 0.5 MB. Clients accept messages of 4 MB by default."""

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.REPETITION: pb.FINISH_REASON_REPETITION,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}


class ResponseBuilder:
    """Builds the responses to one request. Keeps the token counts, and which choices have been echoed.

    Args:
        request: the request.
        model: the model's name in the responses.
        prompt: the prompt's token ids.
        echo: text that each choice begins with.
        seed: the sampling seed; None for greedy decoding and beam search.
        stats: the times of the request, if it returns them.
    """

    def __init__(
        self,
        request: pb.GenerateRequest,
        model: str,
        prompt: Sequence[int],
        echo: str,
        seed: int | None,
        stats: RequestStats | None = None,
    ) -> None:
        self._request_id = request.request_id
        self._model = model
        self._is_flat = request.flat_logprobs
        self._usage = pb.Usage(prompt_tokens=len(prompt))
        self._seed = seed
        self._prompt_token_ids = prompt if request.return_prompt_token_ids else ()
        self._echo = echo
        self._shows_cached_tokens = bool(request.cache_salt or current_identity().has_own_cache)
        self._echoed: set[int] = set()
        self._wants_prompt_logprobs = request.HasField("prompt_logprobs")
        self._stats = stats if request.return_timings else None
        self._has_begun = False

    def build_response(self, output: StepOutput) -> pb.GenerateResponse:
        """Return the response of Generate for an output with the complete choices."""
        response = pb.GenerateResponse(
            request_id=self._request_id,
            model=self._model,
            usage=self._add_usage(output),
            seed=self._seed,
            prompt_token_ids=self._prompt_token_ids,
            timings=_timings(self._stats),
        )
        for delta in sorted(output.deltas, key=lambda delta: delta.index):
            self._fill_choice(response.choices.add(), delta)
        self._add_prompt_logprobs(response, output.prompt_logprobs)
        return response

    def build_stream_messages(self, output: StepOutput) -> Iterator[pb.GenerateStreamResponse]:
        """Yield the messages of GenerateStream for an output: none, one, or several if one would be too large.

        The first message of the stream waits for the prompt's log-probabilities, if requested. It has the usage, as has
        each message in which a choice finishes.
        """
        logprobs = output.prompt_logprobs
        if not self._has_begun and (logprobs or output.deltas or not self._wants_prompt_logprobs):
            yield from self._first_messages(logprobs)
        elif logprobs:
            yield from self._prompt_messages(logprobs)
        if output.deltas or output.progress:
            yield from self._delta_messages(output)

    def heartbeat(self) -> Iterator[pb.GenerateStreamResponse]:
        """Yield an empty message, or the first message if it was still waiting for the prompt's log-probabilities."""
        if self._has_begun:
            yield self._empty_message()
        else:
            yield from self._first_messages(())

    def _first_messages(self, logprobs: Sequence[TokenLogprobs]) -> Iterator[pb.GenerateStreamResponse]:
        self._has_begun = True
        first, *others = [*self._prompt_messages(logprobs)] or [self._empty_message()]
        first.MergeFrom(
            pb.GenerateStreamResponse(usage=self._usage, seed=self._seed, prompt_token_ids=self._prompt_token_ids)
        )
        yield first
        yield from others

    def _prompt_messages(self, logprobs: Sequence[TokenLogprobs]) -> Iterator[pb.GenerateStreamResponse]:
        top = max((len(token.top) for token in logprobs), default=0)
        size = max(1, MAX_ENTRIES_PER_MESSAGE // (1 + top))
        for start in range(0, len(logprobs), size):
            message = self._empty_message()
            self._add_prompt_logprobs(message, logprobs[start : start + size])
            yield message

    def _delta_messages(self, output: StepOutput) -> Iterator[pb.GenerateStreamResponse]:
        usage, progress = self._add_usage(output), output.progress
        for deltas in _split_by_message(output.deltas):
            message, has_finished = self._empty_message(), False
            for delta in deltas:
                self._fill_choice(message.choices.add(), delta)
                has_finished = has_finished or delta.finish_reason is not None
            if has_finished:
                message.MergeFrom(pb.GenerateStreamResponse(usage=usage, timings=_timings(self._stats)))
            if progress:
                message.progress.CopyFrom(_progress(progress))
            yield message

    def _empty_message(self) -> pb.GenerateStreamResponse:
        return pb.GenerateStreamResponse(request_id=self._request_id, model=self._model)

    def _add_usage(self, output: StepOutput) -> pb.Usage:
        tokens = output.discarded_tokens
        for delta in output.deltas:
            tokens += len(delta.token_ids)
        self._usage.completion_tokens += tokens
        if self._shows_cached_tokens:  # a shared cache would reveal which prompts other callers have sent
            self._usage.cached_tokens = output.cached_tokens or self._usage.cached_tokens
        return self._usage

    def _fill_choice(self, choice: pb.Choice, delta: ChoiceDelta) -> None:
        """Set only the fields that the delta has: for most a text and a token."""
        choice.index, choice.text = delta.index, delta.text
        choice.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            self._add_logprobs(choice, delta.logprobs)
        if delta.cumulative_logprob is not None:
            choice.cumulative_logprob = delta.cumulative_logprob
        if delta.index not in self._echoed:
            self._echoed.add(delta.index)
            choice.text = self._echo + choice.text
        if delta.finish_reason is not None:
            _set_finish(choice, delta.finish_reason, delta.stop_reason)

    def _add_logprobs(self, choice: pb.Choice, logprobs: Sequence[TokenLogprobs]) -> None:
        if self._is_flat:
            choice.flat_logprobs.CopyFrom(_flat_logprobs(logprobs))
        else:
            choice.logprobs.extend(map(_token_logprob, logprobs))

    def _add_prompt_logprobs(
        self, response: pb.GenerateResponse | pb.GenerateStreamResponse, logprobs: Sequence[TokenLogprobs]
    ) -> None:
        if self._is_flat and logprobs:
            response.flat_prompt_logprobs.CopyFrom(_flat_logprobs(logprobs))
        elif logprobs:
            response.prompt_logprobs.extend(map(_token_logprob, logprobs))


def _set_finish(choice: pb.Choice, reason: FinishReason, stop_reason: str | int | None) -> None:
    choice.finish_reason = _FINISH_REASONS[reason]
    if isinstance(stop_reason, str):
        choice.stop_string = stop_reason
    elif stop_reason is not None:
        choice.stop_token_id = stop_reason


def tokenize_response(text: str, tokens: Sequence[tuple[int, str, int, int]]) -> pb.TokenizeResponse:
    """Return the response of Tokenize for tokens as in `Engine.tokenize_with_offsets`."""
    return pb.TokenizeResponse(
        tokens=[pb.Token(id=i, piece=piece, start=start, end=end) for i, piece, start, end in tokens],
        count=len(tokens),
        text=text,
    )


def loads_response(loads: Sequence[EngineLoad]) -> pb.GetLoadsResponse:
    """Return the response of GetLoads.

    Raises:
        NotEnabledError: the engine keeps no statistics.
    """
    if not loads:
        raise NotEnabledError("the load is not known: start the server without --disable-log-stats")
    return pb.GetLoadsResponse(utilization=utilization(loads), loads=map(_engine_load, loads))


def _engine_load(load: EngineLoad) -> pb.EngineLoad:
    return pb.EngineLoad(
        dp_rank=load.rank,
        num_running_reqs=load.num_running,
        num_waiting_reqs=load.num_waiting,
        max_num_seqs=load.max_num_seqs,
        kv_cache_usage=load.kv_cache_usage,
        tokens_per_second=load.tokens_per_second,
    )


def model_response(info: ModelInfo, version: str, loras: Sequence[str]) -> pb.GetModelResponse:
    """Return the response of GetModel.

    Args:
        version: the version of this package.
        loras: the names of the loaded adapters.
    """
    return pb.GetModelResponse(
        name=info.name,
        revision=info.revision,
        version=version,
        vllm_version=info.vllm_version,
        dtype=info.dtype,
        quantization=info.quantization,
        sizes=pb.ModelSizes(
            layers=info.layers,
            hidden=info.hidden,
            heads=info.heads,
            intermediate=info.intermediate,
            tokens=info.vocab_size,
        ),
        limits=pb.Limits(
            max_model_len=info.max_model_len,
            max_logprobs=info.max_logprobs,
            max_choices=MAX_CHOICES,
            max_num_seqs=info.max_num_seqs,
            max_num_queued_reqs=info.max_num_queued_reqs,
            priority_scheduling=info.priority_scheduling,
            prefix_caching=info.prefix_caching,
        ),
        parallelism=pb.Parallelism(
            tensor=info.tensor_parallel, pipeline=info.pipeline_parallel, data=info.data_parallel
        ),
        lora=_lora_support(info.lora, loras) if info.lora else None,
    )


def _lora_support(lora: LoraInfo, loaded: Sequence[str]) -> pb.LoraSupport:
    return pb.LoraSupport(max_loras=lora.max_loras, max_lora_rank=lora.max_rank, can_load=lora.can_load, loaded=loaded)


def _split_by_message(deltas: Sequence[ChoiceDelta]) -> Iterator[list[ChoiceDelta]]:
    """Yield the deltas of each message: at least one list, each as long as a message can hold."""
    if sum(delta.num_entries for delta in deltas) <= MAX_ENTRIES_PER_MESSAGE:  # the usual case
        yield list(deltas)
        return
    group, capacity = list[ChoiceDelta](), MAX_ENTRIES_PER_MESSAGE
    for part in (part for delta in deltas for part in _split_delta(delta)):
        if group and part.num_entries > capacity:
            yield group
            group, capacity = [], MAX_ENTRIES_PER_MESSAGE
        group.append(part)
        capacity -= part.num_entries
    yield group


def _split_delta(delta: ChoiceDelta) -> Iterator[ChoiceDelta]:
    """Yield a delta in parts that fit a message. The first has the text, the last the finish reason."""
    tokens = len(delta.token_ids)
    size = max(1, MAX_ENTRIES_PER_MESSAGE * tokens // max(1, delta.num_entries))
    for start in range(0, max(1, tokens), size):
        end = start + size
        part = replace(
            delta,
            text="" if start else delta.text,
            token_ids=delta.token_ids[start:end],
            logprobs=delta.logprobs[start:end],
        )
        yield part if end >= tokens else replace(part, cumulative_logprob=None, finish_reason=None, stop_reason=None)


def _timings(stats: RequestStats | None) -> pb.Timings | None:
    if stats is None:
        return None
    return pb.Timings(
        queue=_duration(stats.queue_seconds),
        prefill=_duration(stats.prefill_seconds),
        first_token=_duration(stats.first_token_seconds),
        decode=_duration(stats.decode_seconds),
        total=_duration(stats.total_seconds),
    )


def _duration(seconds: float | None) -> Duration | None:
    if seconds is None:
        return None
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _progress(progress: Progress) -> pb.Progress:
    return pb.Progress(
        tokens=progress.tokens,
        finished=progress.finished,
        best_text=progress.best_text,
        best_cumulative_logprob=progress.best_cumulative_logprob,
    )


def _token_logprob(token: TokenLogprobs) -> pb.TokenLogprob:
    chosen = token.chosen
    return pb.TokenLogprob(
        token_id=chosen.token_id,
        token=chosen.text,
        logprob=chosen.logprob,
        rank=chosen.rank,
        top=[pb.TopLogprob(token_id=t.token_id, token=t.text, logprob=t.logprob, rank=t.rank) for t in token.top],
    )


def _flat_logprobs(logprobs: Sequence[TokenLogprobs]) -> pb.FlatLogprobs:
    flat, tokens = pb.FlatLogprobs(), list[RankedToken]()
    for token in logprobs:
        flat.starts.append(len(tokens))
        tokens += (token.chosen, *token.top)
    flat.token_ids.extend(token.token_id for token in tokens)
    flat.logprobs.extend(token.logprob for token in tokens)
    flat.ranks.extend(token.rank for token in tokens)
    return flat
