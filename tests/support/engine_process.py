"""Runs the engine programs of this folder, each in its own process.

Importing vLLM takes longer than starting a small engine. So a server process imports it once and forks for each
program. On a machine with a GPU, and for a test that changes a variable of `READ_ONCE`, a program gets a new
interpreter instead: CUDA does not survive a fork, and vLLM or PyTorch read these variables once.

The server is this file run as a program: it reads a JSON line for each request and answers with the exit status.
"""

import atexit
import gc
import json
import os
import subprocess
import sys
import traceback
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
READ_ONCE = ("OMP_NUM_THREADS", "VLLM_BATCH_INVARIANT", "VLLM_CPU_OMP_THREADS_BIND")
_READ = {variable: os.environ.get(variable) for variable in READ_ONCE}
PRELOADED = (
    "vllm.entrypoints.llm",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.layers.quantization.online.base",
    "yuan_grpc.model.yuan",
)


def run_program(program: str, job: dict[str, Any], out: Path) -> Any:
    """Run a program with a job and return its result.

    Args:
        program: the program's file name in this folder; it has a function `run(job)`.
        job: the program's input; paths are converted to strings.
        out: the file that the program writes its result to.
    """
    text = json.dumps(job, default=str)
    if _has_gpu() or any(os.environ.get(variable) != value for variable, value in _READ.items()):
        completed = subprocess.run([sys.executable, FOLDER / program, out], input=text, text=True, capture_output=True)
        assert completed.returncode == 0, completed.stderr
    else:
        _SERVER.run(program, text, out)
    return json.loads(out.read_text())


@cache
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class _ForkServer:
    """The process that forks, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def run(self, program: str, job: str, out: Path) -> None:
        """Run a program in a fork; fail with its output if it fails."""
        log = out.with_suffix(".log")
        process = self._process = self._process or subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(json.dumps([program, job, str(out), str(log)]), file=process.stdin, flush=True)
            status = process.stdout.readline()
        except BaseException:  # such as the test's timeout, after which the fork may still run
            self.close()
            raise
        assert status == "0\n", log.read_text(errors="replace")

    def close(self) -> None:
        """Kill the server and its fork."""
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, 9)
            process.communicate()


_SERVER = _ForkServer()


def _serve() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)  # which the session's server sets
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in PRELOADED:
        with suppress(ModuleNotFoundError):  # another version of vLLM may lack one
            import_module(module)
    _prepare_for_forks()
    for line in sys.stdin:
        fork = os.fork()
        if not fork:
            _run_in_fork(*json.loads(line))
        _, status = os.waitpid(fork, 0)
        print(os.waitstatus_to_exitcode(status), file=replies, flush=True)


def _prepare_for_forks() -> None:
    """Configure vLLM's log, and hide all objects from the garbage collector, which vLLM runs five times an engine."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging

    configure_logging(LoggingConfig())
    gc.collect()
    gc.freeze()


def _run_in_fork(program: str, job: str, out: str, log: str) -> None:
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        result = import_module(Path(program).stem).run(json.loads(job))
        Path(out).write_text(json.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
