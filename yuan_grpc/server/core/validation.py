"""Validation of requests. All violations of a generate request are reported together."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from yuan_grpc.server.core.convert import ParsedRequest, early_stopping, heartbeat_seconds
from yuan_grpc.server.core.limits import MAX_CHOICES, MAX_MESSAGES, MAX_REQUEST_ID
from yuan_grpc.server.engine.model_names import resolve_lora
from yuan_grpc.server.engine.types import ModelInfo
from yuan_grpc.server.errors import InvalidRequestError, NotEnabledError, Violation
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_SEED = 2**63 - 1 - MAX_CHOICES
"""Largest seed: vLLM adds a choice's index and keeps the sum in a signed 64-bit integer; it reads -1 as no seed."""
MAX_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_IDS = 1024
"""Capacity in vLLM's V2 model runner for `logit_bias`, and for `allowed_token_ids`."""
MAX_SUPPRESSED_IDS = 128
"""Capacity in the V2 runner for tokens suppressed until `min_tokens`: stop tokens and end-of-text tokens."""
MAX_LOGPROB_IDS = 128
MAX_TOTAL_LOGPROBS = 2**20
"""Log-probabilities over all tokens of a request: about 30 MB of response, and 300 MB of memory to build it."""
MAX_BAD_WORD_LENGTH = 256
MAX_CACHE_SALT_LENGTH = 1024
MAX_CHOICE_TEXTS = 1024
MAX_CONSTRAINT_BYTES = 32_768
"""Size of all texts in a constraint. Much larger ones take minutes to compile; deep nesting crashes the compiler."""
MAX_PATTERN_SIZE = 1024
MIN_HEARTBEAT = 0.1
MAX_HEARTBEAT = 3600
MAX_TOKENIZE = 2**17
"""Characters, or ids: more than any model's context, in a response of a few megabytes."""
MAX_REPETITIONS = 2000
"""Sum of the `{m,n}` counts in a constraint. Tens of thousands take minutes to compile, without a timeout."""
ROLES = ("system", "user", "assistant")


def validate_generate(parsed: ParsedRequest, info: ModelInfo, loras: Sequence[str]) -> None:
    """Check a parsed request against the served model.

    Args:
        loras: the names of the loaded adapters.

    Raises:
        InvalidRequestError: with a violation for each invalid field.
        ModelNotFoundError: neither the served model nor a loaded adapter has the name in `model`.
        NotEnabledError: the server was started without an option that the request needs.
    """
    violations = [violation for check in _CHECKS for violation in check(parsed, info)]
    if violations:
        raise InvalidRequestError(violations)
    resolve_lora(parsed.request.model, info.name, loras)
    if parsed.request.priority and not info.priority_scheduling:
        raise NotEnabledError("`priority` needs a server that was started with --scheduling-policy priority")


def validate_messages(messages: Sequence[pb.Message]) -> None:
    """Raise InvalidRequestError unless the messages form a conversation."""
    if violations := list(_message_violations(messages)):
        raise InvalidRequestError(violations)


def validate_detokenize(request: pb.DetokenizeRequest, info: ModelInfo) -> None:
    """Raise InvalidRequestError if there are too many token ids, or an unknown one."""
    violations = [*_count_violations("token_ids", request.token_ids, MAX_TOKENIZE, "ids")]
    if violations := violations or [*_id_range_violations("token_ids", request.token_ids, info)]:
        raise InvalidRequestError(violations)


def validate_tokenize(request: pb.TokenizeRequest) -> None:
    """Raise InvalidRequestError unless there is exactly one text or conversation, of limited length."""
    if request.HasField("prompt") == bool(request.messages):
        reject("prompt", "exactly one of `prompt` and `messages` must be given")
    length = len(request.prompt) + sum(len(message.content) for message in request.messages)
    if length > MAX_TOKENIZE:
        reject("prompt", f"the text to tokenize must be at most {MAX_TOKENIZE} characters long, not {length}")


