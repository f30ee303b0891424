"""All that is said of bad requests."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from yuan_grpc.server.core.convert import (
    early_stopping_of,
    heartbeat_seconds,
    jobs_of,
    logprobs_beside,
    max_tokens_of,
    num_choices,
    sampling_of,
    width_of,
)
from yuan_grpc.server.core.limits import MAX_CHOICES, MAX_MESSAGES, MAX_REQUEST_ID
from yuan_grpc.server.engine.types import ModelInfo
from yuan_grpc.server.errors import InvalidRequestError, ModelNotFoundError, NotEnabledError, Violation
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_SEED = 2**63 - 1 - MAX_CHOICES
"""vLLM adds a choice's index to the seed and keeps the sum in 64 bits, with a sign; and takes -1 for no seed."""
MAX_TEXTS = 64
MAX_STOP_LENGTH = 1024
MAX_IDS = 1024
"""So many has vLLM's V2 model runner room for, in `logit_bias` and in `allowed_token_ids`."""
MAX_HELD_BACK = 128
"""Tokens that the V2 runner has room for to hold back until `min_tokens`: stop tokens and those that end a text."""
MAX_LOGPROB_IDS = 128
MAX_LOGPROBS_IN_ALL = 2**20
"""Of all tokens that may be generated: some 30 MB of an answer, and 300 of memory while it is made."""
MAX_BAD_WORD = 256
MAX_SALT = 1024
MAX_CHOICE_TEXTS = 1024
MAX_CONSTRAINT = 32_768
"""Bytes, of all its texts. What is much larger takes minutes to compile, and deeply nested crashes the compiler."""
MAX_PATTERN = 1024
MIN_HEARTBEAT = 0.1
MAX_HEARTBEAT = 3600
MAX_TOKENIZE = 2**17
"""Characters, or ids: more than any model's context holds, in an answer of a few megabytes."""
MAX_REPETITIONS = 2000
"""Of `{m,n}` in a constraint, summed up. Tens of thousands take the compiler minutes, which it is not told to spend."""
ROLES = ("system", "user", "assistant")


def validate_generate(
    request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo, loras: Sequence[str]
) -> None:
    """Checks a request and its tokenized, truncated prompt against what is served.

    Raises:
        InvalidRequestError: with a violation for each field that is wrong.
        ModelNotFoundError: nothing of the name in `model` is served.
        NotEnabledError: the server was not started with what the request needs.
    """
    violations = [violation for check in _CHECKS for violation in check(request, prompt, info)]
    if violations:
        raise InvalidRequestError(violations)
    if request.model not in ("", info.name, *loras):
        raise ModelNotFoundError(f"`model` must be {info.name} or a loaded LoRA adapter, not {request.model:.256}")
    if request.priority and not info.priority_scheduling:
        raise NotEnabledError("`priority` needs a server that was started with --scheduling-policy priority")


def validate_messages(messages: Sequence[pb.Message]) -> None:
    """Raises InvalidRequestError where messages are no conversation."""
    if violations := list(_message_violations(messages)):
        raise InvalidRequestError(violations)


def validate_detokenize(request: pb.DetokenizeRequest, info: ModelInfo) -> None:
    """Raises InvalidRequestError where an id is no token's, or there are too many."""
    violations = [*_too_many("token_ids", request.token_ids, MAX_TOKENIZE, "ids")]
    if violations := violations or [*_unknown_ids("token_ids", request.token_ids, info)]:
        raise InvalidRequestError(violations)


def validate_tokenize(request: pb.TokenizeRequest) -> None:
    """Raises InvalidRequestError unless there is one thing to tokenize."""
    if request.HasField("prompt") == bool(request.messages):
        reject("prompt", "exactly one of `prompt` and `messages` must be given")
    length = len(request.prompt) + sum(len(message.content) for message in request.messages)
    if length > MAX_TOKENIZE:
        reject("prompt", f"what is to be tokenized must be at most {MAX_TOKENIZE} characters long, not {length}")


def validate_abort(request: pb.AbortRequest) -> None:
    """Raises InvalidRequestError where no call is named."""
    if not request.request_id:
        reject("request_id", "`request_id` must not be empty")


def reject(field: str, sentence: str) -> NoReturn:
    """Raises InvalidRequestError of one violation."""
    raise InvalidRequestError([Violation(field, sentence)])


