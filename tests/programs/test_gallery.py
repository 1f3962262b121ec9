"""The gallery in docs/ is what the programs draw now."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsyngen.errors import RunError
from dpsyngen.programs import program_names
from dpsyngen.programs.gallery import SHOWN, write_gallery
from tests.programs.test_families import GOLDEN_FONTS, make

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_and_its_pictures_are_current(tmp_path: Path) -> None:
    page = write_gallery(tmp_path)
    assert page.read_text() == (DOCS / "gallery.md").read_text(), "run: dpsyngen programs gallery --out docs"
    pictures = re.findall(r"!\[.*\]\((.*)\)", page.read_text())
    assert len(pictures) == len(set(pictures)) == len(SHOWN)
    assert {p.name for p in (DOCS / "gallery").iterdir()} == {Path(p).name for p in pictures}
    for picture in pictures:
        if "glyphs" in picture and make("glyphs").config()["fonts"] != GOLDEN_FONTS:
            continue
        drawn, kept = (np.asarray(Image.open(folder / picture)) for folder in (tmp_path, DOCS))
        assert np.array_equal(drawn, kept), picture


def test_every_program_is_shown() -> None:
    assert {name for _, name, _ in SHOWN} == set(program_names())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "gallery.md").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        write_gallery(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["gallery.md"]
    with pytest.raises(RunError, match="not a folder"):
        write_gallery(tmp_path / "none")