def validate_abort(request: pb.AbortRequest) -> None:
    """Raise InvalidRequestError if the request id is empty."""
    if not request.request_id:
        reject("request_id", "`request_id` must not be empty")


def reject(field: str, description: str) -> NoReturn:
    """Raise InvalidRequestError with one violation."""
    raise InvalidRequestError([Violation(field, description)])


def _violation(field: str, rule: str, value: object) -> Violation:
    return Violation(field, f"`{field}` must {rule}, not {value}")


@dataclass(frozen=True)
class _Rule:
    """A rule for a number, and its wording after "must"."""

    field: str
    text: str
    accepts: Callable[[float], bool]


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
_MODEL_LIMITED_FIELDS = ("logprobs", "prompt_logprobs")
"""Numbers that the model's `max_logprobs` limits."""


def _request_id_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request_id = parsed.request.request_id
    if len(request_id) > MAX_REQUEST_ID:
        yield _violation("request_id", f"be at most {MAX_REQUEST_ID} characters long", len(request_id))
    elif not request_id.isprintable():
        yield _violation("request_id", "have only printable characters", repr(request_id))


def _prompt_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request, prompt = parsed.request, parsed.prompt
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
        rule = f"be at most {info.max_model_len - 1} tokens long (the model's context is {info.max_model_len})"
        yield _violation(field, rule, len(prompt))
    elif field == "prompt_token_ids":
        yield from _id_range_violations("prompt_token_ids.ids", prompt, info)


def _message_violations(messages: Sequence[pb.Message]) -> Iterator[Violation]:
    if violations := [*_count_violations("messages", messages, MAX_MESSAGES, "turns")]:
        yield from violations
        return
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            yield _violation(f"messages[{index}].role", f"be one of {', '.join(ROLES)}", repr(message.role))
        if not message.content:
            yield Violation(f"messages[{index}].content", f"`messages[{index}].content` must not be empty")
    if messages and messages[-1].role in ROLES and messages[-1].role != "user":
        yield _violation(f"messages[{len(messages) - 1}].role", "be user in the last turn", messages[-1].role)


def _number_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request = parsed.request
    model_rules = (_between(field, 0, info.max_logprobs) for field in _MODEL_LIMITED_FIELDS)
    for rule in (*_RULES, *model_rules):
        if request.HasField(rule.field) and not rule.accepts(value := getattr(request, rule.field)):
            yield _violation(rule.field, rule.text, value)
    yield from _token_count_violations(parsed, info)
    heartbeat = _between("heartbeat_interval", MIN_HEARTBEAT, MAX_HEARTBEAT)
    if (seconds := heartbeat_seconds(request)) is not None and not heartbeat.accepts(seconds):
        yield _violation(heartbeat.field, f"{heartbeat.text} seconds", seconds)
    if request.HasField("repetition_detection"):
        yield from _repetition_violations(request.repetition_detection)
    if request.truncation_side not in pb.TruncationSide.values():
        yield _violation("truncation_side", "be a known side", request.truncation_side)


def _token_count_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request, max_tokens = parsed.request, parsed.sampling.max_tokens
    if request.truncate_prompt_tokens == -1 and max_tokens >= info.max_model_len:
        rule = f"be below {info.max_model_len}, the model's context, with `truncate_prompt_tokens` -1"
        yield _violation("max_tokens", rule, max_tokens)
    remaining = info.max_model_len - len(parsed.prompt)
    if request.HasField("min_tokens") and request.min_tokens > max_tokens >= 1:
        yield _violation("min_tokens", f"be at most `max_tokens`, {max_tokens}", request.min_tokens)
    elif parsed.prompt and 0 < remaining < min(request.min_tokens, max_tokens):
        yield _violation(
            "min_tokens", f"be at most {remaining}, the context that the prompt leaves", request.min_tokens
        )


