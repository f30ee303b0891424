"""Tokenize and Detokenize, for gRPC and HTTP."""

import asyncio

from yuan_grpc.server.core import response, validation
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.v1 import yuan_pb2 as pb


async def tokenize(service: GenerationService, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
    """Return the tokens of a text or a conversation.

    Raises:
        ServiceError: the request is invalid, or the engine is not ready.
    """
    validation.validate_tokenize(request)
    engine = service.engine
    text = request.prompt
    if request.messages:
        validation.validate_messages(request.messages)
        text = engine.apply_chat_template([message.content for message in request.messages])
    async with service.tokenization_permit(len(text)):
        tokens = await engine.tokenize_with_offsets(text)
        return await asyncio.to_thread(response.tokenize_response, text, tokens)


async def detokenize(service: GenerationService, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
    """Return the text of token ids.

    Raises:
        ServiceError: the request is invalid, or the engine is not ready.
    """
    engine = service.engine
    validation.validate_detokenize(request, engine.info)
    skip, ids = request.skip_special_tokens, request.token_ids
    return pb.DetokenizeResponse(text=await asyncio.to_thread(engine.detokenize, ids, skip_special_tokens=skip))
