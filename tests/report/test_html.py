"""The run report: what is in its two copies, and that its markup is what readers of all kinds need."""

from __future__ import annotations

import base64
import io
import itertools
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dpsyngen
from dpsyngen import Generator
from dpsyngen import fit as api
from dpsyngen.report.html import release_values, render
from tests.conftest import TINY_SETTINGS, tiny_arrays

pytestmark = pytest.mark.slow

STYLE = Path(api.__file__).parent / "report" / "templates" / "style.css"
VOID = {"meta", "img", "source", "br", "link", "line", "rect", "polyline", "polygon", "path"}


@pytest.fixture(scope="module", params=["private", "release"])
def page(request, reported) -> str:
    return (reported.path / request.param / "report.html").read_text()


class Outline(HTMLParser):
    """Elements in order, each with its attributes, its ancestors and the text in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[int, str] = {}
        self.within: list[tuple[int, ...]] = []
        self._open: list[tuple[str, int]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs) -> None:
        self.all.append((tag, {name: value or "" for name, value in attrs}))
        self.within.append(tuple(i for _, i in self._open))
        if tag not in VOID:
            self._open.append((tag, len(self.all) - 1))

    def handle_startendtag(self, tag, attrs) -> None:
        self.all.append((tag, {name: value or "" for name, value in attrs}))
        self.within.append(tuple(i for _, i in self._open))

    def handle_endtag(self, tag) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop()[0] == tag

    def handle_data(self, data) -> None:
        for _, i in self._open:
            self.texts[i] = self.texts.get(i, "") + data

    def named(self, *tags: str) -> list[tuple[int, dict[str, str]]]:
        return [(i, attributes) for i, (tag, attributes) in enumerate(self.all) if tag in tags]


def test_language_landmarks_and_headings(page) -> None:
    outline = Outline(page)
    assert [a.get("lang") for _, a in outline.named("html")] == ["en"]
    for once in ("main", "header", "footer", "nav", "h1", "title"):
        assert len(outline.named(once)) == 1, once
    levels = [int(outline.all[i][0][1]) for i, _ in outline.named("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    first_link = outline.named("a")[0][1]
    assert first_link == {"class": "skip", "href": "#main"}
    ids = [a["id"] for _, a in outline.all if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for _, a in outline.named("a")} <= {f"#{i}" for i in ids}
    headings = [(a["id"], outline.texts[i].removesuffix(" PRIVATE")) for i, a in outline.named("h2")]
    assert len(headings) >= 7
    links = [(a["href"][1:], outline.texts[i]) for i, a in outline.named("a")][1:]
    assert links == [("guarantee", "Guarantee"), *headings]
    for _, section in outline.named("section"):
        assert section.get("aria-labelledby") in ids or section.get("aria-label")
    for _, region in ((i, a) for i, a in outline.named("div") if a.get("class") == "scroll"):
        assert region["tabindex"] == "0"
        assert region["role"] == "region"
        assert region["aria-label"]


def test_pictures_and_tables_speak(page) -> None:
    outline = Outline(page)
    pairs = 2 * 30 if "Memorisation" in page else 0
    assert len(outline.named("img")) == 3 + 4 + 1 + pairs  # classes, ways from noise, programs
    for _, image in outline.named("img"):
        assert image["alt"].strip()
        assert image["src"].startswith("data:image/png;base64,")
    assert len(outline.named("svg")) >= 3
    for _, drawing in outline.named("svg"):
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"]) > 20
    tables = outline.named("table")
    assert len(tables) >= 2
    for i, _ in tables:
        captions = [j for j, _ in outline.named("caption") if i in outline.within[j]]
        assert len(captions) == 1
        assert outline.texts[captions[0]].strip()
    for _, heading in outline.named("th"):
        assert heading["scope"] in ("row", "col", "colgroup")


def test_tables_that_a_phone_shows_as_lists_stay_tables_for_those_who_hear_them(page) -> None:
    outline = Outline(page)
    roles = {"thead": "rowgroup", "tbody": "rowgroup", "tr": "row", "td": "cell"}
    stacks = [i for i, a in outline.named("table") if a.get("class") == "stack"]
    assert stacks
    for i in stacks:
        assert outline.all[i][1]["role"] == "table"
        for j, (tag, attributes) in enumerate(outline.all):
            if i in outline.within[j] and tag in roles:
                assert attributes["role"] == roles[tag]
                assert tag != "td" or attributes["data-label"]


def test_every_row_of_a_table_has_as_many_cells_as_it_has_columns(page) -> None:
    outline = Outline(page)
    for i, _ in outline.named("table"):
        widths = set()
        for row, _ in ((r, a) for r, a in outline.named("tr") if i in outline.within[r]):
            cells = [a for c, a in outline.named("th", "td") if row in outline.within[c]]
            widths.add(sum(int(a.get("colspan", 1)) for a in cells))
        assert len(widths) == 1, widths


def test_class_names_are_text(page) -> None:
    assert "b &amp; &lt;i&gt;" in page
    assert not Outline(page).named("i")


def test_nothing_can_be_fetched_or_run(page) -> None:
    outline = Outline(page)
    policies = [a["content"] for _, a in outline.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert [p.split("; ")[:3] for p in policies] == [
        ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"]
    ]
    # A policy holds for what comes after it.
    assert page.index("Content-Security-Policy") < min(page.index("<style"), page.index("<img"), page.index("<title"))
    assert not outline.named("script", "iframe", "object", "embed", "link", "form", "base", "audio", "video")
    assert not re.search(r"url\s*\((?!#)|@import", page)
    assert not [name for _, a in outline.all for name in a if name.startswith("on")]


def test_the_trajectory_names_stages_and_ends_in_the_images_of_the_class_rows(reported, page) -> None:
    outline = Outline(page)
    heads = [(outline.texts[i], a) for i, a in outline.named("th") if a.get("scope") == "colgroup"]
    expected = [("coarseprograms", "public"), ("contextprivate", "private"), ("cleaningprograms", "public")]
    assert [(text, a["class"].split("tone-")[1]) for text, a in heads] == expected
    (table,) = (i for i, a in outline.named("table") if a.get("class") == "trajectory")
    noisy, *rows = (image for i, image in outline.named("img") if table in outline.within[i])
    columns = sum(a["scope"] == "col" for i, a in outline.named("th") if table in outline.within[i]) - 1  # without "σ"
    drawn = Generator(reported.release).sample(3, seed=0).images[[0, 0, 1, 2]]
    for strip, pixels in zip([noisy, *rows], drawn, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(strip["src"].partition(",")[2]))))
        side = shown.shape[0] - 6  # of a picture, between gaps of 3
        assert shown.shape[1] == columns * (side + 3) + 3
        scale = side // pixels.shape[-1]
        last = shown[3:-3, -3 - side : -3].reshape(side, side, -1).transpose(2, 0, 1)
        np.testing.assert_array_equal(last[:, ::scale, ::scale], pixels)
    assert "the first images of seed 0, which is public" in page
    assert "This is a weak guarantee" in page  # in the words of the certificate


def test_the_public_copy_needs_the_release_half_alone(reported, tmp_path) -> None:
    shutil.copytree(reported.release, tmp_path / "release")
    values = release_values(tmp_path / "release") | {"private_half": None}
    alone = render("report.html.j2", values)
    assert alone == (reported.release / "report.html").read_text()
    # Where DP moments answer before the first step, the page says so.
    assert "Sampling begins at" not in alone
    values["statement"]["stages"][-1]["trained_by"] = "moments"
    assert "Sampling begins at" in render("report.html.j2", values)


def test_only_the_private_copy_has_what_is_private(reported) -> None:
    whole = [half.joinpath("report.html").read_text() for half in (reported.private, reported.release)]
    # Without the pictures, whose base64 can hold any word.
    private, public = (re.sub(r"base64,[\w+/=]+", "", text) for text in whole)
    for word in (
        "Ledger",
        "nearest training",
        "Share of clipped gradients",
        "Accuracy on the real test images",
        "CAS",
    ):
        assert word in private
        assert word not in public
    assert '<td class="right">' in private  # of the table of confusions
    assert "PRIVATE COPY" in private
    assert "PRIVATE COPY" not in public
    assert "Loss, cleaning" in public
    of_private, of_public = (set(re.findall(r"data:image/png;base64,[^\"]+", text)) for text in whole)
    assert set() < of_public < of_private


def test_the_same_run_gives_the_same_report(reported) -> None:
    before = [(half / "report.html").read_bytes() for half in (reported.private, reported.release)]
    dpsyngen.write_report(reported)
    assert [(half / "report.html").read_bytes() for half in (reported.private, reported.release)] == before


def test_a_run_without_classes_and_stages_has_a_report(tmp_path) -> None:
    images, _ = tiny_arrays()
    settings = TINY_SETTINGS | {"stages": {"variant": "dpdm"}, "program": {"name": "dead-leaves"}}
    run = api.train((images, None), epsilon=float("inf"), out=tmp_path / "run", settings=settings)
    private, public = dpsyngen.write_report(run)
    for path in (private, public):
        outline = Outline(path.read_text())
        heads = [outline.texts[i] for i, a in outline.named("th") if a.get("scope") == "colgroup"]
        assert heads == ["contextprivate"]
    assert "No privacy guarantee" in public.read_text()
    assert "guesses right" not in public.read_text()
    assert "Not measured yet" in private.read_text()


# ------------------------------------------------------------------------------------------------ colours

PAIRS = [
    *(("fg", ground) for ground in ("bg", "card", "priv-soft")),
    *(("soft", ground) for ground in ("bg", "card", "pub-soft", "priv-soft")),
    *(("pub", ground) for ground in ("bg", "card", "pub-soft")),
    *(("priv", ground) for ground in ("bg", "card", "priv-soft")),
]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def schemes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root\s*\{([^}]*)\}", STYLE.read_text())[:2]
    return {
        name: dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", block))
        for name, block in (("light", light), ("dark", dark))
    }


def test_contrast_itself() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out(scheme) -> None:
    colours = schemes()[scheme]
    assert set(colours) == set(schemes()["light"])
    for text, ground in PAIRS:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    # Lines, bars and frames that carry meaning: 3 to 1 (WCAG 1.4.11).
    for mark in ("pub-fill", "priv-fill", "edge"):
        assert contrast(colours[mark], colours["bg"]) >= 3, mark


def test_every_colour_of_the_style_sheet_is_a_checked_one() -> None:
    sheet = STYLE.read_text()
    rules = re.sub(r":root\s*\{[^}]*\}", "", sheet)
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsla?\(", rules)
