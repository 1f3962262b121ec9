"""Generated images next to their nearest real ones, as a picture and for the report.  Private: it holds real images."""

from __future__ import annotations

import base64
import io
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.evaluation.memorisation import Memorisation
from dpsyngen.programs import image_grid

if TYPE_CHECKING:
    from PIL import Image

FILE = "memorisation_pairs.json"
"""Of the private half."""
_SIDE, _GAP, _CAPTION, _LEFT = 64, 8, 18, 118  # of the picture, in pixels: the least side of an image, and margins
_INK, _SOFT, _ALARM = (29, 33, 41), (89, 97, 110), (181, 47, 67)


def chosen_images(result: Memorisation, count: int, seed: int) -> list[tuple[str, NDArray[np.int64]]]:
    """Choose the generated images to be shown, in two titled groups of `count`: the most suspicious, and at random."""
    number = len(result.to_private)
    count = min(count, number)
    against = "distance to the training set" if result.distances[1] is None else "distances: private over held-out"
    return [
        (f"Most suspicious (smallest {against})", result.most_suspicious(count)),
        ("At random", np.random.default_rng(seed).choice(number, count, replace=False)),
    ]


def _unit(result: Memorisation) -> str:
    about = next(iter(result.spaces.values())).features
    return f"{about['name']}: {about['unit']}"


def neighbour_pairs(
    result: Memorisation,
    generated: NDArray[np.uint8],
    private: NDArray[np.uint8],
    held_out: NDArray[np.uint8] | None,
    *,
    count: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Put the images of :func:`neighbour_picture` beside their distances, for the report.  **Private.**

    Returns:
        JSON-able: ``unit``, and ``groups`` of ``title`` and ``pairs``; images are ``data:`` URLs.
    """
    to_private, to_held_out = result.distances
    groups = []
    for title, picks in chosen_images(result, count, seed):
        pairs: list[dict[str, Any]] = []
        for i in map(int, picks):
            pair = {
                "number": i,
                "generated": image_data(generated[i]),
                "private": image_data(private[result.to_private[i]]),
                "to_private": float(to_private[i]),
                "held_out": None,
                "to_held_out": None,
            }
            if held_out is not None and result.to_held_out is not None and to_held_out is not None:
                pair |= {"held_out": image_data(held_out[result.to_held_out[i]]), "to_held_out": float(to_held_out[i])}
            pairs.append(pair)
        groups.append({"title": title, "pairs": pairs})
    return {"unit": _unit(result), "groups": groups}


def image_data(pixels: NDArray[np.uint8]) -> str:
    """One image, uint8 [C, H, W], as a ``data:`` URL, a pixel of it a pixel of the PNG: the page enlarges it."""
    return png_url(image_grid(np.asarray(pixels)[None], 1, pad=0))


def png_url(image: Image.Image) -> str:
    """A picture as a ``data:`` URL, so that a report is one file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def neighbour_picture(
    result: Memorisation,
    generated: NDArray[np.uint8],
    private: NDArray[np.uint8],
    held_out: NDArray[np.uint8] | None,
    *,
    columns: int = 10,
    seed: int = 0,
) -> Image.Image:
    """Draw two bands, the most suspicious generated images and some at random, over their neighbours.  **Private.**

    The sets are those of the check.  A distance stands under each real image, marked where the private one is nearer.
    """
    from PIL import Image, ImageDraw, ImageFont

    scale = max(1, -(-_SIDE // generated.shape[2]))
    side, columns = generated.shape[2] * scale, min(columns, len(generated))
    to_private, to_held_out = result.distances
    sets: list[tuple[str, NDArray[np.uint8], NDArray[np.int64] | None, NDArray[np.float64] | None]] = [
        ("generated", generated, None, None),
        ("nearest private", private, result.to_private, to_private),
    ]
    if held_out is not None:
        sets.append(("nearest held-out", held_out, result.to_held_out, to_held_out))
    width = _LEFT + columns * (side + _GAP) + _GAP
    notes = (
        "PRIVATE: shows training images.  Do not publish.",
        result.conclusion,
        f"Under each real image: its distance to the generated one ({_unit(result)}).",
    )
    lines = [line for note in notes for line in textwrap.wrap(note, width // 7)]
    band, top = 26 + len(sets) * (side + _CAPTION), 16 * len(lines) + 2 * _GAP
    sheet = Image.new("RGB", (width, top + 2 * band), "white")
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(12)
    for number, line in enumerate(lines):
        draw.text((_GAP, _GAP + 16 * number), line, _INK if number else _ALARM)
    for title, picks in chosen_images(result, columns, seed):
        draw.text((_GAP, top), title, _INK)
        for row, (name, images, rows, distances) in enumerate(sets):
            y = top + 24 + row * (side + _CAPTION)
            draw.text((_GAP, y + side // 2 - 8), name, _SOFT)
            for column, pick in enumerate(picks):
                x = _LEFT + column * (side + _GAP)
                pixels = np.asarray(images[pick if rows is None else rows[pick]])
                sheet.paste(image_grid(pixels[None], 1, scale=scale, pad=0), (x, y))
                if distances is not None:
                    nearer = row == 1 and to_held_out is not None and to_private[pick] < to_held_out[pick]
                    draw.text((x, y + side + 2), f"{distances[pick]:.3g}", _ALARM if nearer else _SOFT)
        top += band
    return sheet
