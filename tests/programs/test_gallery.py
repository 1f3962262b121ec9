"""The gallery in docs/ is what the programs draw now."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

from docs.figures.gallery import SHOWN, write_gallery
from dpsyngen.programs import program_names

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_and_its_pictures_are_current(tmp_path: Path) -> None:
    page = write_gallery(tmp_path)
    assert page.read_text() == (DOCS / "gallery.md").read_text(), "run: python -m docs.figures.gallery"
    pictures = re.findall(r"!\[.*\]\((.*)\)", page.read_text())
    assert len(pictures) == len(set(pictures)) == len(SHOWN)
    assert {p.name for p in (DOCS / "gallery").iterdir()} == {Path(p).name for p in pictures}
    for picture in pictures:
        drawn, kept = (np.asarray(Image.open(folder / picture)) for folder in (tmp_path, DOCS))
        assert np.array_equal(drawn, kept), picture


def test_every_program_is_shown() -> None:
    assert {name for _, name, _ in SHOWN} == set(program_names())
