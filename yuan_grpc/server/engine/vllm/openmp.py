"""The OpenMP library that torch and the code it compiles must share."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("libgomp", "libomp", "libiomp")


def restart_with_library(command: str) -> None:
    """Replace this process by one that has loaded torch's OpenMP library first, unless it has one already.

    vLLM lets its workers load it like that, so that the model and code that is compiled later use one pool of threads.
    A fork can have it only if this process has it.

    Args:
        command: the first argument of the process; one with another is not replaced, but has called this as a library.
    """
    if sys.argv[1:2] != [command]:
        return
    loaded = os.environ.get("LD_PRELOAD", "")
    spec = find_spec("torch")
    if any(name in loaded for name in LIBRARIES) or spec is None or not spec.submodule_search_locations:
        return
    torch = Path(spec.submodule_search_locations[0])
    found = sorted([*torch.parent.glob("torch.libs/libgomp*.so*"), *torch.glob("lib/libgomp*.so*")])
    if found:
        os.environ["LD_PRELOAD"] = f"{loaded}:{found[0]}" if loaded else str(found[0])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
