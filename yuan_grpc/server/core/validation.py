"""Validation of requests. All violations of a generate request are reported together."""

from collections.abc import Iterator, Sequence
from typing import NoReturn

from yuan_grpc.request.fields import BY_NAME, FIELDS, MAX_CHOICES, Field
from yuan_grpc.server.core.constraints import constraint_violations
from yuan_grpc.server.core.convert import ParsedRequest, early_stopping, heartbeat_seconds, is_prompt_only
from yuan_grpc.server.core.limits import MAX_MESSAGES, MAX_REQUEST_ID, MAX_TOKENIZE
from yuan_grpc.server.core.violations import count_violations, string_violations, violation
from yuan_grpc.server.engine.model_names import resolve_lora
from yuan_grpc.server.engine.types import ModelInfo
from yuan_grpc.server.errors import InvalidRequestError, NotEnabledError, Violation
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_SUPPRESSED_IDS = 128
"""Capacity in the V2 runner for tokens suppressed until `min_tokens`: stop tokens and end-of-text tokens."""
MAX_TOTAL_LOGPROBS = 2**20
"""Log-probabilities over all tokens of a request: about 30 MB of response, and 300 MB of memory to build it."""
MAX_PATTERN_SIZE = 1024
"""Largest `max_pattern_size` of `repetition_detection`, in tokens, and largest `min_count`."""
MIN_HEARTBEAT, MAX_HEARTBEAT = 0.1, 3600
"""Range of `heartbeat_interval`, in seconds."""
ROLES = ("system", "user", "assistant")
"""Accepted roles of messages."""


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


def prompt_size(request: pb.GenerateRequest | pb.TokenizeRequest) -> int:
    """Return the length of the text to tokenize, in characters."""
    return len(request.prompt) + sum(len(message.content) for message in request.messages)


def validate_prompt_size(request: pb.GenerateRequest, info: ModelInfo) -> None:
    """Check the size of a prompt before it is tokenized.

    Raises:
        InvalidRequestError: there are too many messages, or the text or the token ids exceed the model's context.
    """
    may_truncate, limit = request.truncate_prompt_tokens != 0, info.max_model_len * info.max_token_characters
    if violations := [*count_violations("messages", request.messages, MAX_MESSAGES, "turns")]:
        raise InvalidRequestError(violations)
    if (tokens := len(request.prompt_token_ids.ids)) >= info.max_model_len and not may_truncate:
        raise InvalidRequestError([_context_violation("prompt_token_ids", tokens, info)])
    if may_truncate:  # the last tokens of a text depend on all text before them, so it is tokenized whole
        limit = max(limit, MAX_TOKENIZE)
    if info.max_token_characters and (length := prompt_size(request)) > limit:
        field = "messages" if request.messages else "prompt"
        rule = f"be at most {limit} characters long (the model's context is {info.max_model_len} tokens)"
        raise InvalidRequestError([violation(field, rule, length)])


def validate_messages(messages: Sequence[pb.Message]) -> None:
    """Raise InvalidRequestError unless the messages form a conversation."""
    if violations := list(_message_violations(messages)):
        raise InvalidRequestError(violations)


def validate_detokenize(request: pb.DetokenizeRequest, info: ModelInfo) -> None:
    """Raise InvalidRequestError if there are too many token ids, or an unknown one."""
    violations = [*count_violations("token_ids", request.token_ids, MAX_TOKENIZE, "ids")]
    if violations := violations or [*_id_range_violations("token_ids", request.token_ids, info)]:
        raise InvalidRequestError(violations)


def validate_tokenize(request: pb.TokenizeRequest) -> None:
    """Raise InvalidRequestError unless there is exactly one text or conversation, of limited length."""
    if request.HasField("prompt") == bool(request.messages):
        reject("prompt", "exactly one of `prompt` and `messages` must be given")
    if violations := [*count_violations("messages", request.messages, MAX_MESSAGES, "turns")]:
        raise InvalidRequestError(violations)
    if (length := prompt_size(request)) > MAX_TOKENIZE:
        reject("prompt", f"the text to tokenize must be at most {MAX_TOKENIZE} characters long, not {length}")


def validate_abort(request: pb.AbortRequest) -> None:
    """Raise InvalidRequestError if the request id is empty."""
    if not request.request_id:
        reject("request_id", "`request_id` must not be empty")


def reject(field: str, description: str) -> NoReturn:
    """Raise InvalidRequestError with one violation."""
    raise InvalidRequestError([Violation(field, description)])


