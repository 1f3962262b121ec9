"""The pages that are not about one run: the table of runs, two of them compared, a bundle checked."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Annotated

from fastapi import Query
from nicegui import events, ui

from dpsyngen.errors import DpsyngenError
from dpsyngen.generator.guarantee import Guarantee
from dpsyngen.privacy.certificate import number
from dpsyngen.release.verify import Verdict, verify
from dpsyngen.report.html import FigureRow, class_images, figure_table, measured
from dpsyngen.studio import look
from dpsyngen.studio.look import Studio

_SEED, _LARGEST = 0, 4 * 2**30  # bytes
# The library's own header has a link without a name.
_PICK = (
    '<div class="chips"><q-btn no-caps unelevated class="main" label="Choose a {0}" @click="props.pickFiles"></q-btn>'
    "<label>or drop the {0} here<q-uploader-add-trigger></q-uploader-add-trigger></label></div>"
)
_HEADS = "".join(f'<th scope="col">{head}</th>' for head in ("compare", "run", "state", "ε", "generated"))
_HEADS += "".join(f'<th scope="col" class="optional">{head}</th>' for head in ("images", "figures (private)"))


def register(studio: Studio) -> None:
    """Make the pages."""
    ui.page("/")(partial(_runs, studio))

    @ui.page("/compare")
    async def compare(run: Annotated[list[str], Query()] = []) -> None:  # noqa: B006
        await _compare(studio, run)

    @ui.page("/verify")
    def check() -> None:
        with look.frame("Check a bundle", menu="Check a bundle"):
            _Check(studio)


async def _runs(studio: Studio) -> None:
    names = studio.places.names()
    with look.frame("Runs", menu="Runs"):
        if not names:
            look.say("None yet.  A run begins with images, and ends with a bundle that may be published.")
        with ui.element("form").props("action=/compare"):
            with ui.element("div").classes("buttons"):
                look.link("New generator", "/images")
                if not names:
                    return
                look.button("Compare two", None, "other").props("type=submit")
            with ui.element("div").classes("scroll"), ui.element("table").classes("runs"):
                look.html(f"<tr>{_HEADS}</tr>", "thead")
                with ui.element("tbody"):
                    pictures = [_row(studio, name) for name in names]
    await ui.context.client.connected()
    for name, cell in zip(names, pictures, strict=True):
        if cell.is_deleted:
            return
        try:
            cell.set_content(await studio.work(_thumbnail, studio, name))
        except (DpsyngenError, OSError):
            continue  # the run's own page tells


def _row(studio: Studio, name: str) -> ui.html:
    complete, epsilon, records, figures, state = False, "–", "–", "–", "damaged"
    try:
        run = studio.places.run(name)
        complete = run.complete
        progress = studio.jobs.look(run.path)[1]
        if progress is not None:
            state, epsilon = progress.state, number(progress.epsilon, up=True) if progress.epsilon is not None else "–"
        if complete:
            records = f"{Guarantee.read(run.release).records:,}"
            figures = "; ".join(f"{row.name} {row.value}" for row in measured(run)[:2]) or "–"
    except (DpsyngenError, OSError, ValueError, KeyError):
        pass  # the run's own page tells
    with ui.element("tr"):
        box = f'<input type="checkbox" name="run" value="{escape(name)}" aria-label="compare {escape(name)}">'
        look.html(box if complete else "", "td")
        with ui.element("td"):
            ui.link(name, f"/run/{name}/{'look' if complete else 'train'}")
        look.html(f'<span class="dot {state}" aria-hidden="true"></span>{state}', "td").classes("state")
        look.tag("td", epsilon)
        picture = look.html("", "td")
        look.tag("td", records, "optional")
        look.tag("td", figures, "optional")
    return picture


def _thumbnail(studio: Studio, name: str) -> str:
    run = studio.places.run(name)
    if not run.complete:
        return ""
    return look.picture(studio.generator(run).sample(6, seed=_SEED).images, f"images that {name} draws", 6, 32)


async def _compare(studio: Studio, names: list[str]) -> None:
    with look.frame("Two runs compared", menu="Runs"):
        look.say("The same seed, so the same noise, image by image.", "note")
        notice, place = look.Notice(), ui.element("div").classes("two")
    await ui.context.client.connected()
    if len(names) != 2:
        notice.say(wrong=f"{len(names)} runs were chosen, but two can be compared: go back, and choose two.")
    for name in names if len(names) == 2 else ():
        found = await notice.attempt(f"drawing images of {name} …", partial(studio.work, _drawn, studio, name))
        if found is None:
            return
        guarantee, figures, rows = found
        with place, ui.element("section"):
            look.tag("h2", name)
            look.say(guarantee.line, "big" if guarantee.private else "refused")
            look.class_rows(rows, f"images that {name} draws")
            with look.card("Figures", "private"):
                table = figure_table([f._replace(note="") for f in figures])
                look.part("figures", table=table, caption=name) if figures else look.say("Not measured yet.", "note")


def _drawn(studio: Studio, name: str) -> tuple[Guarantee, list[FigureRow], look.Rows]:
    run = studio.places.run(name)
    run.require_complete()
    generator = studio.generator(run)
    return generator.privacy, measured(run), class_images(generator, 10, 6, _SEED)


class _Check:
    def __init__(self, studio: Studio) -> None:
        self.studio, self.key = studio, b""
        look.say(
            "Drop a bundle (.zip) that somebody gave you, or that you made.  Checksums, signature, ε and images are "
            "computed again and compared.  No private image is needed."
        )
        self.upload = self._upload("bundle", self._take, _LARGEST)
        with ui.expansion("I have the public key of who should have signed it"):
            self._upload("public key", self._trust, 2**16)
        self.notice, self.result = look.Notice(), ui.element("div").props('aria-live="polite"')

    def _upload(self, name: str, act: Callable[[events.UploadEventArguments], Awaitable[None]], most: int) -> ui.upload:
        upload = ui.upload(on_upload=act, auto_upload=True, max_file_size=most)
        upload.on("rejected", lambda: self.notice.say(wrong=f"the {name} is too large."))
        upload.add_slot("header", _PICK.format(name))
        return upload.props(f'aria-label="{name}" flat')

    async def _trust(self, event: events.UploadEventArguments) -> None:
        self.key = await event.file.read()

    async def _take(self, event: events.UploadEventArguments) -> None:
        async def check() -> Verdict:
            with tempfile.TemporaryDirectory(prefix="dpsyngen-studio-") as folder:
                path, public = Path(folder) / "bundle.zip", Path(folder) / "key.pub"
                await event.file.save(path)
                public.write_bytes(self.key)
                return await self.studio.work(verify, path, public if self.key else None)

        self.result.clear()
        verdict = await self.notice.attempt(f"checking {event.file.name} …", check)
        self.upload.reset()
        if verdict is not None:
            with self.result:
                _verdict(event.file.name, verdict)


def _verdict(name: str, verdict: Verdict) -> None:
    sure = "the bundle is sound" if verdict.passed else "the bundle is NOT to be relied on"
    look.say(f"{name}: {sure}", "big passed" if verdict.passed else "big refused")
    marks = {True: "ok", False: "FAILED", None: "–"}
    rows = [{"check": c.name, "verdict": marks[c.passed], "what was found": c.text} for c in verdict.checks]
    look.part("figures", table=figure_table(rows), caption="Each check, in order.")
    if verdict.passed:
        look.say("No bundle can show whether the training did what it states, and how good the images are.", "note")
