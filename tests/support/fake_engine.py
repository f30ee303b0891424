"""A scripted engine, for behaviour that a real one cannot produce on demand."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from yuan_grpc.server.engine.load import EngineLoad
from yuan_grpc.server.engine.types import ChoiceDelta, EngineRequest, FinishReason, LoraInfo, ModelInfo, StepOutput
from yuan_grpc.server.errors import ModelNotFoundError

INFO = ModelInfo(
    name="fake",
    max_model_len=64,
    vocab_size=0x110000,
    max_logprobs=20,
    end_token_ids=(0,),
    path="/models/fake",
    max_num_seqs=256,
    lora=LoraInfo(1, 16, can_load=True),
)


def last(text: str = "!", index: int = 0, cumulative_logprob: float | None = None) -> StepOutput:
    """Return an output that ends a choice."""
    ids = [ord(character) for character in text]
    delta = ChoiceDelta(index, text, ids, cumulative_logprob=cumulative_logprob, finish_reason=FinishReason.LENGTH)
    return StepOutput([delta])


def more(text: str, index: int = 0) -> StepOutput:
    """Return an output after which the choice continues."""
    return StepOutput([ChoiceDelta(index, text, [ord(character) for character in text])])


class FakeEngine:
    """Plays a script for every request: acceptance, then outputs to yield and exceptions to raise.

    A token is a character.

    Args:
        script: outputs and exceptions, in order.
        hangs: whether a request waits for its deadline after the script.
        is_ready: whether requests are accepted.

    Attributes:
        requests: all requests so far.
        loads: the load of each rank.
        start_error: raised by `start`.
        may_start: `start` waits for it.
        died: set to make the engine die.
        running: number of running requests.
        progress: number of outputs of all requests.
        began, freed: set when a request begins and when one has been freed.
    """

    def __init__(self, *script: StepOutput | Exception, hangs: bool = False, is_ready: bool = True) -> None:
        self.script = script
        self.hangs = hangs
        self.is_ready = is_ready
        self.info = INFO
        self.requests: list[EngineRequest] = []
        self.loras: list[str] = []
        self.available_loras = ["style"]
        self.loads: list[EngineLoad] = [EngineLoad(max_num_seqs=8)]
        self.start_error: Exception | None = None
        self.may_start = asyncio.Event()
        self.died = asyncio.Event()
        self.stopped = self.freed_before_stop = False
        self.running = self.progress = 0
        self.began = asyncio.Event()
        self.freed = asyncio.Event()

    async def start(self) -> None:
        if self.start_error:
            raise self.start_error
        await self.may_start.wait()

    async def wait_until_dead(self) -> None:
        await self.died.wait()

    def stop(self) -> None:
        self.stopped = True
        self.freed_before_stop = self.freed.is_set()

    @property
    def is_busy(self) -> bool:
        return self.running > 0

    async def tokenize(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    async def tokenize_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        return [(ord(character), character, i, i + 1) for i, character in enumerate(text)]

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool) -> bytes:
        return b"" if skip_special_tokens and token_id in self.info.end_token_ids else chr(token_id).encode()

    @property
    def tokenizer_info(self) -> Mapping[str, Any]:
        return {"tokenizer_class": "FakeTokenizer", "eos_token": "\0"}

    def apply_chat_template(self, turns: Sequence[str]) -> str:
        return "|".join(turns) + ">"

    def decode_continuation(
        self, request: EngineRequest, token_ids: Sequence[int], *, ended: bool
    ) -> tuple[str, str | None]:
        return self.detokenize(token_ids, skip_special_tokens=True), None

    async def load_lora(self, name: str) -> None:
        self.loras.append(name)

    async def unload_lora(self, name: str) -> None:
        if name not in self.loras:
            raise ModelNotFoundError(f"`name` must be that of a loaded adapter, not {name}")
        self.loras.remove(name)

    @asynccontextmanager
    async def pin_lora(self, lora: str) -> AsyncGenerator[str, None]:
        yield lora

    def script_for(self, request: EngineRequest) -> tuple[Sequence[StepOutput | Exception], bool]:
        """Return the script of a request, and whether it hangs after it."""
        return self.script, self.hangs

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        script, hangs = self.script_for(request)
        self.requests.append(request)
        self.running += 1
        self.began.set()
        finished = {
            delta.index
            for output in script
            if isinstance(output, StepOutput)
            for delta in output.deltas
            if delta.finish_reason
        }
        try:
            if not (script and isinstance(script[0], Exception)):
                yield StepOutput()
            for output in script:
                if isinstance(output, Exception):
                    raise output
                self.progress += 1
                yield output
            if hangs:
                await (deadline or asyncio.Event()).wait()
                unfinished = [index for index in range(request.sampling.n) if index not in finished]
                yield StepOutput(
                    [ChoiceDelta(index, "", (), finish_reason=FinishReason.DEADLINE) for index in unfinished]
                )
        finally:
            self.running -= 1
            self.freed.set()