def _size_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    """Yield the violations of limits on products of fields, each of which is within its own range."""
    request, limit = parsed.request, info.max_num_queued_reqs
    if limit is not None and limit < parsed.sequences <= MAX_CHOICES:
        field = "best_of" if request.HasField("best_of") else "n"
        rule = f"be at most {limit}, the number of choices the server accepts at a time"
        yield _violation(field, rule, parsed.sequences)
    if (top_logprobs := parsed.top_logprobs) is None:
        return
    tokens = max(0, min(parsed.sampling.max_tokens, info.max_model_len - len(parsed.prompt)))
    logprobs = min(parsed.best_of, MAX_CHOICES) * tokens * (1 + min(top_logprobs, info.max_logprobs))
    if logprobs > MAX_TOTAL_LOGPROBS:
        field = "logprobs" if request.HasField("logprobs") else "logprob_token_ids"
        rule = f"keep choices × `max_tokens` × (`{field}` + 1) at most {MAX_TOTAL_LOGPROBS}"
        yield _violation(field, rule, logprobs)


def _repetition_violations(detection: pb.RepetitionDetection) -> Iterator[Violation]:
    rules = (
        _between("max_pattern_size", 1, MAX_PATTERN_SIZE),
        _between("min_pattern_size", 0, detection.max_pattern_size),
        _between("min_count", 2, MAX_PATTERN_SIZE),
    )
    for rule in rules:
        if not rule.accepts(value := getattr(detection, rule.field)):
            yield _violation(f"repetition_detection.{rule.field}", rule.text, value)


def _text_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request = parsed.request
    yield from _string_violations("stop", request.stop, MAX_STRINGS, MAX_STOP_LENGTH)
    yield from _string_violations("bad_words", request.bad_words, MAX_STRINGS, MAX_BAD_WORD_LENGTH)
    if blank := [index for index, word in enumerate(request.bad_words) if word.isspace()]:
        yield Violation(f"bad_words[{blank[0]}]", f"`bad_words[{blank[0]}]` must not be only white space")
    if len(request.cache_salt) > MAX_CACHE_SALT_LENGTH:
        yield _violation("cache_salt", f"be at most {MAX_CACHE_SALT_LENGTH} characters long", len(request.cache_salt))


def _string_violations(field: str, texts: Sequence[str], max_count: int, max_length: int) -> Iterator[Violation]:
    """Yield the first violation only: there may be thousands, and a status must stay small."""
    if violations := [*_count_violations(field, texts, max_count, "strings")]:
        yield from violations
        return
    for index, text in enumerate(texts):
        if not 1 <= len(text) <= max_length:
            yield _violation(f"{field}[{index}]", f"be 1 to {max_length} characters long", len(text))
            return


def _count_violations(field: str, values: Sequence[object], limit: int, noun: str) -> Iterator[Violation]:
    if len(values) > limit:
        yield _violation(field, f"have at most {limit} {noun}", len(values))


def _id_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request = parsed.request
    limits = {
        "stop_token_ids": MAX_SUPPRESSED_IDS - len(info.end_token_ids) if request.min_tokens else MAX_IDS,
        "allowed_token_ids": MAX_IDS,
        "logprob_token_ids": MAX_LOGPROB_IDS,
        "logit_bias": MAX_IDS,
    }
    for field, limit in limits.items():
        ids = list(getattr(request, field))
        violations = [*_count_violations(field, ids, limit, "ids")]
        yield from violations or _id_range_violations(field, ids, info)
    for token_id, bias in request.logit_bias.items():
        if not -100 <= bias <= 100:
            yield _violation(f"logit_bias[{token_id}]", "be between -100 and 100", bias)
            break
    count = len(request.logprob_token_ids)
    if count and request.HasField("logprobs") and request.logprobs != count:
        yield _violation("logprobs", f"be absent or {count}, the number of `logprob_token_ids`", request.logprobs)


