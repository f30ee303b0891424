"""A real engine with two front ends: processes that are killed and suspended in streams."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import psutil
from ports import free_ports, processes_on
from server_process import ServerProcess

from chaos.account import FINISHED, OWN_CONNECTION, Run, read_all, stub_of
from yuan_grpc.v1 import yuan_pb2 as pb

PROMPT = "世界上最高的山是什么"
LONG = pb.GenerateRequest(prompt=PROMPT, max_tokens=300, ignore_eos=True)
ENDLESS = pb.GenerateRequest(prompt=PROMPT, max_tokens=2000, ignore_eos=True)


class FrontEnds:
    """A server with two front ends, and a stub for each of them."""

    def __init__(self, server: ServerProcess, ports: int, stubs: list[Any]) -> None:
        self.server = server
        self.stubs = stubs
        self._ports = ports

    def front_end(self, number: int) -> psutil.Process:
        """Return the process of a front end."""
        (process,) = processes_on(self._ports + number)
        return process

    def engine(self) -> list[psutil.Process]:
        """Return the processes of the engine."""
        front_ends = [self.front_end(number) for number in range(2)]
        children = psutil.Process(self.server.process.pid).children()
        return [process for process in children if process not in front_ends]

    async def start(self, run: Run, request: pb.GenerateRequest, number: int) -> list["asyncio.Task[str]"]:
        """Start streams on both front ends in turn; return when each has a message."""
        streams = [self.stubs[each % 2].GenerateStream(request) for each in range(number)]
        for stream in streams:
            await stream.read()
        return [asyncio.ensure_future(run.call(read_all(stream))) for stream in streams]


@asynccontextmanager
async def front_ends(run: Run) -> AsyncIterator[FrontEnds]:
    """Run a server with two front ends; kill it in the end."""
    ports = free_ports()
    server = await asyncio.to_thread(ServerProcess, "--frontends", "2", "--frontend-ports", str(ports))
    try:
        await asyncio.to_thread(server.wait_until_serving)
        async with AsyncExitStack() as stack:
            addresses = [f"127.0.0.1:{ports + number}" for number in range(2)]
            channels = [grpc.aio.insecure_channel(address, OWN_CONNECTION) for address in addresses]
            stubs = [stub_of(await stack.enter_async_context(channel)) for channel in channels]
            for stub in stubs:
                await run.call(stub.GetModel(pb.GetModelRequest(), wait_for_ready=True))
            yield FrontEnds(server, ports, stubs)
    finally:
        server.kill()


async def front_end_killed(run: Run) -> None:
    """One of two front ends is killed, and then one is suspended, in streams: those of the other finish."""
    async with front_ends(run) as served:
        number = 2 * run.size(16)
        tasks = await served.start(run, LONG, number)
        served.front_end(0).kill()
        ends = [await task for task in tasks]
        run.must(ends[1::2] == [FINISHED] * (number // 2), "streams of the other front end finish")
        run.must(set(ends[::2]) == {"UNAVAILABLE"}, "streams of the killed front end get UNAVAILABLE")
        for stub in served.stubs:
            await run.call(stub.Generate(LONG, wait_for_ready=True))
        tasks, suspended = await served.start(run, LONG, number), served.front_end(0)
        suspended.suspend()
        others = [await task for task in tasks[1::2]]
        run.must(set(others) == {FINISHED}, "streams finish while the other front end is suspended")
        suspended.resume()
        resumed = [await task for task in tasks[::2]]
        run.must(set(resumed) == {FINISHED}, "streams of a front end that was suspended finish")
        os.killpg(served.server.process.pid, signal.SIGTERM)
        status, log = await asyncio.to_thread(served.server.wait_for_exit)
        run.must(status == 0, f"the server stops with status 0, not {status}")
        run.must("Traceback" not in log, "the log has no traceback")
    run.must_end(FINISHED, "UNAVAILABLE")


async def engine_killed(run: Run) -> None:
    """The engine is suspended for a moment and then killed, in streams of two front ends: all get UNAVAILABLE."""
    async with front_ends(run) as served:
        number = 2 * run.size(16)
        processes = served.server.engine_processes()
        tasks, engine = await served.start(run, ENDLESS, number), served.engine()
        for process in engine:
            process.suspend()
        await run.call(served.stubs[0].GetModel(pb.GetModelRequest()))  # needs no engine
        for process in engine:
            process.kill()
        ends = {await task for task in tasks}
        run.must(ends == {"UNAVAILABLE"}, f"each stream gets UNAVAILABLE, not {ends}")
        status, log = await asyncio.to_thread(served.server.wait_for_exit)
        run.must(status == 1, f"the server ends with status 1, not {status}")
        run.must("the engine was lost" in log, "the log names the cause")
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 30)
        run.must(not alive, f"no process is left, not {alive}")
    run.must_end(FINISHED, "UNAVAILABLE")
