"""A page in headless Chromium, driven through the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --remote-debugging-pipe"


def find_chromium() -> str:
    """Return the path of a Chromium; skip the test where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    return path or pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")


class Page:
    """A page; the browser answers each message before the next one is sent."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb")
        self._ids = itertools.count(1)
        self._session = ""
        self.events: list[dict[str, Any]] = []

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        message = {"id": next(self._ids), "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != message["id"]:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression. The page's own policy does not apply to it."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def resize(self, width: int, height: int = 800, *, dark: bool = False) -> None:
        """Set the size of the window and the preferred color scheme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def click(self, selector: str) -> None:
        """Click on the middle of the first element that the selector matches."""
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = self.evaluate(f"[{box}.x + {box}.width / 2, {box}.y + {box}.height / 2]")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page."""
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """Close the pipes, which ends the browser."""
        self._commands.close()
        self._answers.close()

    def _read(self) -> dict[str, Any]:
        buffer = bytearray()
        while (byte := self._answers.read(1)) not in (b"\0", b""):
            buffer += byte
        assert buffer, "the browser has ended"
        message: dict[str, Any] = json.loads(buffer)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def open_page(path: Path, profile: Path) -> Iterator[Page]:
    """Open a file in a browser with an empty profile."""
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    # The protocol's descriptors in the browser are 3 and 4.
    redirect = f'exec 3<&{command_read} 4>&{answer_write}; exec "$@"'
    line = ["/bin/bash", "-c", redirect, "bash", find_chromium(), *FLAGS.split(), f"--user-data-dir={profile}"]
    with subprocess.Popen(
        line, pass_fds=(command_read, answer_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as browser:
        os.close(command_read)
        os.close(answer_write)
        page = Page(command_write, answer_read)
        try:
            page.open(path)
            yield page
        finally:
            page.close()
            browser.terminate()
