"""What the contract promises of an answer, checked of any. Each check yields what it finds broken."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import grpc
from calls import CONTEXT, END, MODEL, TOKENS, Outcome
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from messages import has_field

from yuan_grpc.v1 import yuan_pb2 as pb

HEADERS = 8192
"""Bytes of a status that clients take."""
REASONS = {
    grpc.StatusCode.INVALID_ARGUMENT: {"INVALID_REQUEST"},
    grpc.StatusCode.ALREADY_EXISTS: {"DUPLICATE_REQUEST_ID", "DUPLICATE_LORA"},
    grpc.StatusCode.RESOURCE_EXHAUSTED: {"OVERLOADED"},
    grpc.StatusCode.CANCELLED: {"ABORTED"},
    grpc.StatusCode.NOT_FOUND: {"REQUEST_NOT_FOUND", "MODEL_NOT_FOUND"},
    grpc.StatusCode.FAILED_PRECONDITION: {"NOT_ENABLED"},
}
"""The errors that a sound server can answer to some request."""


def broken(outcome: Outcome) -> list[str]:
    """All that is wrong with what came of a request."""
    if outcome.code is not grpc.StatusCode.OK:
        return [*_broken_in_error(outcome)]
    if outcome.call.rpc == "GenerateStream":
        return [*_broken_in_stream(outcome.parts), *_broken_in_answer(outcome.request, _joined(outcome.parts))]
    if isinstance(outcome.request, pb.GenerateRequest):
        return [*_broken_in_answer(outcome.request, outcome.parts[0])]
    return []


def _broken_in_error(outcome: Outcome) -> Iterator[str]:
    if outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        if outcome.call.timeout not in (outcome.call.hurry,):
            yield "was not answered in time"
        return
    if outcome.code not in REASONS:
        yield f"{outcome.code.name} is no answer to a request"
    if outcome.metadata > HEADERS:
        yield f"its status takes {outcome.metadata} bytes of headers"
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
            yield f"{violation.field!r} is no field of it, but in violation"


def _broken_in_stream(parts: Sequence[pb.GenerateStreamResponse]) -> Iterator[str]:
    told = [part for part in parts if len(part.ListFields()) > len(("request_id", "model"))]  # without heartbeats
    if not told or not told[0].HasField("usage") or not told[-1].HasField("usage") or told[0].choices:
        yield "its first message or its last is not as it should be"
    if len({(part.request_id, part.model) for part in parts}) != 1:
        yield "its messages have several names"
    finished = [piece.index for part in parts for piece in part.choices if piece.finish_reason]
    if len(finished) != len(set(finished)):
        yield "a choice has finished twice"


def _joined(parts: Sequence[pb.GenerateStreamResponse]) -> pb.GenerateResponse:
    """The answer that a stream's messages add up to."""
    answer, choices = pb.GenerateResponse(), dict[int, pb.Choice]()
    for part in parts:
        beside = pb.GenerateStreamResponse()
        beside.CopyFrom(part)
        for field in ("choices", "progress", "flat_prompt_logprobs"):
            beside.ClearField(field)
        answer.MergeFromString(beside.SerializeToString())  # the same fields
        answer.usage.CopyFrom(part.usage if part.HasField("usage") else answer.usage)
        _append_flat(answer.flat_prompt_logprobs, part.flat_prompt_logprobs)
        for piece in part.choices:
            _append(choices.setdefault(piece.index, pb.Choice()), piece)
    answer.choices.extend(choices[index] for index in sorted(choices))
    answer.request_id, answer.model = parts[0].request_id, parts[0].model
    return answer


def _append(choice: pb.Choice, piece: pb.Choice) -> None:
    text, flat = choice.text + piece.text, pb.FlatLogprobs()
    flat.CopyFrom(choice.flat_logprobs)
    _append_flat(flat, piece.flat_logprobs)
    choice.MergeFrom(piece)
    choice.text = text
    choice.flat_logprobs.CopyFrom(flat)


def _append_flat(flat: pb.FlatLogprobs, piece: pb.FlatLogprobs) -> None:
    flat.starts.extend(len(flat.token_ids) + start for start in piece.starts)
    flat.token_ids.extend(piece.token_ids)
    flat.logprobs.extend(piece.logprobs)
    flat.ranks.extend(piece.ranks)


