"""A smoke test of the installed client, without the server packages: `python .ci/smoke_client.py`."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec

import grpc

from yuan_grpc.client import Client, NotFoundError
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

SERVER_PACKAGES = ("vllm", "torch", "numpy", "starlette", "uvicorn", "sentencepiece", "grpc_health")


class EchoServicer(yuan_pb2_grpc.YuanServiceServicer):
    """A service that returns the prompt."""

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        return pb.GenerateResponse(choices=[pb.Choice(text=request.prompt, finish_reason=pb.FINISH_REASON_STOP)])

    def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateStreamResponse]:
        yield pb.GenerateStreamResponse(usage=pb.Usage(prompt_tokens=len(request.prompt)))
        for character in request.prompt:
            yield pb.GenerateStreamResponse(choices=[pb.Choice(text=character)])

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:
        context.abort(grpc.StatusCode.NOT_FOUND, "no running call has this `request_id`")


def main() -> None:
    """Call each kind of RPC once, and exit with an error if the client misbehaves."""
    if installed := [name for name in SERVER_PACKAGES if find_spec(name)]:
        sys.exit(f"not a client-only environment: it has {', '.join(installed)}")
    server = grpc.server(ThreadPoolExecutor(4))
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(EchoServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Client(f"127.0.0.1:{port}", timeout=30) as client:
        assert client.generate("你好", max_tokens=4).text == "你好"
        assert "".join(client.stream("你好", max_tokens=4)) == "你好"
        assert [result.text for result in client.generate_many(["a", "b"], max_tokens=4)] == ["a", "b"]
        try:
            client.abort("nothing")
        except NotFoundError:
            pass
        else:
            sys.exit("Abort did not fail")
    server.stop(None)
    print(f"client {version('yuan-grpc')} works")


if __name__ == "__main__":
    main()
