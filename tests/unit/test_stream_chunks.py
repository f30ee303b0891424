"""Sizes of the chunks of an OpenAI stream, which decide where they are encoded."""

from typing import Any

from yuan_grpc.server.http.openai.streaming import _PromptChunks
from yuan_grpc.server.http.openai.tokens import Prompt
from yuan_grpc.v1 import yuan_pb2 as pb


class Format:
    """A format whose chunks have nothing but the number of log-probabilities of the prompt."""

    object_type = chunk_object_type = id_prefix = "test"

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def full(self, index: int, choice: pb.Choice, prompt: Prompt) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, index: int, choice: pb.Choice, prompt: Prompt) -> dict[str, Any]:
        return {"prompt_logprobs": len(prompt.logprobs)}


def test_prompt_logprobs_count_until_each_choice_has_its_first_text() -> None:
    chunks = _PromptChunks(Format(), pb.GenerateRequest(prompt="a", n=2), 0, False)
    prompt = pb.GenerateStreamResponse(prompt_logprobs=[pb.TokenLogprob(token_id=5)] * 100)
    texts = [pb.GenerateStreamResponse(choices=[pb.Choice(index=index, text="b")]) for index in (0, 1, 1)]
    kept, text = prompt.ByteSize(), texts[2].ByteSize()
    chunks.add_prompt(prompt)
    assert chunks.size_with(prompt) >= kept
    assert list(chunks.convert(prompt)) == []
    sizes: list[int] = []
    converted: list[dict[str, Any]] = []
    for message in texts:
        sizes.append(chunks.size_with(message))
        converted += chunks.convert(message)
    assert converted == [{"prompt_logprobs": 100}, {"prompt_logprobs": 100}, {"prompt_logprobs": 0}]
    assert sizes == [kept + texts[0].ByteSize(), kept + texts[1].ByteSize(), text]
