"""Detection of changed files."""

from pathlib import Path


def file_version(file: Path) -> object:
    """Return what changes with the contents of a file, also if a link to it is replaced; None if it is missing."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
