"""Time until a server is ready, and the log lines after which it takes longest.

    python benchmarks/start_time.py --model MODEL --rounds 2 yuan vllm-http

Servers are those of `serving.py`, started one after the other in `--rounds` rounds. The first start also compiles what
is not compiled yet. `--out` gets every log message, with the seconds since the start.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Thread

from serving import free_port, server_of, wait_until_ready

SHOWN_WIDTH = 100


@dataclass(frozen=True)
class Line:
    """A line of a log, and the time since the start at which it came, in seconds."""

    seconds: float
    text: str


def measure(name: str, arguments: argparse.Namespace) -> list[Line]:
    """Return the log of a start, whose last line says that the server is ready.

    Raises:
        RuntimeError: it did not start; a note has the last line of its log.
    """
    port = free_port()
    server = server_of(name, arguments.model, port)
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *server.command, *arguments.engine.split()],
        env=os.environ | dict(server.environment) | {"VLLM_LOGGING_LEVEL": "DEBUG"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    output, lines = process.stdout, list[Line]()
    assert output is not None

    def read() -> None:
        lines.extend(Line(time.monotonic() - start, line.rstrip()) for line in output)

    reader = Thread(target=read)
    reader.start()
    try:
        wait_until_ready(server, port, process)
        return [*lines, Line(time.monotonic() - start, "ready")]
    except RuntimeError as error:
        error.add_note(lines[-1].text if lines else "no output")
        raise
    finally:
        process.terminate()
        process.wait()
        reader.join()


def table(lines: Sequence[Line], gap: float) -> str:
    """Return a Markdown table of the lines after which nothing was logged for some time, in seconds."""
    rows = ["| at, s | for, s | after |", "| --- | --- | --- |"]
    for line, following in pairwise([Line(0.0, "start"), *lines]):
        if (seconds := following.seconds - line.seconds) >= gap:
            text = line.text.replace("|", "\\|")[:SHOWN_WIDTH]
            rows.append(f"| {line.seconds:.1f} | {seconds:.1f} | {text} |")
    return "\n".join(rows)


def main() -> None:
    """Start the servers, keep their logs and print where the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="SERVER")
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--engine", default="", metavar="OPTIONS", help="engine options for all servers")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="starts of each server (default: 2)")
    parser.add_argument("--gap", type=float, default=1.0, metavar="SECONDS", help="shortest time shown (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("start-time.log"), metavar="FILE", help="logs are appended")
    arguments = parser.parse_args()
    for number in range(1, arguments.rounds + 1):
        for name in arguments.servers:
            lines = measure(name, arguments)
            title = f"{name}, start {number}: ready after {lines[-1].seconds:.1f} s"
            with arguments.out.open("a") as file:
                print(title, *(f"{line.seconds:8.2f} {line.text}" for line in lines), sep="\n", file=file)
            print(f"{title}\n\n{table(lines, arguments.gap)}\n", flush=True)


if __name__ == "__main__":
    main()