_RANGES = tuple(field for field in FIELDS if field.has_range and not field.is_list)
_MODEL_LIMITED_FIELDS = ("logprobs", "prompt_logprobs")
"""Numbers that the model's `max_logprobs` limits."""
_TEXT_LISTS = tuple(field for field in FIELDS if field.is_list and field.type is str)
_ID_LISTS = tuple(field for field in FIELDS if field.is_list and field.type is not str)
"""Lists of token ids, and the map from token ids to biases."""


def _request_id_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request_id = parsed.request.request_id
    if len(request_id) > MAX_REQUEST_ID:
        yield violation("request_id", f"be at most {MAX_REQUEST_ID} characters long", len(request_id))
    elif not request_id.isprintable():
        yield violation("request_id", "have only printable characters", repr(request_id))


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
        yield _context_violation(field, len(prompt), info)
    elif field == "prompt_token_ids":
        yield from _id_range_violations("prompt_token_ids.ids", prompt, info)


def _context_violation(field: str, tokens: int, info: ModelInfo) -> Violation:
    rule = f"be at most {info.max_model_len - 1} tokens long (the model's context is {info.max_model_len})"
    return violation(field, rule, tokens)


def _message_violations(messages: Sequence[pb.Message]) -> Iterator[Violation]:
    if violations := [*count_violations("messages", messages, MAX_MESSAGES, "turns")]:
        yield from violations
        return
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            yield violation(f"messages[{index}].role", f"be one of {', '.join(ROLES)}", repr(message.role))
        if not message.content:
            yield Violation(f"messages[{index}].content", f"`messages[{index}].content` must not be empty")
    if messages and messages[-1].role in ROLES and messages[-1].role != "user":
        yield violation(f"messages[{len(messages) - 1}].role", "be user in the last turn", messages[-1].role)


def _number_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request = parsed.request
    model_ranges = (Field(name, int, 0, info.max_logprobs) for name in _MODEL_LIMITED_FIELDS)
    for field in (*_RANGES, *model_ranges):
        if request.HasField(field.name) and not field.allows(value := getattr(request, field.name)):
            yield violation(field.name, field.rule, value)
    yield from _token_count_violations(parsed, info)
    heartbeat = Field("heartbeat_interval", float, MIN_HEARTBEAT, MAX_HEARTBEAT)
    if (seconds := heartbeat_seconds(request)) is not None and not heartbeat.allows(seconds):
        yield violation(heartbeat.name, f"{heartbeat.rule} seconds", seconds)
    if request.HasField("repetition_detection"):
        yield from _repetition_violations(request.repetition_detection)
    if request.truncation_side not in pb.TruncationSide.values():
        yield violation("truncation_side", "be 0 (default), 1 (left) or 2 (right)", request.truncation_side)


def _token_count_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request, max_tokens = parsed.request, parsed.sampling.max_tokens
    if request.truncate_prompt_tokens == -1 and max_tokens >= info.max_model_len:
        rule = f"be below {info.max_model_len}, the model's context, with `truncate_prompt_tokens` -1"
        yield violation("max_tokens", rule, max_tokens)
    if is_prompt_only(request) and not (request.echo or request.HasField("prompt_logprobs")):
        yield violation("max_tokens", "be at least 1 without `echo` or `prompt_logprobs`", 0)
    remaining = info.max_model_len - len(parsed.prompt)
    if request.HasField("min_tokens") and request.min_tokens > max_tokens >= 0:
        yield violation("min_tokens", f"be at most `max_tokens`, {max_tokens}", request.min_tokens)
    elif parsed.prompt and 0 < remaining < min(request.min_tokens, max_tokens):
        yield violation("min_tokens", f"be at most {remaining}, the context that the prompt leaves", request.min_tokens)


def _size_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    """Yield the violations of limits on products of fields; each field alone is within its range."""
    request, limit = parsed.request, info.max_num_queued_reqs
    if limit is not None and limit < parsed.sequences <= MAX_CHOICES:
        field = "best_of" if request.HasField("best_of") else "n"
        rule = f"be at most {limit}, the number of choices the server accepts at a time"
        yield violation(field, rule, parsed.sequences)
    if (top_logprobs := parsed.top_logprobs) is None:
        return
    tokens = max(0, min(parsed.sampling.max_tokens, info.max_model_len - len(parsed.prompt)))
    logprobs = min(parsed.best_of, MAX_CHOICES) * tokens * (1 + min(top_logprobs, info.max_logprobs))
    if logprobs > MAX_TOTAL_LOGPROBS:
        field = "logprobs" if request.HasField("logprobs") else "logprob_token_ids"
        product = f"choices × `max_tokens` × (`{field}` + 1)"
        yield Violation(field, f"{product} must be at most {MAX_TOTAL_LOGPROBS}, not {logprobs}")


