"""`/generate`: as the demo server of vLLM 0.2 had it, which Yuan's calling scripts were written for."""

from typing import Any

from yuan_grpc.server.core.convert import num_choices
from yuan_grpc.server.http.call import ENDED_BY_ZERO, HttpCall
from yuan_grpc.server.http.json_body import fill, token_ids, written_as_ours
from yuan_grpc.v1 import yuan_pb2 as pb


async def answer(call: HttpCall) -> None:
    """Answers `{"text": [...]}`, the prompt and what was generated for each choice; whole, or in chunks of all the text
    so far."""
    request = _request(await call.json(), call)
    await call.watched(_streamed(call, request) if request.stream else _whole(call, request))


def _request(body: dict[str, Any], call: HttpCall) -> pb.GenerateRequest:
    fields = {"echo": True, **body}
    written_as_ours(fields)
    request = pb.GenerateRequest()
    if isinstance(ids := fields.get("prompt_token_ids"), list):
        request.prompt_token_ids.CopyFrom(token_ids("prompt_token_ids", ids))
        del fields["prompt_token_ids"]
    fill(request, fields)
    if request.model in call.state.aliases:
        request.model = ""
    return request


async def _whole(call: HttpCall, request: pb.GenerateRequest) -> None:
    response = await call.state.service.generate(request)
    await call.answer({"text": [choice.text for choice in response.choices]})


async def _streamed(call: HttpCall, request: pb.GenerateRequest) -> None:
    texts: dict[int, str] = {}
    request.return_prompt_token_ids = request.echo  # of which it is made
    async with call.state.service.stream(request) as parts:
        async for part in parts:
            if not texts:  # a choice of which nothing has come yet is the prompt
                echo = await call.state.service.echo(request, part.prompt_token_ids)
                texts = dict.fromkeys(range(num_choices(request)), echo)
                begun: set[int] = set()
                await call.begin(ENDED_BY_ZERO)
            for choice in part.choices:
                texts[choice.index] = (texts[choice.index] if choice.index in begun else "") + choice.text
                begun.add(choice.index)
            if part.choices:
                await call.write({"text": list(texts.values())})
    await call.end()
