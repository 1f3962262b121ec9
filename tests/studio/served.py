"""A studio in a process of its own, and a browser to look at it with."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.report.chromium import find

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("nicegui", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if find() else ["chromium"]
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
PATIENCE = 150_000  # milliseconds
SHOTS = os.environ.get("DPSYNGEN_SCREENSHOTS")
LARGEST = 300_000  # bytes


class Served:
    """`dpsyngen studio` in `home`; `link` is the last one that it told."""

    def __init__(self, home: Path, *options: str) -> None:
        self.home = home
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.errors = open(home / "studio.err", "ab")  # noqa: SIM115
        command = [sys.executable, "-m", "dpsyngen", "studio", "--no-browser", *options]
        self.process = subprocess.Popen(
            command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.link = self.told()

    def told(self) -> str:
        """The next link that the terminal shows."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    @property
    def address(self) -> str:
        return self.link.partition("/?")[0]

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(30)
        self.errors.close()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def opened(browser: Any, served: Served, killed: bool = False, **context: Any) -> Iterator[Any]:
    """A page of a browser that followed the link; what is wrong with any page in it fails the test at the end.

    Where the studio is `killed` meanwhile, the browser says that it is gone, and nothing else is to be wrong.
    """
    within = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **context})
    within.set_default_timeout(PATIENCE)
    wrong: list[str] = []

    def watch(page: Any) -> None:
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: wrong.append(r.url) if foreign(r.url) else None)

    def foreign(url: str) -> bool:
        own = (served.address, served.address.replace("http", "ws"), "data:", "blob:")
        return not url.startswith(own)

    within.on("page", watch)
    page = within.new_page()
    page.goto(served.link)
    page.wait_for_selector("main h1")
    served.link = served.told()
    yield page
    within.close()
    left = [text for text in wrong if not (killed and ("WebSocket" in text or "ERR_CONNECTION" in text))]
    assert not left, "\n".join(left)


def wait_until(done: Any, seconds: float = 60.0) -> None:
    """Wait until `done()`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.2)


def shot(page: Any, name: str, tall: int = 1100) -> None:
    """A picture of the page for the documentation, if asked for: with few colours, so that it is small."""
    if SHOTS:
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(600)
        bottom = page.evaluate("document.querySelector('.nicegui-content').getBoundingClientRect().bottom + scrollY")
        height = min(tall, round(bottom) + 40)
        path = ROOT / SHOTS / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": 1100, "height": height})
        with Image.open(path) as picture:
            picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        assert path.stat().st_size < LARGEST


def connected(page: Any) -> None:
    """Before it has its connection a page keeps what is done to it, but a click may come before what was typed."""
    page.wait_for_function("() => window.did_handshake")


def press(page: Any, name: str) -> None:
    connected(page)
    page.get_by_role("button", name=name, exact=True).click()


def fill(page: Any, label: str, value: str) -> None:
    connected(page)
    page.get_by_label(label).first.fill(value)


def follow(page: Any, name: str) -> None:
    page.get_by_role("link", name=name).first.click()


def problem(page: Any, text: str) -> None:
    """Wait until the page tells this problem."""
    page.locator(".problem", has_text=text).first.wait_for()


def refused(page: Any, button: str, label: str, value: str, told: str) -> None:
    """Wait until the page tells what is wrong with `value`, and put back what was there."""
    before = page.get_by_label(label).first.input_value()
    fill(page, label, value)
    press(page, button)
    problem(page, told)
    fill(page, label, before)
