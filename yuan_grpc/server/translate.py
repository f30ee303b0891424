"""Messages to plain values and back, without doing anything."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from yuan_grpc.server.errors import InvalidRequestError, Violation
from yuan_grpc.server.generation import FinishReason, ModelInfo, Piece, Position, Sampling, Step
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_REQUEST_ID = 256
MAX_CHOICES = 128
MAX_SEED = 2**63 - 1 - MAX_CHOICES
"""vLLM adds a choice's index to the seed and keeps the sum in 64 bits, with a sign; and takes -1 for no seed."""
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 1024

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def sampling_of(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Sampling:
    """Checks a request and its tokenized prompt against what is served, and says what the engine is to do.

    Raises:
        InvalidRequestError: with a violation for each field that is wrong.
    """
    violations = [*_prompt_violations(request, prompt, info), *_field_violations(request, info)]
    if violations:
        raise InvalidRequestError(violations)
    given = {name: getattr(request, name) for name in _NUMBERS if request.HasField(name)}
    return Sampling(
        **given,
        stop=tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        include_stop_str_in_output=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens if request.HasField("skip_special_tokens") else True,
    )


@dataclass(frozen=True)
class _Rule:
    """What must hold of an optional number, and how to say so."""

    field: str
    text: str
    holds: Callable[[float], bool]


def _between(field: str, low: float, high: float) -> _Rule:
    return _Rule(field, f"be between {low} and {high}", lambda value: low <= value <= high)


_RULES = (
    _between("n", 1, MAX_CHOICES),
    _Rule("max_tokens", "be at least 1", lambda value: value >= 1),
    _between("temperature", 0, 2),
    _between("top_p", 0, 1),
    _Rule("top_k", "be at least 1, or 0 or -1 for all tokens", lambda value: value >= -1),
    _between("min_p", 0, 1),
    _between("presence_penalty", -2, 2),
    _between("frequency_penalty", -2, 2),
    _between("repetition_penalty", 0.001, 1000),
    _between("seed", 0, MAX_SEED),
)
_NUMBERS = (*(rule.field for rule in _RULES), "logprobs")
"""The optional numbers of a request; the limit of the last is the model's."""


def _violation(field: str, rule: str, value: object) -> Violation:
    return Violation(field, f"`{field}` must {rule}, not {value}")


def _field_violations(request: pb.GenerateRequest, info: ModelInfo) -> Iterator[Violation]:
    for rule in (*_RULES, _between("logprobs", 0, info.max_logprobs)):
        if request.HasField(rule.field) and not rule.holds(value := getattr(request, rule.field)):
            yield _violation(rule.field, rule.text, value)
    if len(request.request_id) > MAX_REQUEST_ID:
        yield _violation("request_id", f"be at most {MAX_REQUEST_ID} characters long", len(request.request_id))
    elif not request.request_id.isprintable():
        yield _violation("request_id", "have printable characters only", repr(request.request_id))
    if len(request.stop) > MAX_STOP_STRINGS:
        yield _violation("stop", f"have at most {MAX_STOP_STRINGS} strings", len(request.stop))
    elif wrong := [index for index, stop in enumerate(request.stop) if not 1 <= len(stop) <= MAX_STOP_LENGTH]:
        length = len(request.stop[wrong[0]])
        yield _violation(f"stop[{wrong[0]}]", f"be 1 to {MAX_STOP_LENGTH} characters long", length)
    if len(request.stop_token_ids) > MAX_STOP_TOKENS:
        yield _violation("stop_token_ids", f"have at most {MAX_STOP_TOKENS} ids", len(request.stop_token_ids))
    else:
        yield from _unknown_ids("stop_token_ids", request.stop_token_ids, info)
    if request.use_beam_search:
        yield _violation("use_beam_search", "be false, for this version has no beam search", "true")


def _prompt_violations(request: pb.GenerateRequest, prompt: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    field = request.WhichOneof("input")
    if field is None:
        yield Violation("prompt", "one of `prompt` and `prompt_token_ids` must be given")
    elif not prompt:
        yield Violation(field, f"`{field}` must not be empty")
    elif len(prompt) >= info.context:
        rule = f"be at most {info.context - 1} tokens long, for the model's context is {info.context}"
        yield _violation(field, rule, len(prompt))
    elif field == "prompt_token_ids":
        yield from _unknown_ids("prompt_token_ids.ids", prompt, info)


def _unknown_ids(field: str, ids: Sequence[int], info: ModelInfo) -> Iterator[Violation]:
    """The first id that is no token's: who has one wrong may have thousands, and a status must stay small."""
    for index, token_id in enumerate(ids):
        if token_id >= info.tokens:
            yield _violation(f"{field}[{index}]", f"be below {info.tokens}, the number of tokens", token_id)
            return


class Reply:
    """Builds the responses to one request; counts tokens and remembers what was echoed.

    Args:
        request_id: what the responses call the request.
        model: what they call the model.
        prompt_tokens: how long the prompt is.
        echo: what each choice's text starts with.
    """

    def __init__(self, request_id: str, model: str, prompt_tokens: int, echo: str) -> None:
        self._request_id = request_id
        self._model = model
        self._usage = pb.Usage(prompt_tokens=prompt_tokens)
        self._echo = echo
        self._echoed: set[int] = set()

    def whole(self, step: Step) -> pb.GenerateResponse:
        """The response of Generate, of a step that has all of every choice."""
        choices = sorted((self._choice(piece) for piece in step.pieces), key=lambda choice: choice.index)
        return pb.GenerateResponse(
            request_id=self._request_id, model=self._model, choices=choices, usage=self._count(step)
        )

    def part(self, step: Step) -> pb.GenerateStreamResponse:
        """A response of GenerateStream. Usage comes where a choice finishes."""
        choices = [self._choice(piece) for piece in step.pieces]
        usage = self._count(step)
        finishes = any(piece.finish_reason for piece in step.pieces)
        return pb.GenerateStreamResponse(
            request_id=self._request_id, model=self._model, choices=choices, usage=usage if finishes else None
        )

    def _count(self, step: Step) -> pb.Usage:
        self._usage.completion_tokens += sum(len(piece.token_ids) for piece in step.pieces)
        self._usage.cached_tokens = step.cached_tokens
        return self._usage

    def _choice(self, piece: Piece) -> pb.Choice:
        choice = pb.Choice(
            index=piece.index,
            text=piece.text,
            token_ids=piece.token_ids,
            finish_reason=_FINISH_REASONS[piece.finish_reason],
            logprobs=[_token_logprob(position) for position in piece.positions],
            cumulative_logprob=piece.cumulative_logprob,
        )
        if piece.index not in self._echoed:
            self._echoed.add(piece.index)
            choice.text = self._echo + choice.text
        if isinstance(piece.stopped_by, str):
            choice.stop_string = piece.stopped_by
        elif piece.stopped_by is not None:
            choice.stop_token_id = piece.stopped_by
        return choice


def _token_logprob(position: Position) -> pb.TokenLogprob:
    chosen = position.chosen
    return pb.TokenLogprob(
        token_id=chosen.token_id,
        token=chosen.text,
        logprob=chosen.logprob,
        rank=chosen.rank,
        top=[pb.TopLogprob(token_id=t.token_id, token=t.text, logprob=t.logprob, rank=t.rank) for t in position.top],
    )
