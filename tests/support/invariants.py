"""Invariants of the contract that hold for every response. Each check yields the violations it finds."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from random_messages import has_field
from random_requests import CONTEXT, END, MODEL, TOKENS, Outcome

from yuan_grpc.v1 import yuan_pb2 as pb

MAX_HEADER_BYTES = 8192
"""Default header limit of clients, in bytes."""
REASONS = {
    grpc.StatusCode.INVALID_ARGUMENT: {"INVALID_REQUEST"},
    grpc.StatusCode.ALREADY_EXISTS: {"DUPLICATE_REQUEST_ID", "DUPLICATE_LORA"},
    grpc.StatusCode.RESOURCE_EXHAUSTED: {"OVERLOADED"},
    grpc.StatusCode.CANCELLED: {"ABORTED"},
    grpc.StatusCode.NOT_FOUND: {"REQUEST_NOT_FOUND", "MODEL_NOT_FOUND"},
    grpc.StatusCode.FAILED_PRECONDITION: {"NOT_ENABLED"},
}
"""Error reasons by status code that a healthy server can return."""


def violations(outcome: Outcome) -> list[str]:
    """Return the violated invariants of an outcome."""
    if outcome.code is not grpc.StatusCode.OK:
        return [*_error_violations(outcome)]
    if outcome.call.rpc == "GenerateStream":
        return [
            *_stream_violations(outcome.responses),
            *_response_violations(outcome.request, _join_messages(outcome.responses)),
        ]
    if isinstance(outcome.request, pb.GenerateRequest):
        return [*_response_violations(outcome.request, outcome.responses[0])]
    return []


def _error_violations(outcome: Outcome) -> Iterator[str]:
    if outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        if outcome.call.timeout != outcome.call.short_timeout:
            yield "it exceeded the long timeout"
        return
    if outcome.code not in REASONS:
        yield f"{outcome.code.name} is not a valid status of a request"
    if outcome.header_bytes > MAX_HEADER_BYTES:
        yield f"its status takes {outcome.header_bytes} bytes of headers"
    if outcome.status is None:
        yield "its status has no details"
        return
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    found = {
        detail.TypeName() for detail in outcome.status.details for kind in (info, bad, retry) if detail.Unpack(kind)
    }
    if info.domain != "yuan.v1" or info.reason not in REASONS.get(outcome.code, {"INTERNAL", "ENGINE_UNAVAILABLE"}):
        yield f"its reason is {info.domain} {info.reason}"
    if ("google.rpc.BadRequest" in found) != (outcome.code is grpc.StatusCode.INVALID_ARGUMENT):
        yield f"it has {found}"
    for violation in bad.field_violations:
        if not has_field(outcome.request.DESCRIPTOR, violation.field) or not violation.description:
            yield f"{violation.field!r} in a violation is not a field of the request"


def _stream_violations(messages: Sequence[pb.GenerateStreamResponse]) -> Iterator[str]:
    no_heartbeats = [message for message in messages if len(message.ListFields()) > len(("request_id", "model"))]
    if not no_heartbeats or no_heartbeats[0].choices:
        yield "its first message is invalid"
    if not all(message.HasField("usage") for message in (*no_heartbeats[:1], *no_heartbeats[-1:])):
        yield "its first or last message has no usage"
    if len({(message.request_id, message.model) for message in messages}) != 1:
        yield "its messages have different request ids or models"
    finished = [delta.index for message in messages for delta in message.choices if delta.finish_reason]
    if len(finished) != len(set(finished)):
        yield "a choice finished twice"


def _join_messages(messages: Sequence[pb.GenerateStreamResponse]) -> pb.GenerateResponse:
    """Return the response that a stream's messages add up to."""
    response, choices = pb.GenerateResponse(), dict[int, pb.Choice]()
    for message in messages:
        common = pb.GenerateStreamResponse()
        common.CopyFrom(message)
        for field in ("choices", "progress", "flat_prompt_logprobs"):
            common.ClearField(field)
        response.MergeFromString(common.SerializeToString())  # both messages have these fields
        response.usage.CopyFrom(message.usage if message.HasField("usage") else response.usage)
        _append_flat(response.flat_prompt_logprobs, message.flat_prompt_logprobs)
        for delta in message.choices:
            _append(choices.setdefault(delta.index, pb.Choice()), delta)
    response.choices.extend(choices[index] for index in sorted(choices))
    response.request_id, response.model = messages[0].request_id, messages[0].model
    return response


