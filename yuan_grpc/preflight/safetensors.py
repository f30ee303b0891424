"""The header of a safetensors file, and its consistency with the file's size."""

import json
from dataclasses import dataclass
from pathlib import Path

MAX_HEADER = 100_000_000
"""Maximum size of a header, in bytes, as in the safetensors library."""
LENGTH_BYTES = 8


@dataclass(frozen=True)
class Header:
    """Shapes by name, and the size of all weights in bytes."""

    shapes: dict[str, tuple[int, ...]]
    data_bytes: int


def read_header(file: Path) -> Header:
    """Read the header, and check that the file has all the data it lists.

    Raises:
        ValueError: the file is truncated or damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or not 0 < length <= min(MAX_HEADER, size - LENGTH_BYTES):
            raise ValueError(f"its header is cut off after {size} bytes")
        try:
            entries = json.loads(opened.read(length))
            weights = {name: entry for name, entry in entries.items() if name != "__metadata__"}
            shapes = {name: tuple(entry["shape"]) for name, entry in weights.items()}
            data_bytes = max((entry["data_offsets"][1] for entry in weights.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError("its header is not readable") from None
    if (expected := LENGTH_BYTES + length + data_bytes) != size:
        raise ValueError(f"it must have {expected} bytes, not {size}")
    return Header(shapes, data_bytes)