def _broken_in_answer(request: pb.GenerateRequest, answer: pb.GenerateResponse) -> Iterator[str]:
    if answer.request_id != (request.request_id or answer.request_id) or not answer.request_id:
        yield f"its name is {answer.request_id!r}"
    if answer.model != (request.model or MODEL):
        yield f"its model is {answer.model!r}"
    n, found = (request.n if request.HasField("n") else 1), [choice.index for choice in answer.choices]
    if found != list(range(n)) and not (request.use_beam_search and found == list(range(len(found) or 1))):
        yield f"its choices are {found}, not {n}"
    yield from _broken_in_usage(request, answer)
    yield from _broken_in_seed(request, answer)
    yield from _broken_in_prompt_logprobs(request, answer)
    for choice in answer.choices:
        yield from _broken_in_choice(request, choice, answer.usage.prompt_tokens)
        yield from _broken_in_text(request, choice)
        yield from _broken_in_logprobs(request, choice)


def _broken_in_usage(request: pb.GenerateRequest, answer: pb.GenerateResponse) -> Iterator[str]:
    usage, returned = answer.usage, sum(len(choice.token_ids) for choice in answer.choices)
    if not 0 < usage.prompt_tokens < CONTEXT or usage.cached_tokens > usage.prompt_tokens:
        yield f"its usage is {usage}"
    if usage.completion_tokens < returned or (not request.best_of and usage.completion_tokens != returned):
        yield f"{usage.completion_tokens} tokens were counted, and {returned} returned"
    if len(answer.prompt_token_ids) != (usage.prompt_tokens if request.return_prompt_token_ids else 0):
        yield f"it has {len(answer.prompt_token_ids)} of {usage.prompt_tokens} prompt token ids"


def _broken_in_seed(request: pb.GenerateRequest, answer: pb.GenerateResponse) -> Iterator[str]:
    asked = {field: getattr(request, field) for field in ("temperature", "top_p", "top_k") if request.HasField(field)}
    certain = (
        request.use_beam_search or (asked.get("temperature"), asked.get("top_p"), asked.get("top_k")) in _Certain()
    )
    if answer.HasField("seed") == certain or (request.HasField("seed") and not certain and answer.seed != request.seed):
        yield f"its seed is {answer.seed}, while {'nothing' if certain else 'something'} was left to chance"


class _Certain:
    """Temperature, `top_p` and `top_k` that leave nothing to chance."""

    def __contains__(self, asked: tuple[float | None, float | None, int | None]) -> bool:
        return asked[0] == 0 or asked[1] == 0 or asked[2] == 1


def _broken_in_choice(request: pb.GenerateRequest, choice: pb.Choice, prompt_tokens: int) -> Iterator[str]:
    most = min(request.max_tokens if request.HasField("max_tokens") else 16, CONTEXT - prompt_tokens)
    ids, reason = list(choice.token_ids), choice.finish_reason
    is_cut = reason == pb.FINISH_REASON_DEADLINE
    if reason not in pb.FinishReason.values()[1:] or (is_cut and not request.partial_on_deadline):
        yield f"its finish reason is {reason}"
    if reason == pb.FINISH_REASON_REPETITION and not request.HasField("repetition_detection"):
        yield "it was ended for a repetition"
    if not is_cut <= len(ids) <= most and not (is_cut and not ids):
        yield f"it has {len(ids)} tokens of at most {most}"
    if reason == pb.FINISH_REASON_LENGTH and len(ids) != most:
        yield f"it ended for its length at {len(ids)} of {most}"
    if reason == pb.FINISH_REASON_STOP and len(ids) < request.min_tokens:
        yield f"it has {len(ids)} tokens of at least {request.min_tokens}"
    if (reason == pb.FINISH_REASON_STOP) != (choice.WhichOneof("stopped_by") is not None):
        yield f"finish reason {reason}, stopped by {choice.WhichOneof('stopped_by')}"
    if choice.HasField("stop_token_id") and choice.stop_token_id != ids[-1]:
        yield f"it was stopped by {choice.stop_token_id} and ended with {ids[-1]}"
    if choice.HasField("stop_string") and choice.stop_string not in request.stop:
        yield f"it was stopped by {choice.stop_string!r}"
    yield from _broken_in_ids(request, ids)


