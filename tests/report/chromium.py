"""Opening a page in headless Chromium, over the DevTools protocol on a pair of pipes; nothing but Python is needed.

    page = inspect("report.html", width=360, dark=True)
    assert page.errors == page.requests == page.broken == []
    assert page.overflow == 0

The first call starts a browser, which later calls share and which ends with the process.
"""

from __future__ import annotations

import atexit
import base64
import functools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 60.0  # seconds for one answer: the machine may be busy

# Pipes 3 and 4 are where the browser reads and writes; dup2 in a child of subprocess could hit a pipe of its own.
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]

_LOOK = """
(async () => {
  const broken = [];
  for (const image of document.images) {
    try { await image.decode(); } catch { /* said below */ }
    if (!image.naturalWidth) broken.push((image.alt || image.currentSrc).slice(0, 200));
  }
  const root = document.documentElement;
  return {
    broken, images: document.images.length, text: document.body.innerText,
    width: Math.max(root.scrollWidth, document.body.scrollWidth),
    height: Math.ceil(root.getBoundingClientRect().height),
  };
})()
"""


def find() -> str | None:
    """The browser's path; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


needs_chromium = pytest.mark.skipif(find() is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")


@dataclass
class Page:
    """What a page did.

    Attributes:
        errors: messages of the console, exceptions, and what the browser's log says, such as a refused load.
        requests: addresses that the page asked for, besides its own and ``data:``, refused ones too.
        broken: alternative texts of images that were not decoded.
        images: how many images there are.
        overflow: pixels by which the page is wider than the window.
        text: as the page shows it.
        value: of the expression that was asked for.
        screenshot: PNG of the whole page, if asked for.
        pdf: of the printed page, if asked for.
    """

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    images: int = 0
    overflow: int = 0
    text: str = ""
    value: Any = None
    screenshot: bytes = b""
    pdf: bytes = b""


class Browser:
    """A running Chromium with a profile of its own.

    Raises:
        RuntimeError: there is none, it does not answer, or it refuses a command.
    """

    def __init__(self) -> None:
        path = find()
        if path is None:
            raise RuntimeError(f"none of {', '.join(NAMES)} is installed.")
        self._profile = tempfile.mkdtemp(prefix="dpsyngen-chromium-")
        its_in, self._out = os.pipe()
        self._in, its_out = os.pipe()
        command = [sys.executable, "-c", _LAUNCH, str(its_in), str(its_out), path, *_FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={self._profile}", "about:blank"],
            pass_fds=(its_in, its_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        self._number, self._unread = 0, b""
        self._events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the browser and remove its profile."""
        if self._process.poll() is None:
            try:
                self._call("Browser.close")
                self._process.wait(20)
            except (RuntimeError, OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for end in (self._in, self._out):
            os.close(end)
        shutil.rmtree(self._profile, ignore_errors=True)

    def inspect(
        self,
        path: str | os.PathLike[str],
        *,
        width: int = 1200,
        dark: bool = False,
        media: str = "screen",
        expression: str = "",
        screenshot: bool = False,
        pdf: bool = False,
    ) -> Page:
        """Open a file and look at it.

        Args:
            path: the HTML file.
            width: of the window in CSS pixels; up to 600 it is a phone's.
            dark: the colour scheme that the reader prefers.
            media: "screen" or "print", of whose rules the page is shown with.
            expression: JavaScript (an expression, or a promise) whose value, JSON-able, is wanted.
            screenshot: take a picture of the whole page.
            pdf: print it.
        """
        address = Path(path).resolve().as_uri()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        call = functools.partial(self._call, session=session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            call(f"{domain}.enable")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width <= 600}
        call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._events.clear()
        call("Page.navigate", url=address)
        self._until(lambda event: event["method"] == "Page.loadEventFired")
        seen = self._evaluate(session, _LOOK)
        page = Page(**{name: seen[name] for name in ("broken", "images", "text")})
        page.overflow = max(0, seen["width"] - width)
        if expression:
            page.value = self._evaluate(session, expression)
        if screenshot:
            call("Emulation.setDeviceMetricsOverride", **{**size, "height": min(seen["height"], 16_000)})
            shot = call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
            page.screenshot = base64.b64decode(shot["data"])
        if pdf:
            call("Emulation.setEmulatedMedia", media="", features=[scheme])
            page.pdf = base64.b64decode(call("Page.printToPDF", preferCSSPageSize=True)["data"])
        for event in self._events:
            if event.get("sessionId") == session:
                _note(page, event["method"], event["params"], address)
        self._call("Target.closeTarget", targetId=target)
        return page

    def _evaluate(self, session: str, expression: str) -> Any:
        answer = self._call(
            "Runtime.evaluate", session=session, expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"the expression failed: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def _call(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        left = json.dumps(message).encode() + b"\0"
        while left:
            left = left[os.write(self._out, left) :]
        answer = self._until(lambda message: message.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method} was refused: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _until(self, wanted: Any) -> dict[str, Any]:
        """The first message that is wanted, among events that came already or will; events are kept."""
        for event in self._events:
            if wanted(event):
                return event
        deadline = time.monotonic() + _PATIENCE
        while True:
            message = self._receive(deadline)
            if "method" in message:
                self._events.append(message)
            if wanted(message):
                return message

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._in, 2**20) if ready else b""
            if not part:
                raise RuntimeError(f"the browser {'ended' if ready else f'said nothing for {_PATIENCE:g} s'}.")
            self._unread += part
        message, self._unread = self._unread.split(b"\0", 1)
        decoded: dict[str, Any] = json.loads(message)
        return decoded


def _note(page: Page, method: str, params: dict[str, Any], address: str) -> None:
    if method == "Runtime.exceptionThrown":
        page.errors.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
    elif method == "Runtime.consoleAPICalled":
        page.errors.append(f"console: {[a.get('value', a.get('description')) for a in params['args']]}")
    elif method == "Log.entryAdded":
        page.errors.append(f"{params['entry']['level']}: {params['entry']['text']}")
    elif method == "Network.requestWillBeSent":
        asked = params["request"]["url"]
        if asked != address and not asked.startswith("data:"):
            page.requests.append(asked)


@functools.cache
def browser() -> Browser:
    """The browser that all tests of a process share."""
    started = Browser()
    atexit.register(started.close)
    return started


def inspect(path: str | os.PathLike[str], **options: Any) -> Page:
    """Open a file in the shared browser; see :meth:`Browser.inspect`."""
    return browser().inspect(path, **options)
