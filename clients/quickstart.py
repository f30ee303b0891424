"""Asks a running server one question, first for the whole answer, then for a stream of it.

    python clients/quickstart.py [ADDRESS] [PROMPT]

Needs `yuan-grpc` alone, which brings grpcio and protobuf.
"""

import sys

from yuan_grpc.client import Client


def main(address: str = "127.0.0.1:50051", prompt: str = "世界上最高的山是什么") -> None:
    """Prints both answers; they are the same, for nothing is left to chance."""
    with Client(address, timeout=60) as client:
        print(client.generate(prompt, max_tokens=32, top_k=1).text)
        for piece in client.stream(prompt, max_tokens=32, top_k=1):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