def _repetition_violations(detection: pb.RepetitionDetection) -> Iterator[Violation]:
    fields = (
        Field("max_pattern_size", int, 1, MAX_PATTERN_SIZE),
        Field("min_pattern_size", int, 0, detection.max_pattern_size),
        Field("min_count", int, 2, MAX_PATTERN_SIZE),
    )
    for field in fields:
        if not field.allows(value := getattr(detection, field.name)):
            yield violation(f"repetition_detection.{field.name}", field.rule, value)


def _text_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request = parsed.request
    for field in _TEXT_LISTS:
        yield from string_violations(field.name, getattr(request, field.name), field.max_items, field.max_length)
    if blank := [index for index, word in enumerate(request.bad_words) if word.isspace()]:
        yield Violation(f"bad_words[{blank[0]}]", f"`bad_words[{blank[0]}]` must not be only white space")
    if len(request.cache_salt) > (limit := BY_NAME["cache_salt"].max_length):
        yield violation("cache_salt", f"be at most {limit} characters long", len(request.cache_salt))


def _id_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request = parsed.request
    for field in _ID_LISTS:
        limit, noun, ids = field.max_items, "ids", list(getattr(request, field.name))
        if field.name == "stop_token_ids" and request.min_tokens:
            limit, noun = MAX_SUPPRESSED_IDS - len(info.end_token_ids), "ids with `min_tokens`"
        violations = [*count_violations(field.name, ids, limit, noun)]
        yield from violations or _id_range_violations(field.name, ids, info)
    bias_range = BY_NAME["logit_bias"]
    for token_id, bias in request.logit_bias.items():
        if not bias_range.allows(bias):
            yield violation(f"logit_bias[{token_id}]", bias_range.rule, bias)
            break
    count = len(request.logprob_token_ids)
    if count and request.HasField("logprobs") and request.logprobs != count:
        yield violation("logprobs", f"be absent or {count}, the number of `logprob_token_ids`", request.logprobs)


def _id_range_violations(field: str, ids: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    """Yield only the first violation: there may be thousands, too many for a gRPC status."""
    for index, token_id in enumerate(ids):
        if token_id >= info.vocab_size:
            yield violation(f"{field}[{index}]", f"be below {info.vocab_size}, the vocabulary size", token_id)
            return


def _search_violations(parsed: ParsedRequest, info: ModelInfo) -> Iterator[Violation]:
    request, n, best_of, stopping = parsed.request, parsed.sampling.n, parsed.best_of, early_stopping(parsed.request)
    if 1 <= best_of < n:  # a `best_of` below 1 is reported already
        yield violation("best_of", f"be at least `n`, {n}", best_of)
    if stopping is None:  # the value is invalid
        yield Violation("early_stopping", '`early_stopping` must be true, false or "never"')
    if request.use_beam_search:
        yield from _beam_violations(request, best_of)
        return
    if stopping in (True, "never"):
        yield Violation("early_stopping", "`early_stopping` must be false without `use_beam_search`")
    if request.HasField("length_penalty") and request.length_penalty != 1:
        yield violation("length_penalty", "be 1 without `use_beam_search`", request.length_penalty)
    if best_of > n >= 1 and parsed.sampling.is_greedy:
        yield violation("best_of", f"be `n`, {n}, with greedy sampling", best_of)


def _beam_violations(request: pb.GenerateRequest, width: int) -> Iterator[Violation]:
    if width < 2:
        yield violation("best_of", "be at least 2 with `use_beam_search`", width)
    given = {descriptor.name: value for descriptor, value in request.ListFields()}
    for field in FIELDS:
        if field.name not in given or field.beam_search is None or given[field.name] in field.beam_search:
            continue
        if field.beam_search:
            rule = f"be absent or {field.beam_search[-1]} with `use_beam_search`"
            yield violation(field.name, rule, given[field.name])
        else:
            yield Violation(field.name, f"`{field.name}` must not be given with `use_beam_search`")


_CHECKS = (
    _request_id_violations,
    _prompt_violations,
    _number_violations,
    _text_violations,
    _id_violations,
    constraint_violations,
    _search_violations,
    _size_violations,
)
