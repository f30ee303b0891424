"""Servers of gRPC and HTTP with a fake engine and few file descriptors. Prints both ports, and then the open files."""

import asyncio
import logging
import os
import resource
import sys

from fake_engine import FakeEngine, last

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME, YuanService
from yuan_grpc.server.http import Listener
from yuan_grpc.server.server import create_server

FILES = 96


async def main() -> None:
    """Serve until standard input ends."""
    logging.basicConfig(level=logging.INFO)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    service = GenerationService(FakeEngine(last("yes")))
    http = Listener(service, "127.0.0.1", 0)
    server, port = await create_server(YuanService(service), Health(NAME), "127.0.0.1:0")
    await server.start()
    http.start()
    print(port, http.port, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print(len(os.listdir("/proc/self/fd")), flush=True)
    await http.close()
    await server.stop(None)


asyncio.run(main())
