"""Request ids in metadata: `x-request-id`, from the caller or a proxy, and back to it."""

import asyncio
import re
from typing import TYPE_CHECKING, Any

import grpc

from yuan_grpc.server.core.inflight import ANY_CONNECTION, InflightRequests, call_owner
from yuan_grpc.server.core.limits import MAX_REQUEST_ID
from yuan_grpc.v1 import yuan_pb2 as pb

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

HEADER = "x-request-id"

_RANDOM = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[49ab][0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{32}")
"""The random UUIDs and numbers that proxies generate. Envoy writes a flag over the version of a UUID."""


def is_valid(request_id: str) -> bool:
    """Return whether an id can be sent in metadata."""
    return 0 < len(request_id) <= MAX_REQUEST_ID and request_id.isascii() and request_id.isprintable()


def from_metadata(context: "Context") -> str:
    """Return the id in a call's metadata; an empty text if there is none."""
    ids = [str(value) for key, value in context.invocation_metadata() or () if key == HEADER]
    return ids[0] if ids and is_valid(ids[0]) else ""


def to_metadata(request_id: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata with an id; none if it has no id or one that cannot be sent."""
    return ((HEADER, request_id),) if is_valid(request_id) else ()


def set_from_metadata(request: pb.GenerateRequest, context: "Context", inflight: InflightRequests) -> str | None:
    """Give a request without an id the one in the metadata, and return the connection on which its id is valid.

    A random id is as secret as one that the server generates, so it is valid on all connections. An id that is in use,
    such as that of a proxy's retry, is valid nowhere: `Abort` does not find the second call.
    """
    connection: str = context.peer()
    if request.request_id or not (request_id := from_metadata(context)):
        return connection
    request.request_id = request_id
    if _RANDOM.fullmatch(request_id):
        connection = ANY_CONNECTION
    return None if inflight.is_running(request_id, call_owner(connection) or connection) else connection


async def send_headers(context: "Context", request_id: str) -> None:
    """Send the headers with an id, completely even if the call is cancelled: see `StreamWriter`.

    Raises:
        asyncio.CancelledError: the client has disconnected, including when grpcio only notices it now.
    """
    headers = asyncio.ensure_future(context.send_initial_metadata(to_metadata(request_id)))
    try:
        await asyncio.shield(headers)
    except asyncio.CancelledError:
        await asyncio.gather(headers, return_exceptions=True)  # asyncio logs failures that are not retrieved
        raise
    except grpc.aio.InternalError as error:
        raise asyncio.CancelledError from error
