"""The pages of one run: its training, what it draws, its release."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from nicegui import ui
from PIL import Image

from dpsyngen.errors import DpsyngenError, require
from dpsyngen.evaluation.doctor import diagnose
from dpsyngen.evaluation.run import generated_beside_real
from dpsyngen.experiments.cost import hours
from dpsyngen.generator.guarantee import Guarantee
from dpsyngen.privacy.certificate import number
from dpsyngen.programs.grid import png_url
from dpsyngen.release.bundle import Packed, pack, require_ready
from dpsyngen.release.signing import make_key
from dpsyngen.report.html import (
    class_images,
    copied,
    figure_table,
    loss_charts,
    measured,
    trajectory_table,
    write_report,
)
from dpsyngen.studio import look
from dpsyngen.studio.look import Studio
from dpsyngen.training.progress import Progress
from dpsyngen.training.run import Run

_EVERY = 1.5  # seconds between looks at a run
_STATES = {
    "preparing": "Reading the images and checking the plan; nothing is spent yet.",
    "failed": "It could not begin.  Nothing was spent.",
    "training": "Training.  You may close this page, and end the studio too: the training goes on and is found again.",
    "interrupted": "Interrupted.  Nothing is lost: it goes on with the same steps and the same noise, at no extra ε.",
    "stopped for good": "Stopped: its network could not compute any more.  It cannot be continued.",
    "finished": "Finished: the generator can be looked at and released.",
}


def register(studio: Studio) -> None:
    """Make the pages."""
    for step, page in (("Train", _Train), ("Look", _Look), ("Release", _Release)):
        ui.page(f"/run/{{name}}/{step.lower()}")(_page(studio, step, page))


def _page(studio: Studio, step: str, page: Callable[[Studio, Path], object]) -> Callable[[str], None]:
    def show(name: str) -> None:
        with look.frame(name, step=step, run=name):
            try:
                page(studio, studio.places.path_of(name))
            except DpsyngenError as error:
                look.Notice().say(wrong=str(error))

    return show


class _Train:
    def __init__(self, studio: Studio, path: Path) -> None:
        self.jobs, self.path, self.asked, self.notice = studio.jobs, path, look.Notice(), look.Notice()
        self.state = look.say("").props('role="status"')
        with ui.element("div").classes("buttons"):
            stop = look.button("Stop after this step", partial(self._ask, self.jobs.stop, path), "danger")
            resume = look.button("Go on", partial(self._ask, self.jobs.train, path))
            change = look.link("Choose other settings", "/images")
            onward = look.link("Look at what it draws", f"/run/{path.name}/look")
        states = (("preparing", "training"), ("interrupted",), ("failed",), ("finished",))
        self.offered = list(zip((stop, resume, change, onward), states, strict=True))
        self.error, self.live = ui.element("div").props('role="alert"'), ui.element("div")
        with ui.expansion("What the command says"):
            self.said = look.tag("pre", "", "log").props('tabindex="0"')
        self.shown: Any = None
        self.timer = ui.timer(_EVERY, self._look)
        for button, _ in self.offered:
            button.set_visibility(False)

    async def _ask(self, act: Callable[..., None], *given: Any) -> None:
        await self.asked.attempt("asking …", partial(asyncio.to_thread, act, *given))
        self.timer.activate()

    async def _look(self) -> None:
        found = await self.notice.attempt("", partial(asyncio.to_thread, self.jobs.look, self.path))
        if found is None or found == self.shown:
            return
        self.shown, (said, progress) = found, found
        state = progress.state if progress is not None else "preparing" if said.going else "failed"
        self.state.set_content(_STATES[state])
        for button, states in self.offered:
            button.set_visibility(state in states)
        self.said.set_content(escape("\n".join(said.lines)))
        self.error.clear()
        self.live.clear()
        with self.error:
            if said.error or state == "failed":
                look.tag("div", said.error or "There is no such run yet.", "problem")
        with self.live:
            if progress is not None:
                _progress(progress)
        if state in ("finished", "stopped for good"):
            self.timer.deactivate()


def _progress(now: Progress) -> None:
    if now.epsilon is not None and now.target is not None:
        rows = [("ε so far", number(now.epsilon, up=True)), ("ε planned", number(now.target)), ("δ", f"{now.delta:g}")]
        look.facts([*rows, *([("this phase ends in", hours(now.seconds_left))] if now.seconds_left else [])])
    for phase in now.phases:
        share = 100 * phase.done / max(phase.steps, 1)
        what = "private images, DP-SGD" if phase.private else "images drawn by programs, no privacy cost"
        steps = f"<span>{phase.done:,} of {phase.steps:,} steps</span>"
        look.html(f"<span><strong>{escape(phase.name)}</strong>: {what}</span>{steps}").classes("phase")
        bar = f'role="progressbar" aria-label="{escape(phase.name)}" aria-valuenow="{share:.0f}"'
        kind = "meter" + " of-private" * phase.private
        look.html(f'<span style="width: {share:.1f}%"></span>').classes(kind).props(bar)
    for title, kind in (("Loss on images drawn by programs", "card"), ("Loss on private images", "private")):
        private = kind == "private"
        log = (line for phase in now.phases if phase.private == private for line in phase.log)
        if charts := loss_charts(log, "private" if private else "public"):
            with look.card(title, kind), ui.element("div").classes("charts"):
                look.html("".join(charts.values()))
    if now.preview is not None:
        with look.card("What the network draws now", "private"), Image.open(now.preview) as image:
            look.html(f'<img src="{png_url(image)}" width="{2 * image.width}" alt="sixteen images of now">')
            look.say("From the same noise each time.  Private until the training is finished and released.", "note")


def _whole(field: ui.number, what: str) -> int:
    value = field.value
    require(value is not None and value == int(value), what, value, "a whole number")
    return int(value)


class _Look:
    def __init__(self, studio: Studio, path: Path) -> None:
        self.studio, self.run = studio, Run(path)
        self.run.require_complete()
        with ui.element("div").classes("form"):
            self.seed = look.number("Seed", 0)
            self.guidance = look.number("Guidance (1: none)", None)
            look.button("Draw", self._draw)
        self.notice, self.samples = look.Notice(), ui.element("div")
        with look.card("Generated beside real", "private"):
            look.button("Show training images beside them", self._beside, "other")
            self.beside_notice, self.beside = look.Notice(), ui.element("div")
        test = "digits:test" if self.run.config.data.source == "digits:train" else ""
        with look.card("How good are the images?", "private"):
            look.say("Floor: what real test images get; ceiling: what images drawn by programs get.", "note")
            _Command(studio, self.run, ("Measure", "evaluate", "--test"), test, lambda: ("", measured(self.run)))
        with look.card("Are training images copied?", "private"):
            _Command(studio, self.run, ("Check", "memorisation", "--held-out"), test, partial(copied, self.run))
        with look.card("What could be better?", "private"):
            self.advice_notice, self.advice = look.Notice(), ui.element("div")
        ui.timer(0.1, self._begin, once=True)

    async def _begin(self) -> None:
        await self._draw()
        found = await self.advice_notice.attempt("looking at the run …", partial(self.studio.work, diagnose, self.run))
        with self.advice:
            for f in [] if found is None else found.findings:
                seen, why, change = escape(f"{f.severity}: {f.seen}"), escape(f.why), escape(f.change)
                text = f"<p><strong>{seen}</strong></p><p>{why}. {change}.</p>"
                look.html(text).classes("finding" + " error" * (f.severity == "error"))
            if found is not None and not found.findings:
                look.say("Nothing was found.")

    async def _draw(self) -> None:
        def draw() -> tuple[look.Rows, dict[str, Any], int]:
            sampling: Any = {"seed": _whole(self.seed, "the seed"), "guidance": self.guidance.value}
            generator = self.studio.generator(self.run)
            steps = generator.settings(**sampling).steps
            return class_images(generator, 10, 12, **sampling), trajectory_table(generator, **sampling), steps

        found = await self.notice.attempt("drawing …", partial(self.studio.work, draw))
        if found is not None:
            self.samples.clear()
            with self.samples:
                look.class_rows(found[0], "generated images")
                look.tag("h2", "From noise to image")
                look.part("from_noise", trajectory=found[1], steps=found[2])

    async def _beside(self) -> None:
        work = partial(self.studio.work, generated_beside_real, self.run, seed=int(self.seed.value or 0))
        rows = await self.beside_notice.attempt("reading the training images …", work)
        self.beside.clear()
        with self.beside:
            for name, *both in rows or ():
                told = zip((f"{name} generated", f"{name} real (private)"), both, strict=True)
                cells = (f"<div>{escape(what)}{look.picture(images, what, 8, 40)}</div>" for what, images in told)
                look.html("".join(cells)).classes("beside")


class _Command:
    # `words`: the button's title, the command, its option for real images (`test`); `found`: conclusion and figures.
    def __init__(self, studio: Studio, run: Run, words: Sequence[str], test: str, found: Callable[[], Any]) -> None:
        self.studio, self.run, self.found = studio, run, found
        title, self.command, self.option = words
        with ui.element("div").classes("form"):
            self.test = look.field("Real images not trained on (folder, file or public set)", test)
            self.count = look.number("Generated images", 1000)
            look.button(title, self._start, "other")
        self.notice, self.result = look.Notice(), ui.element("div")
        self.timer = ui.timer(_EVERY, self._look)

    async def _start(self) -> None:
        async def begin() -> None:
            given = (self.test.value or "").strip()
            real = [self.option, self.studio.places.source(given, "the real images")] if given else []
            count = _whole(self.count, "the number of images")
            self.studio.jobs.start(self.run, self.command, "-n", str(count), *real)
            self.timer.activate()

        await self.notice.attempt("starting …", begin)

    def _look(self) -> None:
        said = self.studio.jobs.doing(self.run, self.command)
        if said.going:
            self.notice.say(said.lines[-1] if said.lines else "starting …")
            return
        self.timer.deactivate()
        self.notice.say(wrong=said.error or "")
        self.result.clear()
        try:
            conclusion, rows = self.found()
        except (DpsyngenError, OSError) as error:
            self.notice.say(wrong=str(error))
            return
        with self.result:
            look.say(conclusion)
            if rows:
                look.part("figures", table=figure_table(rows), caption=f"What {self.command} said last.")


class _Release:
    def __init__(self, studio: Studio, path: Path) -> None:
        self.studio, self.run = studio, Run(path)
        self.run.require_complete()
        guarantee = Guarantee.read(self.run.release)
        look.say(guarantee.line, "big" if guarantee.private else "refused")
        with look.card("Make the bundle"):
            look.say("One file with all that may be published, and nothing of the private half.")
            with ui.element("div").classes("form"):
                self.name = look.field("Name of the file", f"{path.name}.zip")
                self.count = look.number("Generated images in it", 100)
            with ui.element("div").classes("form"):
                self.key = look.field("Private key to sign with (PEM); empty: not signed")
                look.button("Make a key", self._make_key, "other")
            self.anyway = ui.checkbox("Pack it although it is NOT PRIVATE, stamped as such")
            self.anyway.set_visibility(not guarantee.private)
            look.button("Make the bundle", self._pack)
            self.notice, self.done = look.Notice(), ui.element("div")
        with look.card(""):
            ui.markdown(guarantee.plain_words()).classes("certificate")

    def _make_key(self) -> None:
        path = self.studio.places.runs / "signing-key.pem"
        if not path.exists():
            make_key(path)
        self.key.set_value(self.studio.places.short(path))

    def _bundle(self) -> tuple[Packed, Path | None]:
        key, places = (self.key.value or "").strip(), self.studio.places
        count = _whole(self.count, "the number of images")
        out = places.path_of((self.name.value or "").strip())
        signer = places.inside(key, "the key") if key else None
        with self.run.lock():
            if not (self.run.release / "report.html").exists():
                require_ready(self.run, out, count, signer, self.anyway.value)
                write_report(self.run)
            return pack(self.run, out, samples=count, key=signer, not_private=self.anyway.value), signer

    async def _pack(self) -> None:
        made = await self.notice.attempt("drawing and packing …", partial(self.studio.work, self._bundle))
        self.done.clear()
        if made is None:
            return
        packed, signer = made
        with self.done:
            look.say(f"{packed.path.name}: {packed.files:,} files", "big passed")
            rows = [("SHA-256, to publish beside it", packed.sha256), ("where", self.studio.places.short(packed.path))]
            look.facts([*rows, ("signed by the key", packed.signed_by or "not signed")])
            with ui.element("div").classes("buttons"):
                look.button("Download", lambda: ui.download.file(packed.path))
                public = Path(f"{signer}.pub")
                if signer is not None and public.is_file():
                    look.button("Download the public key", lambda: ui.download.file(public), "other")
                look.link("Check it", "/verify")
