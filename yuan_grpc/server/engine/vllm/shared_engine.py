"""One vLLM engine that several processes use: the part of the process that starts it, and that of the others.

vLLM's engine has a pair of sockets for each of its clients, and sends the outputs of a request to the client that added
it. The process that starts the engine creates all sockets and keeps one pair, over which it loads adapters and aborts
the requests of a client that has died. Sockets cannot be used by a second client, so a client that replaces another one
gets a pair of its own.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.plugins import load_general_plugins
from vllm.usage.usage_lib import UsageContext
from vllm.utils import system_utils
from vllm.utils.network_utils import ZmqListener
from vllm.v1.engine.admission_control import SharedAdmissionStats
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.utils import CoreEngineLaunch, EngineZmqListeners, bind_engine_zmq_listeners, launch_core_engines
from vllm.v1.executor import Executor

from yuan_grpc.server.engine.load import LoadBoard, SharedLoadBoard
from yuan_grpc.server.engine.vllm import env
from yuan_grpc.server.engine.vllm.args import EngineOptions
from yuan_grpc.server.engine.vllm.launch import Launch
from yuan_grpc.server.engine.vllm.processes import ProcessTree

TERMINATION_SECONDS = 10


@dataclass(frozen=True)
class ClientLink:
    """The connection of one client to an engine in other processes. Can be passed to a process that is started.

    Attributes:
        index: the number of the client, below `count`.
        count: the number of clients that the engine knows, running or not.
        sockets: the listening sockets for the engine's connections, and their addresses, under vLLM's names.
        counters: the number of requests of each client, in shared memory.
        loads: the memory of a `SharedLoadBoard`.
        progress: the number of outputs that each client has got, in shared memory.
    """

    index: int
    count: int
    sockets: dict[str, Any] = field(repr=False)
    counters: Any = field(repr=False)
    loads: Any = field(repr=False)
    progress: Any = field(repr=False)

    def connect(self, options: EngineOptions, board: LoadBoard) -> AsyncLLM:
        """Return vLLM's front end, once the engine has started.

        Args:
            options: the result of `parse_engine_flags`.
            board: gets the load after the steps whose statistics this client gets.
        """
        load_general_plugins()  # in a process of its own, the model is not registered yet
        return AsyncLLM.from_vllm_config(
            options.config,
            usage_context=UsageContext.ENGINE_CONTEXT,
            enable_log_requests=options.arguments.enable_log_requests,
            aggregate_engine_logging=options.arguments.aggregate_engine_logging,
            disable_log_stats=options.arguments.disable_log_stats,
            stat_loggers=options.stat_loggers(board),
            client_addresses={**self.sockets, "mp_admission_counters": self.counters},
            client_count=self.count,
            client_index=self.index,
        )

    def close(self) -> None:
        """Close the sockets in this process, after they have been passed to the client's."""
        self.sockets["input_listener"].close()
        self.sockets["output_listener"].close()

    def forget_requests(self) -> None:
        """Count no requests for a client that has died."""
        self.counters[self.index * SharedAdmissionStats.COUNTERS_PER_SLOT] = 0


class SharedEngine:
    """The engine's processes, and the links of their clients, in the process that starts them.

    Args:
        options: the result of `parse_engine_flags`.
        clients: the number of links.
    """

    def __init__(self, options: EngineOptions, clients: int) -> None:
        self._options = options
        self._count = clients + 1  # the last client is this process
        create_array, ranks = multiprocessing.get_context("spawn").RawArray, options.config.parallel_config
        self._counters = create_array("q", SharedAdmissionStats.num_counters(self._count))
        self._progress = create_array("q", self._count)
        self._loads = create_array("d", SharedLoadBoard.size(ranks.data_parallel_size))
        self._launch = Launch()
        self._listeners: EngineZmqListeners | None = None
        self._client: AsyncMPClient | None = None
        self._processes = ProcessTree(())

    async def start(self, start_clients: Callable[[Sequence[ClientLink]], Sequence[BaseProcess]]) -> None:
        """Start the engine, and return when it has loaded the model.

        Args:
            start_clients: gets the links, and returns the processes that it has started. It is called in a thread as
                soon as the engine's processes have been started.

        Raises:
            StartError: the engine could not be started, or one of the processes has ended.
        """
        with self._launch.failures_described():
            self._client = await self._launch.run(lambda folder: self._start(folder, start_clients))

    def _start(
        self, folder: str, start_clients: Callable[[Sequence[ClientLink]], Sequence[BaseProcess]]
    ) -> AsyncMPClient:
        config = self._options.config
        executor, log_stats = Executor.get_class(config), not self._options.arguments.disable_log_stats
        with env.temporary_folder(folder):
            self._listeners = listeners = bind_engine_zmq_listeners(config, self._count)
            with launch_core_engines(config, executor, log_stats, listeners.addresses) as launch:
                links = [
                    self._link(index, ends[0], ends[1], launch)
                    for index, ends in enumerate(zip(listeners.inputs, listeners.outputs, strict=True))
                ]
                launch.watched_frontend_processes = start_clients(links[:-1])
            link = links[-1]
            client = EngineCoreClient.make_async_mp_client(
                config, executor, log_stats, dict(link.sockets), link.count, link.index
            )
        client.resources.engine_manager, client.resources.coordinator = launch.engine_manager, launch.coordinator
        client.start_engine_core_monitor()
        self._processes = ProcessTree(process.pid for process in getattr(launch.engine_manager, "processes", ()))
        return client

    def _link(self, index: int, inputs: ZmqListener, outputs: ZmqListener, launch: CoreEngineLaunch) -> ClientLink:
        sockets = {
            "input_address": inputs.address,
            "input_listener": inputs.socket,
            "output_address": outputs.address,
            "output_listener": outputs.socket,
        }
        if launch.coordinator:
            sockets["stats_update_address"] = launch.coordinator.get_stats_publish_address()
        return ClientLink(index, self._count, sockets, self._counters, self._loads, self._progress)

    def start_process(self, target: Callable[..., object], arguments: tuple[object, ...], name: str) -> BaseProcess:
        """Start a process in the same way as those of the engine, with the same folder for temporary files."""
        process: BaseProcess = system_utils.get_mp_context().Process(target=target, args=arguments, name=name)
        with env.temporary_folder(self._launch.folder):
            process.start()
        return process

    async def wait_until_dead(self) -> None:
        """Wait until the started engine has died."""
        while True:
            try:
                await self._running_client.get_output_async()
            except EngineDeadError:
                return

    async def abort_client(self, link: ClientLink) -> None:
        """Abort the requests of a client that has died."""
        link.forget_requests()
        await self._running_client.call_utility_all_async("abort_client", link.index)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Load an adapter; return whether all workers could."""
        return await self._running_client.add_lora_async(lora_request)

    async def remove_lora(self, lora_id: int) -> bool:
        """Unload an adapter; return whether it was loaded."""
        return await self._running_client.remove_lora_async(lora_id)

    def stop(self) -> None:
        """Stop the engine's processes in any state, including during their start."""
        if self._client is None:
            self._launch.kill()
        else:
            self._processes.resume()
            self._client.shutdown(timeout=TERMINATION_SECONDS)
            self._processes.kill()
        if self._listeners:
            self._listeners.cleanup()
        self._launch.clean_up()

    @property
    def _running_client(self) -> AsyncMPClient:
        assert self._client is not None
        return self._client