def _broken_in_ids(request: pb.GenerateRequest, ids: Sequence[int]) -> Iterator[str]:
    if strange := [i for i in ids if i >= TOKENS]:
        yield f"{strange} are no tokens"
    if request.allowed_token_ids and (strange := sorted(set(ids) - set(request.allowed_token_ids))):
        yield f"{strange} were not allowed"
    ends = {*request.stop_token_ids, *(() if request.ignore_eos else (END,))}
    if late := ends.intersection(ids[:-1]):
        yield f"{late} did not end it"


def _broken_in_text(request: pb.GenerateRequest, choice: pb.Choice) -> Iterator[str]:
    if request.echo or request.min_tokens:  # before so many, a stop string is text like any other
        return
    kept = choice.stop_string if request.include_stop_str_in_output else ""
    if kept and not choice.text.endswith(kept):
        yield f"its text does not end with {kept!r}"
    text = choice.text.removesuffix(kept)
    if stops := [stop for stop in request.stop if stop in text]:
        yield f"its text has {stops}"


def _broken_in_logprobs(request: pb.GenerateRequest, choice: pb.Choice) -> Iterator[str]:
    wanted = list(request.logprob_token_ids)
    asked = bool(wanted) or request.HasField("logprobs")
    positions = _positions(choice.logprobs, choice.flat_logprobs, request.flat_logprobs)
    if [ids[0] for ids, _ in positions] != (list(choice.token_ids) if asked else []):
        yield f"its log-probabilities are of {[ids[:1] for ids, _ in positions]}"
    for ids, logprobs in positions:
        if wanted and ids[1:] != wanted:
            yield f"{ids[1:]} are beside a token, not {wanted}"
        if len(ids) != 1 + (len(wanted) or request.logprobs) or not all(value <= 0 for value in logprobs):
            yield f"a token has {list(zip(ids, logprobs, strict=True))}"
    if asked and choice.token_ids and not choice.HasField("cumulative_logprob"):
        yield "it has no sum of log-probabilities"


def _broken_in_prompt_logprobs(request: pb.GenerateRequest, answer: pb.GenerateResponse) -> Iterator[str]:
    positions = _positions(answer.prompt_logprobs, answer.flat_prompt_logprobs, request.flat_logprobs)
    asked = request.HasField("prompt_logprobs")
    is_cut = any(choice.finish_reason == pb.FINISH_REASON_DEADLINE for choice in answer.choices)
    if len(positions) != (answer.usage.prompt_tokens if asked else 0) and not (is_cut and not positions):
        yield f"{len(positions)} of {answer.usage.prompt_tokens} prompt tokens have log-probabilities"
    if positions and answer.prompt_token_ids and [ids[0] for ids, _ in positions] != list(answer.prompt_token_ids):
        yield "the prompt's log-probabilities are not of its tokens"
    for index, (ids, logprobs) in enumerate(positions):
        beside = request.prompt_logprobs if index else 0
        if len(ids) != 1 + beside or not all(value <= 0 for value in logprobs):
            yield f"prompt token {index} has {list(zip(ids, logprobs, strict=True))}"


def _positions(nested: Any, flat: pb.FlatLogprobs, is_flat: bool) -> list[tuple[list[int], list[float]]]:
    """For each position the ids of the token and of those beside it, and their log-probabilities."""
    if not is_flat:
        assert not flat.starts
        return [([p.token_id, *(t.token_id for t in p.top)], [p.logprob, *(t.logprob for t in p.top)]) for p in nested]
    assert not nested
    assert len(flat.token_ids) == len(flat.logprobs) == len(flat.ranks)
    bounds = [*flat.starts, len(flat.token_ids)]
    stretches = [slice(start, end) for start, end in pairwise(bounds)]
    return [(list(flat.token_ids[stretch]), list(flat.logprobs[stretch])) for stretch in stretches]
