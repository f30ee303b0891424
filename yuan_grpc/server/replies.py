"""Plain values to messages. Does nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from yuan_grpc.server.checks import MAX_CHOICES
from yuan_grpc.server.generation import (
    INLINE_ENTRIES,
    FinishReason,
    LoraInfo,
    ModelInfo,
    Piece,
    Position,
    Progress,
    RankedToken,
    Step,
)
from yuan_grpc.v1 import yuan_pb2 as pb

MAX_ENTRIES_IN_A_MESSAGE = INLINE_ENTRIES
"""So many tokens and log-probabilities go into a message of a stream: half a megabyte or so, of four that clients take.
"""

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.REPETITION: pb.FINISH_REASON_REPETITION,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}


class Reply:
    """Builds the responses to one request; counts tokens and remembers what was echoed.

    Args:
        request: what is answered.
        model: what the responses call the model.
        prompt: its tokens.
        echo: what each choice's text starts with.
        seed: the one that is sampled with; None where nothing is left to chance.
    """

    def __init__(
        self, request: pb.GenerateRequest, model: str, prompt: Sequence[int], echo: str, seed: int | None
    ) -> None:
        self._request_id = request.request_id
        self._model = model
        self._flat = request.flat_logprobs
        self._usage = pb.Usage(prompt_tokens=len(prompt))
        self._seed = seed
        self._prompt_token_ids = prompt if request.return_prompt_token_ids else ()
        self._echo = echo
        self._echoed: set[int] = set()
        self._wants_prompt = request.HasField("prompt_logprobs")
        self._has_begun = False

    def whole(self, step: Step) -> pb.GenerateResponse:
        """The response of Generate, of a step that has all of every choice."""
        response = pb.GenerateResponse(
            request_id=self._request_id,
            model=self._model,
            choices=[self._choice(piece) for piece in sorted(step.pieces, key=lambda piece: piece.index)],
            usage=self._count(step),
            seed=self._seed,
            prompt_token_ids=self._prompt_token_ids,
        )
        self._add_prompt_logprobs(response, step.prompt_positions)
        return response

    def parts(self, step: Step) -> Iterator[pb.GenerateStreamResponse]:
        """The responses of GenerateStream that a step makes: none, one, or more where one would be too large.

        The first of all waits for the prompt's log-probabilities, where they are asked for. Usage comes with it, and
        where a choice finishes.
        """
        positions = step.prompt_positions
        if not self._has_begun and (positions or step.pieces or not self._wants_prompt):
            yield from self._begin(positions)
        elif positions:
            yield from self._prompt(positions)
        if step.pieces or step.progress:
            yield from self._rest(step)

    def heartbeat(self) -> Iterator[pb.GenerateStreamResponse]:
        """A response of GenerateStream that has nothing new; or the first one, which waits no longer."""
        if self._has_begun:
            yield self._empty()
        else:
            yield from self._begin(())

    def _begin(self, positions: Sequence[Position]) -> Iterator[pb.GenerateStreamResponse]:
        self._has_begun = True
        first, *more = [*self._prompt(positions)] or [self._empty()]
        first.MergeFrom(
            pb.GenerateStreamResponse(usage=self._usage, seed=self._seed, prompt_token_ids=self._prompt_token_ids)
        )
        yield first
        yield from more

    def _prompt(self, positions: Sequence[Position]) -> Iterator[pb.GenerateStreamResponse]:
        beside = max((len(position.top) for position in positions), default=0)
        size = max(1, MAX_ENTRIES_IN_A_MESSAGE // (1 + beside))
        for start in range(0, len(positions), size):
            response = self._empty()
            self._add_prompt_logprobs(response, positions[start : start + size])
            yield response

    def _rest(self, step: Step) -> Iterator[pb.GenerateStreamResponse]:
        usage, progress = self._count(step), step.progress
        for pieces in _portions(step.pieces):
            response = self._empty()
            response.choices.extend([self._choice(piece) for piece in pieces])
            if any(piece.finish_reason for piece in pieces):
                response.usage.CopyFrom(usage)
            if progress:
                response.progress.CopyFrom(_progress(progress))
            yield response

    def _empty(self) -> pb.GenerateStreamResponse:
        return pb.GenerateStreamResponse(request_id=self._request_id, model=self._model)

    def _count(self, step: Step) -> pb.Usage:
        self._usage.completion_tokens += sum(len(piece.token_ids) for piece in step.pieces) + step.discarded_tokens
        self._usage.cached_tokens = step.cached_tokens or self._usage.cached_tokens
        return self._usage

    def _choice(self, piece: Piece) -> pb.Choice:
        choice = pb.Choice(
            index=piece.index,
            text=piece.text,
            token_ids=piece.token_ids,
            finish_reason=_FINISH_REASONS[piece.finish_reason],
            logprobs=() if self._flat else [_token_logprob(position) for position in piece.positions],
            flat_logprobs=_flat_logprobs(piece.positions) if self._flat and piece.positions else None,
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

    def _add_prompt_logprobs(
        self, response: pb.GenerateResponse | pb.GenerateStreamResponse, positions: Sequence[Position]
    ) -> None:
        if self._flat and positions:
            response.flat_prompt_logprobs.CopyFrom(_flat_logprobs(positions))
        elif positions:
            response.prompt_logprobs.extend(map(_token_logprob, positions))


def tokenized(text: str, tokens: Sequence[tuple[int, str, int, int]]) -> pb.TokenizeResponse:
    """The response of Tokenize."""
    return pb.TokenizeResponse(
        tokens=[pb.Token(id=i, piece=piece, start=start, end=end) for i, piece, start, end in tokens],
        count=len(tokens),
        text=text,
    )


def model_response(info: ModelInfo, version: str, loras: Sequence[str]) -> pb.GetModelResponse:
    """The response of GetModel."""
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
            tokens=info.tokens,
        ),
        limits=pb.Limits(
            max_model_len=info.context,
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


def _portions(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces by the message: one at least, and in each as many as it has room for."""
    if sum(piece.entries for piece in pieces) <= MAX_ENTRIES_IN_A_MESSAGE:  # as almost always
        yield list(pieces)
        return
    portion, room = list[Piece](), MAX_ENTRIES_IN_A_MESSAGE
    for part in (part for piece in pieces for part in _split(piece)):
        if portion and part.entries > room:
            yield portion
            portion, room = [], MAX_ENTRIES_IN_A_MESSAGE
        portion.append(part)
        room -= part.entries
    yield portion