def _violation(field: str, rule: str, value: object) -> Violation:
    return Violation(field, f"`{field}` must {rule}, not {value}")


@dataclass(frozen=True)
class _Rule:
    """What must hold of a number, and how to say so."""

    field: str
    text: str
    holds: Callable[[float], bool]


def _between(field: str, low: float, high: float) -> _Rule:
    return _Rule(field, f"be between {low} and {high}", lambda value: low <= value <= high)


def _at_least(field: str, low: float) -> _Rule:
    return _Rule(field, f"be at least {low}", lambda value: value >= low)


_RULES = (
    _between("n", 1, MAX_CHOICES),
    _at_least("max_tokens", 1),
    _at_least("min_tokens", 0),
    _between("temperature", 0, 2),
    _between("top_p", 0, 1),
    _Rule("top_k", "be at least 1, or 0 or -1 for all tokens", lambda value: value >= -1),
    _between("min_p", 0, 1),
    _between("presence_penalty", -2, 2),
    _between("frequency_penalty", -2, 2),
    _between("repetition_penalty", 0.001, 1000),
    _between("seed", 0, MAX_SEED),
    _at_least("stream_interval", 1),
    _between("best_of", 1, MAX_CHOICES),
    _between("length_penalty", -10, 10),
    _Rule("truncate_prompt_tokens", "be at least 1, or -1 for as many as fit", lambda v: v >= 1 or v == -1),
)
_OF_THE_MODEL = ("logprobs", "prompt_logprobs")
"""Numbers whose limit is the model's."""


