"""The picture of a memorisation check: generated images over their nearest real neighbours.  Private."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dpsyngen.evaluation.memorisation import Memorisation
from dpsyngen.evaluation.pairs import chosen_images, unit

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_SIDE = 64  # pixels of an image on the sheet, at least
_GAP = 8
_PAPER, _INK, _SOFT, _ALARM = (255, 255, 255), (29, 33, 41), (89, 97, 110), (181, 47, 67)


def neighbour_picture(
    result: Memorisation,
    generated: NDArray[np.uint8],
    private: NDArray[np.uint8],
    held_out: NDArray[np.uint8] | None,
    *,
    columns: int = 10,
    seed: int = 0,
) -> Image.Image:
    """Two bands, the most suspicious generated images and some at random: generated, nearest private, nearest held-out.

    A distance stands under each real image, marked where the private one is the nearer.

    Args:
        result: of these images.
        generated, private, held_out: as they were given to the check.
        columns: generated images in a band.
        seed: which images are the random ones.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns, len(generated))
    scale = max(1, -(-_SIDE // generated.shape[2]))
    side = generated.shape[2] * scale
    font, bold = ImageFont.load_default(12), ImageFont.load_default(14)
    margin, caption = 118, 18
    rows = 2 if held_out is None else 3
    band = 30 + rows * (side + caption) + _GAP
    width = margin + columns * (side + _GAP) + _GAP
    notes = [
        "PRIVATE: shows training images.  Do not publish.",
        result.conclusion,
        f"Under each real image: its distance to the generated one ({unit(result)}).",
    ]
    lines = [line for note in notes for line in _wrapped(note, width - 2 * _GAP, font)]
    sheet = Image.new("RGB", (width, 2 * band + 16 * len(lines) + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((_GAP, _GAP + 16 * number), line, _ALARM if number == 0 else _INK, font)
    top = 16 * len(lines) + 2 * _GAP
    for title, picks in chosen_images(result, columns, seed):
        draw.text((_GAP, top), title, _INK, bold)
        _band(draw, sheet, result, (generated, private, held_out), picks, (margin, top + 26, scale), font)
        top += band
    return sheet


def _band(
    draw: ImageDraw.ImageDraw,
    sheet: Image.Image,
    result: Memorisation,
    sets: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8] | None],
    picks: NDArray[np.int64],
    place: tuple[int, int, int],
    font: object,
) -> None:
    generated, private, held_out = sets
    left, top, scale = place
    side = generated.shape[2] * scale
    d_private, d_held_out = result.distances
    for name, row in (("generated", 0), ("nearest private", 1), ("nearest held-out", 2)):
        if row < 2 or held_out is not None:
            draw.text((_GAP, top + row * (side + 18) + side // 2 - 8), name, _SOFT, font)  # type: ignore[arg-type]
    for column, pick in enumerate(picks):
        x = left + column * (side + _GAP)
        _paste(sheet, generated[pick], (x, top), scale)
        _paste(sheet, private[result.to_private[pick]], (x, top + side + 18), scale)
        nearer = d_held_out is not None and d_private[pick] < d_held_out[pick]
        colour = _ALARM if nearer else _SOFT
        draw.text((x, top + 2 * side + 20), f"{d_private[pick]:.3g}", colour, font)  # type: ignore[arg-type]
        if held_out is not None and result.to_held_out is not None and d_held_out is not None:
            _paste(sheet, held_out[result.to_held_out[pick]], (x, top + 2 * (side + 18)), scale)
            draw.text((x, top + 3 * side + 38), f"{d_held_out[pick]:.3g}", _SOFT, font)  # type: ignore[arg-type]


def _paste(sheet: Image.Image, pixels: NDArray[np.uint8], where: tuple[int, int], scale: int) -> None:
    from PIL import Image

    large = np.asarray(pixels).repeat(scale, 1).repeat(scale, 2)
    image = Image.fromarray(large[0] if len(large) == 1 else np.ascontiguousarray(np.moveaxis(large, 0, -1)))
    sheet.paste(image.convert("RGB"), where)


def _wrapped(text: str, width: int, font: object) -> list[str]:
    """`text` in lines that fit."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:  # type: ignore[attr-defined]
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