def _split(piece: Piece) -> Iterator[Piece]:
    """A piece that is too large for a message in several: the text comes with the first, the end with the last."""
    tokens = len(piece.token_ids)
    most = max(1, MAX_ENTRIES_IN_A_MESSAGE * tokens // max(1, piece.entries))
    for start in range(0, max(1, tokens), most):
        end = start + most
        part = replace(
            piece,
            text="" if start else piece.text,
            token_ids=piece.token_ids[start:end],
            positions=piece.positions[start:end],
        )
        yield part if end >= tokens else replace(part, cumulative_logprob=None, finish_reason=None, stopped_by=None)


def _progress(progress: Progress) -> pb.Progress:
    return pb.Progress(
        tokens=progress.tokens,
        finished=progress.finished,
        best_text=progress.best_text,
        best_cumulative_logprob=progress.best_cumulative_logprob,
    )


def _token_logprob(position: Position) -> pb.TokenLogprob:
    chosen = position.chosen
    return pb.TokenLogprob(
        token_id=chosen.token_id,
        token=chosen.text,
        logprob=chosen.logprob,
        rank=chosen.rank,
        top=[pb.TopLogprob(token_id=t.token_id, token=t.text, logprob=t.logprob, rank=t.rank) for t in position.top],
    )


def _flat_logprobs(positions: Sequence[Position]) -> pb.FlatLogprobs:
    flat, tokens = pb.FlatLogprobs(), list[RankedToken]()
    for position in positions:
        flat.starts.append(len(tokens))
        tokens += (position.chosen, *position.top)
    flat.token_ids.extend(token.token_id for token in tokens)
    flat.logprobs.extend(token.logprob for token in tokens)
    flat.ranks.extend(token.rank for token in tokens)
    return flat
