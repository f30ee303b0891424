"""Generate text with a running server, first in one response, then as a stream.

    python clients/quickstart.py [ADDRESS] [PROMPT]

Needs only `yuan-grpc`, which installs grpcio and protobuf.
"""

import sys

from yuan_grpc.client import Client


def main(address: str = "127.0.0.1:50051", prompt: str = "世界上最高的山是什么") -> None:
    """Print both texts; they are equal because `top_k=1` makes generation deterministic."""
    with Client(address, timeout=60) as client:
        print(client.generate(prompt, max_tokens=32, top_k=1).text)
        for delta in client.stream(prompt, max_tokens=32, top_k=1):
            print(delta, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
