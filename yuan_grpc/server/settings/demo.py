"""The models in the package: the trained demo, and published shapes with random weights for load tests."""

import argparse
from importlib.resources import files

DEMO = str(files("yuan_grpc") / "demo")
DEMO_NAME = "yuan-demo"
DEMO_FLAGS = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "128M")
"""vLLM flags for the 9 MB demo. Favor exactness; skip compilation, which would take longer than a typical demo."""

LOAD_TEST = f"{DEMO}/2b-shape"
LOAD_TEST_NAME = "yuan-2b-shape"
M32_LOAD_TEST = f"{DEMO}/m32-shape"
M32_LOAD_TEST_NAME = "yuan-m32-shape"
LOAD_TEST_FLAGS = ("--load-format", "dummy", "--tokenizer", DEMO)
"""vLLM flags for folders without weights and without a tokenizer."""

CHOICES = {"small": DEMO, "2b-shape": LOAD_TEST, "m32-shape": M32_LOAD_TEST}
NAMES = {DEMO: DEMO_NAME, LOAD_TEST: LOAD_TEST_NAME, M32_LOAD_TEST: M32_LOAD_TEST_NAME}
FLAGS = {DEMO: DEMO_FLAGS, LOAD_TEST: LOAD_TEST_FLAGS, M32_LOAD_TEST: LOAD_TEST_FLAGS}

BANNERS = {
    DEMO: (
        "the demo, a 4-million-parameter model that knows a few dozen facts\n"
        "           serve a real one with --model FOLDER or --model IEITYuan/Yuan2-2B-hf"
    ),
    LOAD_TEST: "the shape of Yuan2.0-2B with random weights, for load tests; its output is noise",
    M32_LOAD_TEST: "the shape of Yuan2.0-M32 with random weights, for load tests; its output is noise",
}
"""Lines of the banner that describe these models."""


def add_option(options: argparse._ActionsContainer) -> None:
    """Add `--demo`, which selects a model of the package in place of `--model`."""
    options.add_argument(
        "--demo",
        dest="model",
        default=argparse.SUPPRESS,
        type=parse_name,
        metavar="NAME",
        help="small, or 2b-shape, m32-shape for load tests",
    )


def parse_name(text: str) -> str:
    """Return the folder of a model in the package."""
    if text in CHOICES:
        return CHOICES[text]
    *others, last = CHOICES
    raise argparse.ArgumentTypeError(f"must be {', '.join(others)} or {last}, not {text!r}")
