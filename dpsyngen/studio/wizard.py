"""The way to a training: the images, then what is promised about them.

What was chosen is in the address of the page, so a reload, the way back and a second tab each have what they had.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from nicegui import ui

from dpsyngen.config import Config, default_preset, load_config, preset_names
from dpsyngen.data import ImageDataset
from dpsyngen.data.dataset import NEARLY_BLACK, is_nearly_black
from dpsyngen.data.folder import SHARD_SUFFIXES
from dpsyngen.errors import ConfigError, DpsyngenError, require
from dpsyngen.experiments.cost import hours, training_seconds
from dpsyngen.privacy.accounting import default_delta
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.certificate import number, strength, suspicion
from dpsyngen.studio import look
from dpsyngen.studio.look import Studio
from dpsyngen.training.run import require_new
from dpsyngen.training.session import planned

_EPSILONS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 20.0)
_START = _EPSILONS.index(3.0)
_SHOWN = 16
_KINDS = (".npz", ".npy", *SHARD_SUFFIXES, "idx3-ubyte", "idx3-ubyte.gz")
_METHODS = {
    "instant": "Instant: noisy means and covariances, and a network that programs trained",
    "train": "Train on: the same, then the network learns from the images by DP-SGD",
}


@dataclass(frozen=True)
class Chosen:
    """The images that were chosen, as the page's address has them."""

    source: str = ""
    labels: str = ""
    resolution: str = ""

    def address(self, page: str) -> str:
        """Of `page`, with this in it."""
        return f"{page}?{urlencode({k: v for k, v in vars(self).items() if v})}"

    def settings(self, studio: Studio) -> dict[str, Any]:
        """The same as settings of the section ``data``; ConfigError says what is wrong."""
        labels, size = self.labels.strip(), self.resolution.strip()
        require(size.isdecimal() or not size, "the number of pixels", size, "a whole number, or empty")
        table = str(studio.places.inside(labels, "the table of labels")) if labels else True
        source = studio.places.source(self.source)
        return {"source": source, "labels": table, "resolution": int(size) if size else None, "skip_bad": True}

    def read(self, studio: Studio) -> ImageDataset:
        """The images; what cannot be read is left out, and told."""
        return studio.images(**self.settings(studio))


def register(studio: Studio) -> None:
    """Make the pages."""

    @ui.page("/images")
    async def images(source: str | None = None, labels: str = "", resolution: str = "") -> None:
        with look.frame("Which images?", menu="New generator", step="Images"):
            page = _Images(studio, Chosen(source or "", labels, resolution))
        if source is not None:
            await page.show()

    @ui.page("/promise")
    async def promise(source: str = "", labels: str = "", resolution: str = "") -> None:
        chosen = Chosen(source, labels, resolution)
        with look.frame("What is promised?", menu="New generator", step="Promise"):
            notice, main = look.Notice(), ui.element("div")
        await ui.context.client.connected()
        dataset = await notice.attempt("reading the images …", lambda: studio.work(chosen.read, studio))
        with main:
            if dataset is None:
                look.link("Choose the images", chosen.address("/images"))
            else:
                _Promise(studio, chosen, dataset)


def found_in(folder: Path, runs: Path) -> list[str]:
    """Names of what may be images in a folder: sub-folders, without that of the runs, and files of kinds we read."""
    entries = sorted(e.name for e in os.scandir(folder) if e.is_dir() or e.name.lower().endswith(_KINDS))
    return [e for e in entries if e[0] not in "._" and folder / e != runs]


