"""Detection of changed files."""

from pathlib import Path


def file_version(file: Path) -> object:
    """Return a value that changes with a file's contents, or with the target of a link; None if the file is missing."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