def _append(choice: pb.Choice, delta: pb.Choice) -> None:
    text, flat = choice.text + delta.text, pb.FlatLogprobs()
    flat.CopyFrom(choice.flat_logprobs)
    _append_flat(flat, delta.flat_logprobs)
    choice.MergeFrom(delta)
    choice.text = text
    choice.flat_logprobs.CopyFrom(flat)


def _append_flat(flat: pb.FlatLogprobs, delta: pb.FlatLogprobs) -> None:
    flat.starts.extend(len(flat.token_ids) + start for start in delta.starts)
    flat.token_ids.extend(delta.token_ids)
    flat.logprobs.extend(delta.logprobs)
    flat.ranks.extend(delta.ranks)


def _response_violations(request: pb.GenerateRequest, response: pb.GenerateResponse) -> Iterator[str]:
    if response.request_id != (request.request_id or response.request_id) or not response.request_id:
        yield f"its request id is {response.request_id!r}"
    if response.model != (request.model or MODEL):
        yield f"its model is {response.model!r}"
    n, found = (request.n if request.HasField("n") else 1), [choice.index for choice in response.choices]
    if found != list(range(n)) and not (request.use_beam_search and found == list(range(len(found) or 1))):
        yield f"its choices are {found}, not {n}"
    yield from _usage_violations(request, response)
    yield from _seed_violations(request, response)
    yield from _prompt_logprobs_violations(request, response)
    for choice in response.choices:
        yield from _choice_violations(request, choice, response.usage.prompt_tokens)
        yield from _text_violations(request, choice)
        yield from _logprobs_violations(request, choice)


def _usage_violations(request: pb.GenerateRequest, response: pb.GenerateResponse) -> Iterator[str]:
    usage, returned = response.usage, sum(len(choice.token_ids) for choice in response.choices)
    if not 0 < usage.prompt_tokens < CONTEXT or usage.cached_tokens > usage.prompt_tokens:
        yield f"its usage is {usage}"
    if usage.completion_tokens < returned or (not request.best_of and usage.completion_tokens != returned):
        yield f"{usage.completion_tokens} tokens were counted, and {returned} returned"
    if len(response.prompt_token_ids) != (usage.prompt_tokens if request.return_prompt_token_ids else 0):
        yield f"it has {len(response.prompt_token_ids)} of {usage.prompt_tokens} prompt token ids"


def _seed_violations(request: pb.GenerateRequest, response: pb.GenerateResponse) -> Iterator[str]:
    deterministic = {"temperature": 0, "top_p": 0, "top_k": 1}
    is_greedy = any(request.HasField(name) and getattr(request, name) == value for name, value in deterministic.items())
    has_seed = not request.use_beam_search and not is_greedy
    if response.HasField("seed") != has_seed or (
        request.HasField("seed") and has_seed and response.seed != request.seed
    ):
        yield f"its seed is {response.seed}, although the request is {'sampled' if has_seed else 'deterministic'}"


def _choice_violations(request: pb.GenerateRequest, choice: pb.Choice, prompt_tokens: int) -> Iterator[str]:
    limit = min(request.max_tokens if request.HasField("max_tokens") else 16, CONTEXT - prompt_tokens)
    ids, reason = list(choice.token_ids), choice.finish_reason
    is_partial = reason == pb.FINISH_REASON_DEADLINE
    if reason not in pb.FinishReason.values()[1:] or (is_partial and not request.partial_on_deadline):
        yield f"its finish reason is {reason}"
    if reason == pb.FINISH_REASON_REPETITION and not request.HasField("repetition_detection"):
        yield "it finished with REPETITION without `repetition_detection`"
    if not is_partial <= len(ids) <= limit and not (is_partial and not ids):
        yield f"it has {len(ids)} tokens with a limit of {limit}"
    if reason == pb.FINISH_REASON_LENGTH and len(ids) != limit:
        yield f"it finished with LENGTH at {len(ids)} of {limit} tokens"
    if reason == pb.FINISH_REASON_STOP and len(ids) < request.min_tokens:
        yield f"it has {len(ids)} tokens of at least {request.min_tokens}"
    if (reason == pb.FINISH_REASON_STOP) != (choice.WhichOneof("stopped_by") is not None):
        yield f"finish reason {reason}, stopped by {choice.WhichOneof('stopped_by')}"
    if choice.HasField("stop_token_id") and choice.stop_token_id != ids[-1]:
        yield f"it was stopped by {choice.stop_token_id} and ended with {ids[-1]}"
    if choice.HasField("stop_string") and choice.stop_string not in request.stop:
        yield f"it was stopped by {choice.stop_string!r}"
    yield from _ids_violations(request, ids)


