"""The page docs/gallery.md and its pictures, drawn by the programs: ``python -m docs.figures.gallery``."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from dpsyngen.programs import TIERS, Program, image_grid, make_program

PAGE = "gallery.md"
PICTURES = "gallery"
COLUMNS, ROWS, RESOLUTION = 12, 2, 48

# What is shown: a title, a program, its parameters.  The order is that of the page.
SHOWN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Dead leaves, mixed shapes", "dead-leaves", {}),
    ("Dead leaves, discs", "dead-leaves", {"shape": "disc", "r_min": 0.06}),
    ("Dead leaves, squares", "dead-leaves", {"shape": "square", "r_min": 0.06}),
    ("Dead leaves, oriented squares", "dead-leaves", {"shape": "oriented-square", "r_min": 0.06, "supersample": 4}),
    ("Dead leaves, rectangles", "dead-leaves", {"shape": "rectangle", "r_min": 0.06}),
    ("Dead leaves, triangles", "dead-leaves", {"shape": "triangle", "r_min": 0.06, "supersample": 4}),
    ("Dead leaves, quadrilaterals of few colours", "dead-leaves", {"shape": "quadrilateral", "colour": "palette"}),
    ("Dead leaves, black and white discs", "dead-leaves", {"shape": "disc", "colour": "black-white", "r_min": 0.06}),
    ("Dead leaves, as published", "dead-leaves", {"mode": "reference"}),
    ("Spectrum", "spectrum", {}),
    ("Spectrum with a palette", "spectrum", {"colour": "palette"}),
    ("Wavelet marginals", "wavelet-marginal", {}),
    ("Smooth noise", "smooth-noise", {}),
    ("A family of figures", "family", {"number": 6}),
    ("A scene", "scene", {"number": 4}),
    ("Smooth noise with a palette", "smooth-noise", {"colour": "palette", "kind": "ridged"}),
    ("Random networks", "random-network", {"kind": "random"}),
    ("Random networks, high frequencies", "random-network", {"kind": "high-frequency"}),
    ("Random networks, sparse", "random-network", {"kind": "sparse"}),
    ("Random networks, oriented", "random-network", {"kind": "oriented"}),
    ("Fractals", "fractal", {}),
    ("Strokes", "strokes", {}),
    ("Contours: polygons", "contours", {"shape": "polygon"}),
    ("Contours: superellipses", "contours", {"shape": "superellipse", "ground": "white"}),
    ("Contours: mirrored figures", "contours", {"shape": "mirrored", "figures": 1, "upright": True, "radius": 0.45}),
    ("Contours: radial harmonics", "contours", {"shape": "harmonics", "ground": "random"}),
    ("Mixture", "mixture", {"programs": ["dead-leaves", "fractal", "contours"], "weights": [2, 1, 1]}),
    ("Affine", "affine", {"source": "contours"}),
    ("Blur", "blur", {"source": "dead-leaves", "deviation": [0, 4]}),
    ("Invert", "invert", {"source": "strokes", "probability": 0.5}),
)


def write_gallery(folder: Path) -> Path:
    """Write ``gallery.md`` and a folder of pictures to `folder`, over what is there; returns the path of the page."""
    page, pictures = folder / PAGE, folder / PICTURES
    pictures.mkdir(exist_ok=True)
    lines = [
        "# What the programs draw",
        "",
        "Made by `python -m docs.figures.gallery`; every picture shows images 0 to "
        f"{COLUMNS * ROWS - 1} at {RESOLUTION} pixels, in colour, with seed 0. Not one of them holds a photograph, or "
        "anything measured on one. [How to use them](programs.md). Tier and source stand with a program's first "
        "picture.",
        "",
    ]
    for place, (title, name, params) in enumerate(SHOWN):
        program = make_program(name, resolution=RESOLUTION, channels=3, **params)
        file = re.sub(r"[^a-z]+", "-", title.lower()) + ".png"
        sheet = image_grid(program.batch(range(COLUMNS * ROWS)), COLUMNS)
        sheet.save(pictures / file, optimize=True)
        told = {other for _, other, _ in SHOWN[:place]}
        lines += [
            f"## {title}",
            "",
            f"![{title}]({PICTURES}/{file})",
            "",
            *(
                []
                if name in told
                else [f"Tier {program.prior_tier}: {TIERS[program.prior_tier]}. {_source(program)}", ""]
            ),
            "```",
            _command(name, params),
            "```",
            "",
        ]
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def _source(program: Program) -> str:
    """The sentence of the module's documentation that names its source, up to the next blank line."""
    text = inspect.getdoc(sys.modules[type(program).__module__]) or ""
    found = re.search(r"^Sources?: (?:.|\n)*?(?=\n\n|\Z)", text, re.MULTILINE)
    return " ".join(found.group().split()) if found else "Our own."


def _command(name: str, params: dict[str, Any]) -> str:
    settings = "".join(f" --set {_quoted(f'{key}={_yaml(value)}')}" for key, value in params.items())
    size = f"--channels rgb --resolution {RESOLUTION} -n {COLUMNS * ROWS}"
    return f"dpsyngen programs show {name} {size}{settings} --out {name}.png"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    return f"'{text}'" if re.search(r"[^\w=.,:/-]", text) else text


if __name__ == "__main__":
    write_gallery(Path(__file__).parents[1])
