"""Loss of the demo on its held-out texts with quantized weights, in float32 and on a CPU.

    python benchmarks/quantization.py

Each scheme of `yuan-grpc quantize` is written and read back. Inputs are not rounded here, as int8 and fp8 do when they
are served.
"""

import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from yuan_grpc.demo.training.checkpoint import read
from yuan_grpc.demo.training.evaluation import loss_of
from yuan_grpc.demo.training.held_out import held_out_cases
from yuan_grpc.model.checkpoint.quantize import quantize_checkpoint
from yuan_grpc.model.checkpoint.random import DEMO

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
VARIANTS = (("bfloat16", 0), ("int8", 64), ("fp8", 64), ("int4", 32), ("int4", 64))


def main() -> None:
    """Print a table with a row for each scheme."""
    from quantized import dequantize_compressed

    torch.set_num_threads(1)
    model, tokenizer = read(DEMO)
    print("| weights | group | MB of weights | loss a token | perplexity |\n| --- | --- | --- | --- | --- |")
    for scheme, group_size in VARIANTS:
        with TemporaryDirectory() as scratch:
            folder = DEMO
            if scheme != "bfloat16":
                folder = Path(scratch, "quantized")
                quantize_checkpoint(DEMO, folder, scheme, group_size)
                model.load_state_dict(dequantize_compressed(folder))
            size = (folder / "model.safetensors").stat().st_size / 1e6
        pairs = [loss_of(model, tokenizer, case) for case in held_out_cases()]
        loss = sum(loss for loss, _ in pairs) / sum(tokens for _, tokens in pairs)
        group = group_size if scheme == "int4" else "–"
        print(f"| {scheme} | {group} | {size:.2f} | {loss:.4f} | {math.exp(loss):.4f} |", flush=True)


if __name__ == "__main__":
    main()