def _ids_violations(request: pb.GenerateRequest, ids: Sequence[int]) -> Iterator[str]:
    if invalid := [i for i in ids if i >= TOKENS]:
        yield f"{invalid} are not in the vocabulary"
    if request.allowed_token_ids and (forbidden := sorted(set(ids) - set(request.allowed_token_ids))):
        yield f"{forbidden} are not allowed"
    end_ids = {*request.stop_token_ids, *(() if request.ignore_eos else (END,))}
    if ignored := end_ids.intersection(ids[:-1]):
        yield f"{ignored} did not end it"


def _text_violations(request: pb.GenerateRequest, choice: pb.Choice) -> Iterator[str]:
    if request.echo or request.min_tokens:  # a stop string before `min_tokens` is ordinary text
        return
    suffix = choice.stop_string if request.include_stop_str_in_output else ""
    if suffix and not choice.text.endswith(suffix):
        yield f"its text does not end with {suffix!r}"
    text = choice.text.removesuffix(suffix)
    if stops := [stop for stop in request.stop if stop in text]:
        yield f"its text contains {stops}"


def _logprobs_violations(request: pb.GenerateRequest, choice: pb.Choice) -> Iterator[str]:
    requested_ids = list(request.logprob_token_ids)
    has_logprobs = bool(requested_ids) or request.HasField("logprobs")
    positions = _positions(choice.logprobs, choice.flat_logprobs, request.flat_logprobs)
    if [ids[0] for ids, _ in positions] != (list(choice.token_ids) if has_logprobs else []):
        yield f"its logprobs are of the tokens {[ids[:1] for ids, _ in positions]}"
    for ids, logprobs in positions:
        if requested_ids and ids[1:] != requested_ids:
            yield f"a token has the logprobs of {ids[1:]}, not of {requested_ids}"
        if len(ids) != 1 + (len(requested_ids) or request.logprobs) or not all(value <= 0 for value in logprobs):
            yield f"a token has {list(zip(ids, logprobs, strict=True))}"
    if has_logprobs and choice.token_ids and not choice.HasField("cumulative_logprob"):
        yield "it has no cumulative logprob"


def _prompt_logprobs_violations(request: pb.GenerateRequest, response: pb.GenerateResponse) -> Iterator[str]:
    positions = _positions(response.prompt_logprobs, response.flat_prompt_logprobs, request.flat_logprobs)
    has_logprobs = request.HasField("prompt_logprobs")
    is_partial = any(choice.finish_reason == pb.FINISH_REASON_DEADLINE for choice in response.choices)
    if len(positions) != (response.usage.prompt_tokens if has_logprobs else 0) and not (is_partial and not positions):
        yield f"{len(positions)} of {response.usage.prompt_tokens} prompt tokens have logprobs"
    if positions and response.prompt_token_ids and [ids[0] for ids, _ in positions] != list(response.prompt_token_ids):
        yield "the prompt's logprobs are not of its tokens"
    for index, (ids, logprobs) in enumerate(positions):
        num_top = request.prompt_logprobs if index else 0
        if len(ids) != 1 + num_top or not all(value <= 0 for value in logprobs):
            yield f"prompt token {index} has {list(zip(ids, logprobs, strict=True))}"


def _positions(nested: Any, flat: pb.FlatLogprobs, is_flat: bool) -> list[tuple[list[int], list[float]]]:
    """Return for each position the ids of the token and its alternatives, and their logprobs."""
    if not is_flat:
        assert not flat.starts
        return [([p.token_id, *(t.token_id for t in p.top)], [p.logprob, *(t.logprob for t in p.top)]) for p in nested]
    assert not nested
    assert len(flat.token_ids) == len(flat.logprobs) == len(flat.ranks)
    bounds = [*flat.starts, len(flat.token_ids)]
    spans = [slice(start, end) for start, end in pairwise(bounds)]
    return [(list(flat.token_ids[span]), list(flat.logprobs[span])) for span in spans]
