"""`yuan-grpc quantize`: write a quantized copy of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.cli.common.errors import handle_errors
from yuan_grpc.cli.common.install import missing_package
from yuan_grpc.cli.common.terminal import print_error, print_stderr

SCHEMES = ("int4", "int8", "fp8")
GROUP_SIZE = 128

EPILOG = """\
int4 rounds weights to 4 bits with a scale for each group of a row. int8 and fp8
round weights to 8 bits with a scale for each row, and inputs while computing.
Norms, embedding, lm_head and the convolutions of LFA are copied. The format is
that of compressed-tensors; `yuan-grpc serve --model OUT` serves it.
"""


def add_command(commands: Any) -> None:
    """Add the command to the subparsers."""
    parser = commands.add_parser(
        "quantize",
        help=SUMMARIES["quantize"],
        description="Write a quantized copy of a checkpoint, by rounding.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", type=Path, help="folder of a checkpoint in safetensors")
    parser.add_argument("target", metavar="OUT", type=Path, help="folder to create")
    parser.add_argument("--scheme", choices=SCHEMES, required=True, help="how to store the weights")
    parser.add_argument(
        "--group-size", type=int, default=GROUP_SIZE, help="weights with one scale, for int4 (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@handle_errors
def _run(options: argparse.Namespace) -> int:
    try:
        from yuan_grpc.model.checkpoint.quantize import quantize_checkpoint
    except ModuleNotFoundError as error:
        print_error(missing_package(error))
        return 1
    try:
        quantize_checkpoint(options.source, options.target, options.scheme, options.group_size)
    except ValueError as error:
        print_error(str(error))
        return 1
    before, after = map(_weight_bytes, (options.source, options.target))
    print_stderr(f"{options.target}: {after / 1e6:,.0f} MB of weights, from {before / 1e6:,.0f} MB")
    return 0
