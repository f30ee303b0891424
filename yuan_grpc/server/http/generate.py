"""`/generate`: as the demo server of vLLM 0.2 had it, which Yuan's calling scripts were written for."""

from typing import Any

from yuan_grpc.server.http.bodies import fill, token_ids, written_as_ours
from yuan_grpc.server.http.exchange import ENDED_BY_ZERO, Exchange
from yuan_grpc.server.requests import n_of
from yuan_grpc.v1 import yuan_pb2 as pb


async def answer(exchange: Exchange) -> None:
    """Answers `{"text": [...]}`, the prompt and what was generated for each choice; whole, or in chunks of all the text
    so far."""
    request = _request(await exchange.json(), exchange)
    await exchange.watched(_streamed(exchange, request) if request.stream else _whole(exchange, request))


def _request(body: dict[str, Any], exchange: Exchange) -> pb.GenerateRequest:
    fields = {"echo": True, **body}
    written_as_ours(fields)
    request = pb.GenerateRequest()
    if isinstance(ids := fields.get("prompt_token_ids"), list):
        request.prompt_token_ids.CopyFrom(token_ids("prompt_token_ids", ids))
        del fields["prompt_token_ids"]
    fill(request, fields)
    if request.model in exchange.site.aliases:
        request.model = ""
    return request


async def _whole(exchange: Exchange, request: pb.GenerateRequest) -> None:
    response = await exchange.site.answers.whole(request)
    await exchange.answer({"text": [choice.text for choice in response.choices]})


async def _streamed(exchange: Exchange, request: pb.GenerateRequest) -> None:
    texts: dict[int, str] = {}
    request.return_prompt_token_ids = request.echo  # of which it is made
    async with exchange.site.answers.in_parts(request) as parts:
        async for part in parts:
            if not texts:  # a choice of which nothing has come yet is the prompt
                echo = await exchange.site.answers.echo(request, part.prompt_token_ids)
                texts = dict.fromkeys(range(n_of(request)), echo)
                begun: set[int] = set()
                await exchange.begin(ENDED_BY_ZERO)
            for choice in part.choices:
                texts[choice.index] = (texts[choice.index] if choice.index in begun else "") + choice.text
                begun.add(choice.index)
            if part.choices:
                await exchange.write({"text": list(texts.values())})
    await exchange.end()