class _Images:
    def __init__(self, studio: Studio, chosen: Chosen) -> None:
        self.studio, self.chosen, here = studio, chosen, studio.places.folders[0]
        look.say(
            "A folder of pictures (PNG, JPEG, DICOM, …; its sub-folders are classes), a file of images (.npz, Parquet, "
            "tar), or a public set to try it out.  They stay where they are."
        )
        with ui.element("form"):  # of the browser's own kind: whoever types ahead of the connection loses nothing
            with ui.element("div").classes("form"):
                self.source = look.field("Folder, file or public set", chosen.source).props("autofocus name=source")
                look.button("Look at them", None).props("type=submit")
            with ui.element("div").classes("chips note"):
                look.tag("span", "Found here:")
                for name in ["digits", "fashion-mnist", *found_in(here, studio.places.runs)[:10]]:
                    look.button(name, lambda name=name: self.source.set_value(name), "other")
            opened = bool(chosen.labels or chosen.resolution)
            with ui.expansion("More", value=opened), ui.element("div").classes("form"):
                look.field("Table of their labels (CSV), if there is one", chosen.labels).props("name=labels")
                look.field("Pixels a side, if not as found", chosen.resolution, look="small").props("name=resolution")
        self.notice, self.result = look.Notice(), ui.element("div")

    async def show(self) -> None:
        await ui.context.client.connected()
        self.studio.images.cache_clear()  # the files may have changed
        work = partial(self.studio.work, self.chosen.read, self.studio)
        dataset = await self.notice.attempt("reading the images …", work)
        if dataset is not None:
            with self.result:
                _found(self.chosen, dataset)


