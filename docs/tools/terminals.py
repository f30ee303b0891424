"""Pictures of terminals with real output: `python docs/tools/terminals.py` runs the commands against the demo model.

Needs the server's packages. The report's page is drawn if Chromium is installed.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.sax.saxutils import escape

from drawing import PICTURES

ROOT = Path(__file__).parents[2]
COLUMNS = 96
_CELL, _LINE = 8.4, 20
_BACK, _INK, _PROMPT, _DIM = "#16202c", "#e4e9f0", "#7dd3a8", "#8b98a8"
_SPACE = "\N{NO-BREAK SPACE}"
"""Browsers join several spaces of a text in SVG."""
_FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', 'Noto Sans Mono CJK SC', monospace"
CHAT = ("法国的首都是哪里", "那日本呢", "what is TTFT?")
SUITE = "clients/humaneval/demo.jsonl"


def terminal(title: str, lines: Sequence[str]) -> str:
    """Return a picture of a terminal. Lines that begin with `$ ` or `> ` were typed."""
    rows = [part for line in lines for part in wrap(line)]
    width, height = round(COLUMNS * _CELL + 40), 52 + _LINE * len(rows)
    dots = "".join(f"<circle cx='{20 + 18 * place}' cy='18' r='5' fill='{_DIM}'/>" for place in range(3))
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' "
        f"width='{width}' height='{height}'>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{width}' height='{height}' rx='9' fill='{_BACK}'/>{dots}",
        f'<g font-family="{_FONT}" font-size="14" fill="{_INK}">',
    ]
    for number, row in enumerate(rows):
        color = f" fill='{_PROMPT}'" if row.startswith(("$ ", "> ")) else ""
        parts.append(f"<text x='20' y='{52 + _LINE * number}'{color}>{escape(row).replace(' ', _SPACE)}</text>")
    return "\n".join([*parts, "</g>", "</svg>\n"])


def wrap(line: str) -> list[str]:
    """Return a line in parts that fit, counting wide characters twice."""
    rows, used = [""], 0
    for character in line:
        cells = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + cells > COLUMNS:
            rows, used = [*rows, ""], 0
        rows[-1] += character
        used += cells
    return rows


@contextmanager
def demo_server(folder: Path) -> Iterator[str]:
    """Run `yuan-grpc serve` and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "yuan_grpc", "serve", "--port", str(port)]
        process = subprocess.Popen(command, stderr=file, cwd=ROOT)
    try:
        address = f"127.0.0.1:{port}"
        wait_until_ready(process, address, log)
        yield address
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until the server answers, or raise RuntimeError with its last line if it ends."""
    from yuan_grpc.client import Client, DeadlineError

    with Client(address) as client:
        while process.poll() is None:
            try:
                return client.wait_until_ready(timeout=5)
            except DeadlineError:
                continue
    raise RuntimeError(log.read_text("utf-8").splitlines()[-1])


def run(address: str, command: str, lines: str = "") -> list[str]:
    """Run a command as a shell does, and return it with its output."""
    environment = os.environ | {"YUAN_GRPC_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    program = f"{sys.executable} -m yuan_grpc"
    done = subprocess.run(
        command.replace("yuan-grpc", program, 1),
        shell=True,
        check=True,
        env=environment,
        cwd=ROOT,
        input=lines,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return [f"$ {command}", *done.stdout.rstrip("\n").replace(address, "127.0.0.1:50051").split("\n")]


def chat(address: str) -> list[str]:
    """Return a conversation, with each question before its answer."""
    command, *answers = run(address, "yuan-grpc chat --top-k 1", "\n".join(CHAT) + "\n")
    turns = [line for pair in zip(CHAT, answers, strict=True) for line in (f"> {pair[0]}", pair[1].strip())]
    return [command, *turns]


def humaneval(address: str, folder: Path) -> list[str]:
    """Return the three commands of HumanEval with their output."""
    runs = folder / "runs"
    commands = (
        f"yuan-grpc humaneval generate {runs}/demo --prompts {SUITE} --target {address}",
        f"yuan-grpc humaneval score {runs}/demo --problems {SUITE}",
        f"yuan-grpc humaneval report {runs}/demo --no-plot",
    )
    lines = [line for command in commands for line in ["", *run(address, command)]][1:]
    return [
        line.replace(f" --target {address}", "").replace(str(runs), "runs").replace(address, "127.0.0.1:50051")
        for line in lines
    ]


def draw_report(folder: Path) -> None:
    """Draw the top of the report's page."""
    if browser := shutil.which("chromium"):
        page = (folder / "runs/demo/report.html").as_uri()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,760"]
        picture = f"--screenshot={PICTURES / 'report.png'}"
        subprocess.run([browser, *options, picture, page], check=True, capture_output=True)


def main() -> None:
    """Run the commands and write the pictures."""
    with tempfile.TemporaryDirectory() as name, demo_server(folder := Path(name)) as address:
        ask = run(address, 'yuan-grpc generate "世界上最高的山是什么" --max-tokens 32 --top-k 1')
        pictures = {
            "quickstart": ("The demo answers a prompt and a conversation", [*ask, "", *chat(address)]),
            "bench": ("Output of yuan-grpc bench", run(address, "yuan-grpc bench --concurrency 1,8,64 --seconds 3")),
            "humaneval": ("Output of the commands of HumanEval", humaneval(address, folder)),
        }
        for picture, (title, lines) in pictures.items():
            plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
            (PICTURES / f"{picture}.svg").write_text(terminal(title, plain), "utf-8")
        draw_report(folder)


if __name__ == "__main__":
    main()
