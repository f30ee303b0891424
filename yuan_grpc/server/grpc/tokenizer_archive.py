"""The files of a tokenizer as a zip archive, for routers that tokenize themselves."""

import asyncio
import hashlib
import io
import zipfile
from pathlib import Path

from yuan_grpc.server.errors import NotEnabledError

PATTERNS = (
    "tokenizer*.json",
    "tokenizer.model",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
)
"""Files that describe a tokenizer and its model. Code of the checkpoint is not among them."""

_DATE = (1980, 1, 1, 0, 0, 0)


class TokenizerArchive:
    """The archive, created once."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._archive: tuple[bytes, str] | None = None

    async def read(self, model: str, revision: str) -> tuple[bytes, str]:
        """Return the archive and its SHA-256, in hexadecimal.

        Args:
            model: the folder of the model, or its id on the hub.
            revision: the revision of a model from the hub.

        Raises:
            NotEnabledError: the model has no files of a tokenizer.
        """
        async with self._lock:
            if self._archive is None:
                self._archive = await asyncio.to_thread(_create, model, revision)
        return self._archive


def _create(model: str, revision: str) -> tuple[bytes, str]:
    folder = _folder(model, revision)
    paths = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})
    if not paths:
        raise NotEnabledError("the model has no files of a tokenizer")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            # A fixed date, so that all servers of a model return the same archive.
            archive.writestr(zipfile.ZipInfo(path.name, _DATE), path.read_bytes(), zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    return data, hashlib.sha256(data).hexdigest()


def _folder(model: str, revision: str) -> Path:
    """Return the folder of a model, which vLLM has downloaded if it is from the hub."""
    if (folder := Path(model)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision or None, local_files_only=True))
