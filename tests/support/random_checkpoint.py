"""A small checkpoint with random weights, for tests whose results must not depend on what the demo has learned.

Its bytes are always the same: tests expect tokens that these weights make likely.
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from yuan_grpc.model.checkpoint.random import train_tokenizer, write_checkpoint
from yuan_grpc.model.tokenizer import MODEL_FILE

CORPUS = Path(__file__).with_name("random_corpus.txt")
NAME = "yuan-demo"
"""Name of the folder, and so of the served model."""

PIECES, SEED = 1152, 2
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 2048,
}


@cache
def random_checkpoint() -> Path:
    """Return the folder of the checkpoint, which is written at the first call and deleted when the process exits."""
    scratch = Path(tempfile.mkdtemp(prefix="yuan-grpc-tests-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return write_random_checkpoint(scratch / NAME)


def write_random_checkpoint(folder: Path) -> Path:
    """Write the checkpoint to a new folder, and return the folder."""
    folder.mkdir()
    train_tokenizer(CORPUS, folder / MODEL_FILE, PIECES)
    write_checkpoint(folder, folder, SIZES, seed=SEED)
    return folder