def _id_range_violations(field: str, ids: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    """Yield the first violation only: there may be thousands, and a status must stay small."""
    for index, token_id in enumerate(ids):
        if token_id >= info.vocab_size:
            yield _violation(f"{field}[{index}]", f"be below {info.vocab_size}, the vocabulary size", token_id)
            return


def _constraint_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request = parsed.request
    if not request.HasField("structured_outputs"):
        return
    outputs, field = request.structured_outputs, "structured_outputs"
    kind = outputs.WhichOneof("constraint")
    if kind is None:
        yield Violation(field, f"`{field}` must have a constraint")
    elif kind == "choice":
        yield from _choice_violations(f"{field}.choice.values", outputs.choice.values)
    elif kind == "json_object":
        if not outputs.json_object:
            yield _violation(f"{field}.json_object", "be true if given", "false")
    else:
        yield from _specification_violations(f"{field}.{kind}", kind, getattr(outputs, kind))
    for other in ("ignore_eos", "min_tokens"):  # either would continue after the constraint is fulfilled
        if getattr(request, other):
            yield Violation(other, f"`{other}` must not be given with `{field}`")


def _choice_violations(field: str, texts: Sequence[str]) -> Iterator[Violation]:
    if not texts:
        yield Violation(field, f"`{field}` must have at least one text")
    yield from _string_violations(field, texts, MAX_CHOICE_TEXTS, MAX_STOP_LENGTH)
    if (size := sum(len(text.encode()) for text in texts)) > MAX_CONSTRAINT_BYTES:
        yield _violation(field, f"be at most {MAX_CONSTRAINT_BYTES} bytes in total", size)


_REPETITION = re.compile(r"\{([0-9]+)(?:,([0-9]*))?\}")


def _specification_violations(field: str, kind: str, text: str) -> Iterator[Violation]:
    if not 1 <= len(text.encode()) <= MAX_CONSTRAINT_BYTES:
        yield _violation(field, f"be 1 to {MAX_CONSTRAINT_BYTES} bytes long", len(text.encode()))
        return
    if kind in ("json", "structural_tag"):  # resolves escapes, which could hide a count
        try:
            text = json.dumps(json.loads(text), ensure_ascii=False)
        except (ValueError, RecursionError):
            yield Violation(field, f"`{field}` must be a JSON document without deep nesting and huge numbers")
            return
    counts = [count for match in _REPETITION.findall("".join(text.split())) for count in match if count]
    is_huge = any(len(count) >= 10 for count in counts)
    if is_huge or sum(map(int, counts)) > MAX_REPETITIONS:
        rule = f"have counted repetitions ({{m,n}}) of at most {MAX_REPETITIONS} in total"
        yield _violation(field, rule, "more" if is_huge else sum(map(int, counts)))


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


def _search_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request, n, best_of, stops_early = parsed.request, parsed.sampling.n, parsed.best_of, early_stopping(parsed.request)
    if 1 <= best_of < n:  # a smaller one has its violation already
        yield _violation("best_of", f"be at least `n`, {n}", best_of)
    if stops_early is None:
        yield Violation("early_stopping", '`early_stopping` must be true, false or "never"')
    if request.use_beam_search:
        yield from _beam_violations(request, best_of)
        return
    if stops_early:
        yield Violation("early_stopping", "`early_stopping` must be false without `use_beam_search`")
    if request.HasField("length_penalty") and request.length_penalty != 1:
        yield _violation("length_penalty", "be 1 without `use_beam_search`", request.length_penalty)
    if best_of > n >= 1 and parsed.sampling.is_greedy:
        yield _violation("best_of", f"be `n`, {n}, with greedy sampling", best_of)


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
    _request_id_violations,
    _prompt_violations,
    _number_violations,
    _text_violations,
    _id_violations,
    _constraint_violations,
    _search_violations,
    _size_violations,
)