def _name_violations(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    request_id = request.request_id
    if len(request_id) > MAX_REQUEST_ID:
        yield _violation("request_id", f"be at most {MAX_REQUEST_ID} characters long", len(request_id))
    elif not request_id.isprintable():
        yield _violation("request_id", "have printable characters only", repr(request_id))


def _prompt_violations(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    field = request.WhichOneof("input") or ("messages" if request.messages else None)
    if field is None:
        yield Violation("prompt", "one of `prompt`, `prompt_token_ids` and `messages` must be given")
    elif field != "messages" and request.messages:
        yield Violation("messages", f"`messages` must not be given together with `{field}`")
    elif violations := [*_message_violations(request.messages)]:
        yield from violations
    elif not prompt:
        yield Violation(field, f"`{field}` must not be empty")
    elif len(prompt) >= info.max_model_len:
        rule = f"be at most {info.max_model_len - 1} tokens long, for the model's context is {info.max_model_len}"
        yield _violation(field, rule, len(prompt))
    elif field == "prompt_token_ids":
        yield from _unknown_ids("prompt_token_ids.ids", prompt, info)


def _message_violations(messages: Sequence[pb.Message]) -> Iterator[Violation]:
    if violations := [*_too_many("messages", messages, MAX_MESSAGES, "turns")]:
        yield from violations
        return
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            yield _violation(f"messages[{index}].role", f"be one of {', '.join(ROLES)}", repr(message.role))
        if not message.content:
            yield Violation(f"messages[{index}].content", f"`messages[{index}].content` must not be empty")
    if messages and messages[-1].role in ROLES and messages[-1].role != "user":
        last = len(messages) - 1
        yield _violation(f"messages[{last}].role", "be user, for the last turn is the one to answer", messages[-1].role)


def _number_violations(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    of_the_model = (_between(field, 0, info.max_logprobs) for field in _OF_THE_MODEL)
    for rule in (*_RULES, *of_the_model):
        if request.HasField(rule.field) and not rule.holds(value := getattr(request, rule.field)):
            yield _violation(rule.field, rule.text, value)
    most, left = max_tokens_of(request), info.max_model_len - len(prompt)
    if request.truncate_prompt_tokens == -1 and most >= info.max_model_len:
        text = f"be below the model's context, {info.max_model_len}, where the prompt is to be what else fits"
        yield _violation("max_tokens", text, most)
    if request.HasField("min_tokens") and request.min_tokens > most >= 1:
        yield _violation("min_tokens", f"be at most `max_tokens`, {most}", request.min_tokens)
    elif prompt and 0 < left < min(request.min_tokens, most):
        text = f"be at most {left}, which is what the prompt leaves of the model's context"
        yield _violation("min_tokens", text, request.min_tokens)
    heartbeat = _between("heartbeat_interval", MIN_HEARTBEAT, MAX_HEARTBEAT)
    if (seconds := heartbeat_seconds(request)) is not None and not heartbeat.holds(seconds):
        yield _violation(heartbeat.field, f"{heartbeat.text} seconds", seconds)
    if request.HasField("repetition_detection"):
        yield from _repetition_violations(request.repetition_detection)
    if request.truncation_side not in pb.TruncationSide.values():
        yield _violation("truncation_side", "be a known side", request.truncation_side)


def _size_violations(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    """What is too much in all, though each number is within its range."""
    most = info.max_num_queued_reqs
    if most is not None and most < (jobs := jobs_of(request)) <= MAX_CHOICES:
        field = "best_of" if request.HasField("best_of") else "n"
        yield _violation(field, f"be at most {most}, which is as many choices as the server takes at a time", jobs)
    beside = logprobs_beside(request)
    if beside is None:
        return
    tokens = max(0, min(max_tokens_of(request), info.max_model_len - len(prompt)))
    logprobs = min(width_of(request), MAX_CHOICES) * tokens * (1 + min(beside, info.max_logprobs))
    if logprobs > MAX_LOGPROBS_IN_ALL:
        field = "logprobs" if request.HasField("logprobs") else "logprob_token_ids"
        rule = f"be so few that choices × `max_tokens` × (`{field}` + 1) is at most {MAX_LOGPROBS_IN_ALL}"
        yield _violation(field, rule, logprobs)


def _repetition_violations(detection: pb.RepetitionDetection) -> Iterator[Violation]:
    rules = (
        _between("max_pattern_size", 1, MAX_PATTERN),
        _between("min_pattern_size", 0, detection.max_pattern_size),
        _between("min_count", 2, MAX_PATTERN),
    )
    for rule in rules:
        if not rule.holds(value := getattr(detection, rule.field)):
            yield _violation(f"repetition_detection.{rule.field}", rule.text, value)


def _text_violations(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    yield from _texts("stop", request.stop, MAX_TEXTS, MAX_STOP_LENGTH)
    yield from _texts("bad_words", request.bad_words, MAX_TEXTS, MAX_BAD_WORD)
    if blank := [index for index, word in enumerate(request.bad_words) if word.isspace()]:
        yield Violation(f"bad_words[{blank[0]}]", f"`bad_words[{blank[0]}]` must not be white space alone")
    if len(request.cache_salt) > MAX_SALT:
        yield _violation("cache_salt", f"be at most {MAX_SALT} characters long", len(request.cache_salt))


def _texts(field: str, texts: Sequence[str], most: int, longest: int) -> Iterator[Violation]:
    """The first text that is wrong: who has one wrong may have thousands, and a status must stay small."""
    if violations := [*_too_many(field, texts, most, "strings")]:
        yield from violations
        return
    for index, text in enumerate(texts):
        if not 1 <= len(text) <= longest:
            yield _violation(f"{field}[{index}]", f"be 1 to {longest} characters long", len(text))
            return


def _too_many(field: str, values: Sequence[object], most: int, what: str) -> Iterator[Violation]:
    if len(values) > most:
        yield _violation(field, f"have at most {most} {what}", len(values))


def _id_violations(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    limits = {
        "stop_token_ids": MAX_HELD_BACK - len(info.end_token_ids) if request.min_tokens else MAX_IDS,
        "allowed_token_ids": MAX_IDS,
        "logprob_token_ids": MAX_LOGPROB_IDS,
        "logit_bias": MAX_IDS,
    }
    for field, most in limits.items():
        ids = list(getattr(request, field))
        too_many = [*_too_many(field, ids, most, "ids")]
        yield from too_many or _unknown_ids(field, ids, info)
    for token_id, bias in request.logit_bias.items():
        if not -100 <= bias <= 100:
            yield _violation(f"logit_bias[{token_id}]", "be between -100 and 100", bias)
            break
    asked = len(request.logprob_token_ids)
    if asked and request.HasField("logprobs") and request.logprobs != asked:
        yield _violation("logprobs", f"be absent or {asked}, as many as `logprob_token_ids`", request.logprobs)


def _unknown_ids(field: str, ids: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    """The first id that is no token's: who has one wrong may have thousands, and a status must stay small."""
    for index, token_id in enumerate(ids):
        if token_id >= info.vocab_size:
            yield _violation(f"{field}[{index}]", f"be below {info.vocab_size}, the number of tokens", token_id)
            return


def _constraint_violations(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    if not request.HasField("structured_outputs"):
        return
    outputs, field = request.structured_outputs, "structured_outputs"
    kind = outputs.WhichOneof("constraint")
    if kind is None:
        yield Violation(field, f"`{field}` must have a constraint")
    elif kind == "choice":
        texts = outputs.choice.values
        if not texts:
            yield Violation(f"{field}.choice.values", f"`{field}.choice.values` must have at least one text")
        yield from _texts(f"{field}.choice.values", texts, MAX_CHOICE_TEXTS, MAX_STOP_LENGTH)
        if (size := sum(len(text.encode()) for text in texts)) > MAX_CONSTRAINT:
            yield _violation(f"{field}.choice.values", f"be at most {MAX_CONSTRAINT} bytes in all", size)
    elif kind == "json_object":
        if not outputs.json_object:
            yield _violation(f"{field}.json_object", "be true where it is given", "false")
    else:
        yield from _specification_violations(f"{field}.{kind}", kind, getattr(outputs, kind))
    for other in ("ignore_eos", "min_tokens"):  # either would have text behind what the constraint ends
        if getattr(request, other):
            yield Violation(other, f"`{other}` must not be given with `{field}`")


_REPETITION = re.compile(r"\{([0-9]+)(?:,([0-9]*))?\}")


def _specification_violations(field: str, kind: str, text: str) -> Iterator[Violation]:
    if not 1 <= len(text.encode()) <= MAX_CONSTRAINT:
        yield _violation(field, f"be 1 to {MAX_CONSTRAINT} bytes long", len(text.encode()))
        return
    if kind in ("json", "structural_tag"):  # whose strings may be written with escapes
        try:
            text = json.dumps(json.loads(text), ensure_ascii=False)
        except (ValueError, RecursionError):
            yield Violation(field, f"`{field}` must be a JSON document, not nested too deeply and of no huge numbers")
            return
    numbers = [number for match in _REPETITION.findall("".join(text.split())) for number in match if number]
    is_huge = any(len(number) >= 10 for number in numbers)
    if is_huge or sum(map(int, numbers)) > MAX_REPETITIONS:
        rule = f"have counted repetitions ({{m,n}}) of at most {MAX_REPETITIONS} in all"
        yield _violation(field, rule, "more" if is_huge else sum(map(int, numbers)))


_NEUTRAL_IN_BEAM_SEARCH = {
    "temperature": (0.0,),
    "top_p": (1.0,),
    "top_k": (-1, 0),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
}
_NOT_IN_BEAM_SEARCH = (
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "logprob_token_ids",
    "structured_outputs",
    "repetition_detection",
)


def _search_violations(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    n, best_of, early_stopping = num_choices(request), width_of(request), early_stopping_of(request)
    if 1 <= best_of < n:  # below, it has been said already
        yield _violation("best_of", f"be at least `n`, {n}", best_of)
    if early_stopping is None:
        yield Violation("early_stopping", '`early_stopping` must be true, false or "never"')
    if request.use_beam_search:
        yield from _beam_violations(request, best_of)
        return
    if early_stopping:
        yield Violation("early_stopping", "`early_stopping` must be false without `use_beam_search`")
    if request.HasField("length_penalty") and request.length_penalty != 1:
        yield _violation("length_penalty", "be 1 without `use_beam_search`", request.length_penalty)
    if best_of > n >= 1 and sampling_of(request).is_greedy:
        yield _violation("best_of", f"be `n`, {n}, where the most likely token is always taken", best_of)


def _beam_violations(request: pb.GenerateRequest, width: int) -> Iterator[Violation]:
    if width < 2:
        yield _violation("best_of", "be at least 2 with `use_beam_search`", width)
    for field, neutral in _NEUTRAL_IN_BEAM_SEARCH.items():
        if request.HasField(field) and (value := getattr(request, field)) not in neutral:
            yield _violation(field, f"be absent or {neutral[-1]} with `use_beam_search`", value)
    given = {descriptor.name for descriptor, _ in request.ListFields()}
    for field in _NOT_IN_BEAM_SEARCH:
        if field in given:
            yield Violation(field, f"`{field}` must not be given with `use_beam_search`")


_CHECKS = (
    _name_violations,
    _prompt_violations,
    _number_violations,
    _text_violations,
    _id_violations,
    _constraint_violations,
    _search_violations,
    _size_violations,
)
