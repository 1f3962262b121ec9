"""What the pages are made of: their frame, errors in words, forms, pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from html import escape
from importlib import resources
from typing import Any, ParamSpec, TypeVar

import numpy as np
from nicegui import ui
from numpy.typing import NDArray

from dpsyngen.data import load_images
from dpsyngen.errors import DpsyngenError
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.programs.grid import image_grid, png_url
from dpsyngen.report.html import render
from dpsyngen.studio.guard import Places
from dpsyngen.training.progress import Jobs
from dpsyngen.training.run import Run

P = ParamSpec("P")
T = TypeVar("T")
Rows = Sequence[tuple[str, NDArray[np.uint8]]]
STEPS = ("Images", "Promise", "Train", "Look", "Release")
_MENU = (("Runs", "/"), ("New generator", "/images"), ("Check a bundle", "/verify"))
_SHEETS = ("report/templates/style.css", "report/templates/studio.css")
_STYLE = "".join((resources.files("dpsyngen") / name).read_text(encoding="utf-8") for name in _SHEETS)


@contextmanager
def frame(title: str, *, menu: str = "", step: str = "", run: str | None = None) -> Iterator[None]:
    """A page with the heading `title`; what is made within the context is its main part.

    `menu` is the entry of the menu that it is, `step` the one of STEPS, and `run` the run that it is about.
    """
    ui.page_title(f"{title} · dpsyngen studio")
    ui.colors(primary="#0f766a")
    ui.add_head_html(f"<style>@layer components {{\n{_STYLE}\n}}</style>")
    with ui.element("header").classes("top"), ui.element("div").classes("page"):
        ui.link("dpsyngen studio", "/").classes("name")
        with ui.element("nav").props('aria-label="Menu"'):
            for text, target in _MENU:
                ui.link(text, target).props('aria-current="page"' if text == menu else "")
    with ui.element("div").classes("page"):  # within the library's own <main>
        if step:
            with ui.element("nav").props('aria-label="Steps"'):
                html("".join(_step(n, text, step, run) for n, text in enumerate(STEPS, 1)), "ol").classes("steps")
        tag("h1", title)
        yield


def _step(number: int, text: str, now: str, run: str | None) -> str:
    target = "/images" if text == "Images" else f"/run/{run}/{text.lower()}" if run and number > 2 else ""
    inner = f'<span class="number" aria-hidden="true">{number}</span>{text}'
    name, link = ("a", f' href="{escape(target)}"') if target else ("span", "")
    return f"<li><{name}{link}{' aria-current=step' if text == now else ''}>{inner}</{name}></li>"


def html(markup: str, name: str = "div") -> ui.html:
    """An element with markup, in which whatever comes from elsewhere has been escaped."""
    return ui.html(markup, sanitize=False, tag=name)


def tag(name: str, text: str, look: str = "") -> ui.html:
    """An element with a text, which is escaped."""
    return html(escape(text), name).classes(look)


def say(text: str, look: str = "") -> ui.html:
    """A paragraph."""
    return tag("p", text, look)


def link(text: str, target: str) -> ui.link:
    """A link that looks like a button."""
    return ui.link(text, target).classes("button")


def button(text: str, act: Callable[..., Any] | None, look: str = "main") -> ui.button:
    """A button: "main", "other" or "danger"."""
    return ui.button(text, on_click=act).classes(look).props("unelevated no-caps")


def field(label: str, value: str = "", act: Callable[..., Any] | None = None, look: str = "grow") -> ui.input:
    """A field for a text."""
    return ui.input(label, value=value, on_change=act).props("outlined").classes(look)


def number(label: str, value: float | None, act: Any = None) -> ui.number:
    """A field for a number.  One out of range is refused in words where it is used, and not replaced by another."""
    return ui.number(label, value=value, on_change=act).props("outlined").classes("small")


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values, side by side."""
    cells = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in rows)
    html(cells, "dl").classes("facts")


@contextmanager
def card(title: str, look: str = "card") -> Iterator[None]:
    """A part of the page; with the look "private" one that must not leave the room, and says so."""
    mark = ' <span class="tag">PRIVATE</span>' if look == "private" else ""
    with ui.element("section").classes(look):
        if title:
            html(escape(title) + mark, "h2")
        yield


def picture(images: NDArray[np.uint8], alt: str, columns: int = 12, side: int = 48) -> str:
    """Markup of images side by side: inside the page, so that the browser has no file to keep."""
    grid = image_grid(images, columns, scale=max(1, round(side / images.shape[-1])), pad=3)
    return f'<img src="{png_url(grid)}" alt="{escape(alt)}" width="{grid.width}" height="{grid.height}">'


def class_rows(rows: Rows, what: str) -> None:
    """Rows of images, one a class."""
    for name, images in rows:
        alt, caption = (f"{what} of class {name}", f"<figcaption>{escape(name)}</figcaption>") if name else (what, "")
        html(caption + picture(images, alt), "figure").classes("class-row" if name else "class-row plain")


def part(macro: str, **values: Any) -> None:
    """A macro of the reports' ``parts.html.j2``, such as ``figures(table, caption)``."""
    html(render("part.html.j2", {"macro": macro, "values": values}))


class Notice:
    """A place on the page for what goes on and what went wrong; screen readers say it."""

    def __init__(self) -> None:
        self._going = ui.element("div").props('role="status"')
        self._wrong = ui.element("div").props('role="alert"')

    def say(self, going: str = "", wrong: str = "") -> None:
        """Say what is being done, or what went wrong, in place of what was said before."""
        self._going.clear()
        self._wrong.clear()
        if going:
            with self._going, ui.element("div").classes("chips note"):
                ui.spinner(size="1.2em").props('aria-hidden="true"')
                tag("span", going)
        if wrong:
            with self._wrong:
                tag("div", wrong, "problem")

    async def attempt(self, text: str, work: Callable[[], Awaitable[T]]) -> T | None:
        """Do `work`, and say its error if there is one; None then.  Of two at once the later one has the word."""
        self._latest = mine = object()
        self.say(text)
        result, wrong = None, "This is a defect of the studio: the terminal in which it runs says more."
        try:
            result, wrong = await work(), ""
        except (DpsyngenError, OSError) as error:
            wrong = str(error)
        finally:
            if self._latest is mine:
                self.say(wrong=wrong)
        return result


class Studio:
    """What the pages share: the files that may be touched, and the commands that were started."""

    def __init__(self, places: Places) -> None:
        self.places, self.jobs = places, Jobs(places.runs / ".studio")
        # One thing at a time: what draws and reads has one set of cores, and modes that belong to the process.
        self._worker = ThreadPoolExecutor(1, "studio")
        self.images = lru_cache(maxsize=1)(load_images)
        self._generators = lru_cache(maxsize=4)(lambda release, changed: ReleasedGenerator(release))

    async def work(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `act`, computed beside the server, after all that was asked for before."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, partial(act, *args, **kwargs))

    def generator(self, run: Run) -> ReleasedGenerator:
        """Of a finished run; the last few are kept."""
        return self._generators(run.release, (run.release / "generator.json").stat().st_mtime)
