"""Conversion between the messages of `vllm.grpc.engine` and of `yuan.v1`."""

from collections.abc import Iterator
from typing import Any

from smg_grpc_proto import vllm_engine_pb2 as vpb

from yuan_grpc.server.engine.types import ModelInfo
from yuan_grpc.server.errors import InvalidRequestError, Violation
from yuan_grpc.v1 import yuan_pb2 as pb

_FLAGS = ("skip_special_tokens", "ignore_eos", "include_stop_str_in_output")
_OPTIONAL = ("temperature", "logprobs", "prompt_logprobs", "seed", "truncate_prompt_tokens")
"""Parameters that are copied if they are present."""
_PENALTIES = ("frequency_penalty", "presence_penalty", "repetition_penalty")
_DEFAULT_AT_ZERO = ("top_p", "top_k", "min_p", "min_tokens", "n", *_PENALTIES)
"""Parameters that are copied unless they are zero, which means absent."""
_CONSTRAINTS = {"json_schema": "json", "regex": "regex", "grammar": "grammar", "structural_tag": "structural_tag"}

_FOREIGN = (
    "kv_transfer_params",
    "kv_transfer_params_json",
    "mm_inputs",
    "extra_mm_inputs",
    "media_refs",
)
"""Fields for images and for disaggregated engines, which the models of this server do not have."""

_FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_REPETITION: "repetition",
    pb.FINISH_REASON_DEADLINE: "abort",
}


def to_generate_request(request: Any, info: ModelInfo) -> pb.GenerateRequest:
    """Return the request of `yuan.v1`.

    Raises:
        InvalidRequestError: the request has a field that does not apply to this server.
    """
    if violations := list(_violations(request)):
        raise InvalidRequestError(violations)
    params = request.sampling_params
    converted = pb.GenerateRequest(
        request_id=request.request_id,
        flat_logprobs=True,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else info.max_model_len,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        structured_outputs=_structured_outputs(params),
        **{name: getattr(params, name) for name in _FLAGS},
        **{name: getattr(params, name) for name in _OPTIONAL if params.HasField(name)},
        **{name: value for name in _DEFAULT_AT_ZERO if (value := getattr(params, name))},
    )
    for token_id, bias in params.logit_bias.items():
        converted.logit_bias[token_id] = bias
    if request.WhichOneof("input") == "tokenized":
        converted.prompt_token_ids.ids.extend(request.tokenized.input_ids)
    else:
        converted.prompt = request.text
    return converted


def _violations(request: Any) -> Iterator[Violation]:
    present = {field.name for field, _ in request.ListFields()}
    for name in _FOREIGN:
        if name in present:
            yield Violation(name, f"`{name}` must be absent: the model takes text, and is served by one engine")
    if request.data_parallel_rank:
        yield Violation(
            "data_parallel_rank", f"`data_parallel_rank` must be absent or 0, not {request.data_parallel_rank}"
        )
    if negative := [token_id for token_id in request.sampling_params.logit_bias if token_id < 0]:
        yield Violation("logit_bias", f"`logit_bias` must have token ids of the vocabulary, not {negative[0]}")


def _structured_outputs(params: Any) -> pb.StructuredOutputs | None:
    kind = params.WhichOneof("constraint")
    if kind is None:
        return None
    if kind == "choice":
        return pb.StructuredOutputs(choice=pb.StringList(values=params.choice.choices))
    if kind == "json_object":
        return pb.StructuredOutputs(json_object=True) if params.json_object else None
    return pb.StructuredOutputs(**{_CONSTRAINTS[kind]: getattr(params, kind)})


def complete_responses(request: Any, response: pb.GenerateResponse) -> Iterator[Any]:
    """Yield the complete choices of a response."""
    input_logprobs = _input_logprobs(response.flat_prompt_logprobs)
    for choice in response.choices:
        yield _complete(request, choice, response.usage, input_logprobs)


class StreamConverter:
    """Converts the messages of a stream.

    Args:
        request: the request.
    """

    def __init__(self, request: Any) -> None:
        self._request = request
        self._usage = pb.Usage()
        self._prompt_logprobs = pb.FlatLogprobs()
        self._begun = set[int]()

    def convert(self, message: pb.GenerateStreamResponse) -> Iterator[Any]:
        """Yield the new tokens of each choice, and its end."""
        if message.HasField("usage"):
            self._usage = message.usage
        _extend(self._prompt_logprobs, message.flat_prompt_logprobs)
        for choice in message.choices:
            yield self._chunk(choice)
            if choice.finish_reason:
                yield _complete(self._request, choice, self._usage, None)

    def _chunk(self, choice: pb.Choice) -> Any:
        is_first = choice.index not in self._begun
        self._begun.add(choice.index)
        return vpb.GenerateResponse(
            chunk=vpb.GenerateStreamChunk(
                token_ids=choice.token_ids,
                prompt_tokens=self._usage.prompt_tokens,
                completion_tokens=len(choice.token_ids),
                cached_tokens=self._usage.cached_tokens,
                output_logprobs=_output_logprobs(choice.flat_logprobs),
                input_logprobs=_input_logprobs(self._prompt_logprobs) if is_first else None,
                index=choice.index,
            )
        )


def _complete(request: Any, choice: pb.Choice, usage: pb.Usage, input_logprobs: Any) -> Any:
    """Return the end of a choice. In a stream, the choice has the last tokens only, as vLLM's has."""
    complete = vpb.GenerateComplete(
        output_ids=choice.token_ids,
        finish_reason=_FINISH_REASONS[choice.finish_reason],
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=len(choice.token_ids),
        cached_tokens=usage.cached_tokens,
        output_logprobs=_output_logprobs(choice.flat_logprobs),
        input_logprobs=input_logprobs,
        index=choice.index,
    )
    if choice.HasField("stop_string"):
        complete.matched_stop_str = choice.stop_string
    elif choice.stop_token_id in request.sampling_params.stop_token_ids and choice.HasField("stop_token_id"):
        complete.matched_token_id = choice.stop_token_id
    return vpb.GenerateResponse(complete=complete)


def _extend(all_: pb.FlatLogprobs, more: pb.FlatLogprobs) -> None:
    offset = len(all_.token_ids)
    all_.token_ids.extend(more.token_ids)
    all_.logprobs.extend(more.logprobs)
    all_.starts.extend(start + offset for start in more.starts)


def _spans(flat: pb.FlatLogprobs) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each position."""
    yield from zip(flat.starts, [*flat.starts[1:], len(flat.token_ids)], strict=True)


def _top_logprobs(flat: pb.FlatLogprobs) -> list[Any]:
    return [
        vpb.TopLogProbs(values=flat.logprobs[start + 1 : end], token_ids=flat.token_ids[start + 1 : end])
        for start, end in _spans(flat)
    ]


def _output_logprobs(flat: pb.FlatLogprobs) -> Any:
    if not flat.starts:
        return None
    return vpb.OutputLogProbs(
        token_logprobs=[flat.logprobs[start] for start in flat.starts],
        token_ids=[flat.token_ids[start] for start in flat.starts],
        top_logprobs=_top_logprobs(flat),
    )


def _input_logprobs(flat: pb.FlatLogprobs) -> Any:
    if not flat.starts:
        return None
    values: list[float | None] = [flat.logprobs[start] for start in flat.starts]
    values[0] = None  # the first token has no predecessor
    return vpb.InputLogProbs(
        token_logprobs=[vpb.InputTokenLogProb(value=value) for value in values],
        token_ids=[flat.token_ids[start] for start in flat.starts],
        top_logprobs=_top_logprobs(flat),
    )
