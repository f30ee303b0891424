"""Compile a constraint that takes long, in a process that a test kills. It prints the id of the compiling process."""

import asyncio
import sys

from grammar_sampling import tokenizer_info

from yuan_grpc.server.engine.types import Constraint
from yuan_grpc.server.engine.vllm.constraints.compiler import ConstraintCompiler


async def main() -> None:
    """Compile the regular expression that is the first argument."""
    options = {"any_whitespace": True, "separators": None}
    constraints = ConstraintCompiler(
        lambda: {"tokenizer": tokenizer_info().serialize_json(), "json_options": options}, seconds=600
    )
    await constraints.check(Constraint("regex", "a"))
    process = constraints._process._process
    assert process is not None
    print(process.pid, flush=True)
    await constraints.check(Constraint("regex", sys.argv[1]))


if __name__ == "__main__":
    asyncio.run(main())
