"""Environment variables of the engine, and the folders that it writes to.

torch compiles into `/tmp/torchinductor_USER` by default and loads shared libraries from there. A local user who creates
that folder first runs code as the server. See docs/decisions/0050-private-folders.md.
"""

import atexit
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yuan_grpc.server.engine.vllm import engine_log

logger = logging.getLogger(__name__)

DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",  # no telemetry unless the operator enables it
    "VLLM_LOGGING_CONFIG_PATH": engine_log.CONFIG_FILE,  # to stderr; stdout is for generated text
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # if the operator has set VLLM_CONFIGURE_LOGGING=0
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with gRPC threads can hang
    "VLLM_XGRAMMAR_CACHE_MB": "512",  # without it, each choice of a request compiles its constraint again
    "VLLM_REGEX_COMPILATION_TIMEOUT_S": "0",  # the package `constraints` has limited the compilation before
}
"""Values of variables that vLLM reads at import, unless the operator sets them."""

CACHE_FOLDERS = {
    "VLLM_CACHE_ROOT": "vllm",
    "VLLM_CONFIG_ROOT": "config",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_HOME": "triton",
    "TRITON_CACHE_DIR": "triton/cache",
}
"""Variables that name a folder for compiled code and other files that outlive the process, with our folder for each."""

OWN_UMASK = 0o077
"""Umask of the server: no other user can read or write the files it creates."""

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder in which the processes of a server share their metrics, for `prometheus_client`."""

MAX_SOCKET_PATH = 107
"""Longest path of a unix socket on Linux, in bytes."""
PREFIX = "yuan-grpc-"
_SOCKET = f"{PREFIX}12345678/12345678-1234-1234-1234-123456789012"
"""The name of an engine's socket in a temporary folder."""


class UnsafeFolderError(OSError):
    """A folder that another user could have written to."""


def set_defaults(log_level: str | None = None, log_format: str = "text") -> None:
    """Set the variables of `DEFAULTS` and `CACHE_FOLDERS` that are not set, and create the folders.

    Must be called before vLLM is imported.

    Args:
        log_level: the level of the server's log; None for that in the environment, if it has one.
        log_format: the format of the server's log, text or json.

    Raises:
        UnsafeFolderError: another user could have written to a folder.
    """
    os.environ[engine_log.FORMAT_VARIABLE] = log_format
    if log_level:
        os.environ[engine_log.LEVEL_VARIABLE] = log_level
        os.environ.setdefault("TQDM_DISABLE", "1")  # `engine_log` reports progress
    if os.environ.get(engine_log.LEVEL_VARIABLE) == "debug":
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "DEBUG")
    else:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's C++ code warns of what vLLM chose
    engine_log.hide_harmless_warnings()
    for variable, value in DEFAULTS.items():
        os.environ.setdefault(variable, value)
    unset = [variable for variable in CACHE_FOLDERS if not os.environ.get(variable) or _is_torch_default(variable)]
    cache = _cache_folder() if unset else Path()
    for variable in unset:
        os.environ[variable] = str(create_private_folder(cache / CACHE_FOLDERS[variable]))


def share_metrics() -> None:
    """Let the processes that are started later share their metrics, in a private folder. Before vLLM is imported."""
    folder = tempfile.mkdtemp(prefix=PREFIX)
    os.environ[METRICS_FOLDER] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _is_torch_default(variable: str) -> bool:
    """Return whether torch has set the variable to its own default, as it does when vLLM is imported."""
    return os.environ[variable].startswith(f"{tempfile.gettempdir()}/torchinductor_")


def _cache_folder() -> Path:
    """Return the folder that keeps compiled code, or a temporary one if the user has no writable cache folder."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "yuan-grpc"
    try:
        return create_private_folder(folder.absolute())
    except UnsafeFolderError:
        raise
    except OSError as error:
        logger.warning("compiled code is not kept for the next start: %s", error)
        temporary = tempfile.mkdtemp(prefix=PREFIX)
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


def create_private_folder(folder: Path) -> Path:
    """Create a folder that only this user can access, unless it exists, and return it.

    Raises:
        UnsafeFolderError: another user could have written to it.
        OSError: it cannot be created, or can be replaced later.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise UnsafeFolderError(f"{folder} must be a folder, not a link to one")
    if status.st_uid != os.getuid():
        raise UnsafeFolderError(f"{folder} must belong to this user, {os.getuid()}, not to {status.st_uid}")
    if status.st_mode & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        raise UnsafeFolderError(f"{folder} must be writable by its owner only, not have mode {mode:04o}: remove it")
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & 0o002 and not mode & stat.S_ISVTX:
            raise PermissionError(f"every user can rename folders in {parent}")
    folder.chmod(0o700)
    return folder


def socket_parent() -> str:
    """Return the folder for temporary files, or /tmp if the path of a socket would be too long there."""
    default = tempfile.gettempdir()
    return default if len(os.fsencode(f"{default}/{_SOCKET}")) <= MAX_SOCKET_PATH else "/tmp"


@contextmanager
def temporary_folder(folder: str) -> Iterator[None]:
    """Let processes that are started in the block create their sockets and temporary files in a folder.

    Otherwise vLLM leaves them in /tmp, where all users can see them.
    """
    original = {variable: os.environ.get(variable) for variable in ("TMPDIR", "VLLM_RPC_BASE_PATH")}
    os.environ["TMPDIR"] = folder
    os.environ.setdefault("VLLM_RPC_BASE_PATH", folder)
    try:
        yield
    finally:
        for variable, value in original.items():
            if value is None:
                del os.environ[variable]
            else:
                os.environ[variable] = value
