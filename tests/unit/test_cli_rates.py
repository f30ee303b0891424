"""Times and rates of a reply."""

from yuan_grpc.cli.common.rates import ReplyTimer
from yuan_grpc.client.types import Completion, Usage
from yuan_grpc.v1 import yuan_pb2 as pb


def completion(tokens: int) -> Completion:
    usage = Usage(prompt_tokens=7, completion_tokens=tokens, cached_tokens=4)
    return Completion(
        choices=(),
        usage=usage,
        seed=None,
        request_id="",
        model="",
        prompt_token_ids=(),
        prompt_logprobs=(),
        message=pb.GenerateResponse(),
    )


def test_the_rate_is_that_of_the_tokens_after_the_first_text() -> None:
    times = iter((10.0, 10.25, 12.25))
    timer = ReplyTimer(lambda: next(times))
    timer.record_text()
    timer.record_text()
    assert timer.format_rates(completion(11)).splitlines() == [
        "prompt:       7 tokens, 4 of them cached",
        "reply:        11 tokens, finish reason None",
        "first token:  250 ms",
        "rate:         5.0 tokens/s",
        "total:        2.25 s",
    ]


def test_a_reply_without_text_has_no_rate() -> None:
    times = iter((10.0, 11.0))
    lines = ReplyTimer(lambda: next(times)).format_rates(completion(0)).splitlines()
    assert lines[2:] == ["first token:  -", "rate:         -", "total:        1.00 s"]
