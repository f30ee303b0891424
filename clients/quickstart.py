"""Asks a running server one question, first for the whole answer, then for a stream of it.

    python clients/quickstart.py [ADDRESS] [PROMPT]

Needs `yuan-grpc` alone, which brings grpcio and protobuf.
"""

import sys

import grpc

from yuan_grpc.v1 import yuan_pb2, yuan_pb2_grpc


def main(address: str = "127.0.0.1:50051", prompt: str = "世界上最高的山是什么") -> None:
    """Prints both answers; they are the same, for nothing is left to chance."""
    request = yuan_pb2.GenerateRequest(prompt=prompt, max_tokens=32, top_k=1)
    with grpc.insecure_channel(address) as channel:
        stub = yuan_pb2_grpc.YuanServiceStub(channel)
        response = stub.Generate(request, timeout=60)
        print(response.choices[0].text)
        for part in stub.GenerateStream(request, timeout=60):
            print("".join(choice.text for choice in part.choices), end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
