"""Starts a vLLM engine process without the plugin, up to its first message, and waits.

    python unpatched_engine.py SOCKET

Prints the process id and the process group of the engine as JSON, and keeps it until stdin is closed.
"""

import json
import os
import sys

import zmq
from vllm.config import DeviceConfig, VllmConfig
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor


def main() -> None:
    """Wait for the engine's first message, then for the end of stdin."""
    address = f"ipc://{sys.argv[1]}"
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(address)
    manager = CoreEngineProcManager(
        local_engine_count=1,
        start_index=0,
        local_start_index=0,
        vllm_config=VllmConfig(device_config=DeviceConfig("cpu")),
        local_client=True,
        handshake_address=address,
        executor_class=UniProcExecutor,
        log_stats=False,
    )
    socket.recv_multipart()
    (process,) = manager.processes
    print(json.dumps({"pid": process.pid, "group": os.getpgid(process.pid)}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