def _found(chosen: Chosen, dataset: ImageDataset) -> None:
    count, names, side = len(dataset), dataset.class_names, dataset.resolution
    size = f"{side}×{side}, {'grey' if dataset.channels == 1 else 'colour'}"
    rows = [("images", f"{count:,}"), ("size as used", size), ("classes", str(len(names) or "none"))]
    look.facts([*rows, ("from", dataset.source)])
    if names:
        look.say(f"Classes: {', '.join(names[:30])}{' …' if len(names) > 30 else ''}", "note")
    look.say("The number of images, their size and the names of the classes become public with a release.", "note")
    for text in dataset.ignored:
        look.say(f"Not used: {text}.", "note")
    if is_nearly_black(dataset):
        look.tag("div", NEARLY_BLACK, "problem")
    if dataset.skipped:
        listed = "\n".join([*dataset.skipped[:20], *(["…"] if len(dataset.skipped) > 20 else [])])
        text = f"{len(dataset.skipped):,} cannot be read, and will be left out (PRIVATE):\n{listed}"
        look.tag("div", text, "problem")
    if count:
        with look.card(f"{min(_SHOWN, count)} of them", "private"):
            images = dataset.batch(range(0, count, max(1, count // _SHOWN))[:_SHOWN])
            look.html(look.picture(images, "some of the private images", 8, 64))
            look.say("Shown on this page only; the browser keeps no copy.", "note")
        with ui.element("div").classes("buttons"):
            look.link("Go on: what is promised", chosen.address("/promise"))


class _Promise:
    def __init__(self, studio: Studio, chosen: Chosen, dataset: ImageDataset) -> None:
        self.studio, self.chosen, self.dataset = studio, chosen, dataset
        look.say(
            "Noise hides what any one image had to do with the generator.  ε says how well: smaller is safer, and the "
            "images become worse.  Once a generator is published, its ε is spent."
        )
        with look.card(""):
            with ui.element("div").classes("form"):
                self.epsilon = look.number("ε", _EPSILONS[_START], self._tell)
                self.delta = look.field("δ", f"{default_delta(max(len(dataset), 2)):g}", self._tell, "small")
                self.group = look.number("Images of one person", 1, self._tell)
            self.slider = ui.slider(min=0, max=len(_EPSILONS) - 1, step=1, value=_START).props("markers snap")
            self.slider.props('aria-label="ε, from safer to better images"')
            self.slider.on("update:model-value", lambda e: self.epsilon.set_value(_EPSILONS[int(e.args)]))
            look.html("<span>← safer</span><span>better images →</span>").classes("ends")
            self.words = ui.element("div").props('aria-live="polite"')
        with look.card("How"):
            self.method = ui.radio(_METHODS, value="instant", on_change=self._measure).props('aria-label="How"')
            with ui.expansion("For experts"), ui.element("div").classes("form"):
                self.preset = ui.select(list(preset_names()), label="Preset", value=default_preset("auto"))
                self.preset.props("outlined").classes("small").on_value_change(self._measure)
                self.budget = look.field("Budget file that all runs on these images share", act=self._tell)
            self.time = look.say("", "note").props('role="status"')
        with look.card("Start"):
            with ui.element("div").classes("form"):
                name = Path(dataset.source.split(":")[0]).stem or "run"
                self.name = look.field("Name of the run", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
                look.button("Start training", self._start)
            self.problem = look.Notice()
        self._tell()
        ui.timer(0.1, self._measure, once=True)

    def _asked(self) -> Config:
        epsilon, group, budget = self.epsilon.value, self.group.value, (self.budget.value or "").strip()
        require(epsilon, "ε", epsilon, "a number above 0")
        require(group and group == int(group), "the number of images of one person", group, "a whole number")
        try:
            delta = float(self.delta.value)
        except ValueError:
            raise ConfigError(f"δ is {self.delta.value!r}, but must be a number such as 1e-5.") from None
        file = str(self.studio.places.inside(budget, "the budget file")) if budget else None
        settings: dict[str, Any] = {
            "data": self.chosen.settings(self.studio),
            "privacy": {"epsilon": epsilon, "delta": delta, "group_size": int(group), "budget": file},
            "stages": {"variant": "instant"} if self.method.value == "instant" else {},
            "logging": {"pictures": 5},
        }
        return load_config(settings, preset=self.preset.value)

    def _tell(self) -> None:
        if self.epsilon.value:
            self.slider.set_value(min(range(len(_EPSILONS)), key=lambda i: abs(_EPSILONS[i] - self.epsilon.value)))
        self.words.clear()
        with self.words:
            try:
                _words(self._asked())
            except (DpsyngenError, OSError) as error:
                look.tag("div", str(error), "problem")

    async def _measure(self) -> None:
        self.time.set_content("How long it will take: trying a few steps on this machine …")
        try:
            config, plan = await self.studio.work(planned, self._asked(), self.dataset)
            seconds, cores = await self.studio.work(training_seconds, config, plan.shape), len(os.sched_getaffinity(0))
        except (DpsyngenError, RuntimeError, OSError) as error:
            self.time.set_content(escape(f"How long it will take is not known: {error}"))
            return
        between = f"about {hours(seconds / cores)} to {hours(seconds)}" if seconds > 45 else "less than a minute"
        self.time.set_content(f"It will take {between} on this machine's {cores} cores, by a few steps tried.")

    async def _start(self) -> None:
        async def begin() -> str:
            asked, name = self._asked(), (self.name.value or "").strip()
            path = self.studio.places.path_of(name)
            require_new(path)
            await self.studio.work(planned, asked, self.dataset)
            self.studio.jobs.train(path, asked)
            return name

        if (name := await self.problem.attempt("checking the plan …", begin)) is not None:
            ui.navigate.to(f"/run/{name}/train")


def _words(config: Config) -> None:
    p, delta = config.privacy, config.privacy.delta or 0.0
    by_person = p.most_per_person is not None
    with ui.element("div").classes("two"):
        for headline, text in suspicion(p.epsilon, delta, p.group_size, by_person):
            with ui.element("div"):
                look.say(headline, "big")
                look.say(text, "note")
    look.say(strength(p.epsilon, delta, by_person))
    if p.budget is not None:
        budget = Budget(Path(p.budget))
        taken = budget.epsilon() if budget.charges else 0.0
        of = f"{number(budget.epsilon_limit)} at δ = {number(budget.delta, 3)}"
        look.say(f"The budget file: ε = {number(taken, up=True)} of {of} is taken, by {len(budget.charges)} runs.")
