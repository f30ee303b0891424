"""The temporary folder of an engine's sockets, and the removal of those that killed servers have left."""

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from yuan_grpc.server.engine.vllm import env

LOCK = "lock"
"""Name of the file in a folder that its server has locked."""


class TemporaryFolder:
    """A private folder that exists until `cleanup`, or until a later server finds that its own has ended.

    Attributes:
        name: the path.
    """

    def __init__(self) -> None:
        parent = env.socket_parent()
        _remove_abandoned(Path(parent))
        self._folder = TemporaryDirectory(prefix=env.PREFIX, dir=parent, ignore_cleanup_errors=True)
        self.name = self._folder.name
        self._lock = os.open(f"{self.name}/{LOCK}.new", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(f"{self.name}/{LOCK}.new", f"{self.name}/{LOCK}")  # now others may try the lock

    def cleanup(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()
        os.close(self._lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user whose server has ended. A server that is killed cannot remove its own."""
    for lock in parent.glob(f"{env.PREFIX}*/{LOCK}"):
        with suppress(OSError):
            if lock.parent.lstat().st_uid != os.getuid():
                continue
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
