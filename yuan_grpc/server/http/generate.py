"""`/generate`: the API of the vLLM 0.2 demo server, for which Yuan's client scripts were written."""

from typing import Any

from yuan_grpc.server.core.convert import num_choices
from yuan_grpc.server.engine.model_names import resolve_alias
from yuan_grpc.server.http.call import NUL_TERMINATED, HttpCall
from yuan_grpc.server.http.json_body import convert_vllm_notation, set_fields, to_token_ids
from yuan_grpc.v1 import yuan_pb2 as pb


async def generate(call: HttpCall) -> None:
    """Respond with `{"text": [...]}`, the prompt and output of each choice.

    Each chunk of a streamed response has all text so far.
    """
    request = _parse(await call.read_json(), call)
    await call.run_until_disconnect(_stream(call, request) if request.stream else _send(call, request))


def _parse(body: dict[str, Any], call: HttpCall) -> pb.GenerateRequest:
    fields = {"echo": True, **body}
    convert_vllm_notation(fields)
    request = pb.GenerateRequest()
    ids = fields.get("prompt_token_ids")
    if isinstance(ids, dict) and ids.keys() == {"ids"}:
        ids = ids["ids"]
    if isinstance(ids, list):
        request.prompt_token_ids.CopyFrom(to_token_ids("prompt_token_ids", ids))
        del fields["prompt_token_ids"]
    set_fields(request, fields)
    request.model = resolve_alias(request.model, call.state.aliases)
    return request


async def _send(call: HttpCall, request: pb.GenerateRequest) -> None:
    response = await call.generate(request)
    await call.respond({"text": [choice.text for choice in response.choices]})


async def _stream(call: HttpCall, request: pb.GenerateRequest) -> None:
    async with call.stream(request) as stream:
        texts: dict[int, str] = {}
        with_output: set[int] = set()
        async for message in stream:
            if not texts:  # a choice without output is the prompt alone
                texts = dict.fromkeys(range(num_choices(request)), stream.echo)
                await call.start_stream(NUL_TERMINATED)
            for choice in message.choices:
                texts[choice.index] = (texts[choice.index] if choice.index in with_output else "") + choice.text
                with_output.add(choice.index)
            if message.choices:
                await call.write_chunk({"text": list(texts.values())})
    await call.end_stream()
