"""Pictures of the reports as PNG in ``data:`` URLs, so that a report is one file."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

COLOURS = {"public": "#2a9d8f", "private": "#d1495b"}
"""Of the pictures that matplotlib draws; those of the page are in style.css."""


def png_data(images: NDArray[np.uint8], columns: int, scale: int, pad: int = 1) -> str:
    """A grid of uint8 [N, C, H, W] as a ``data:`` URL; arguments as for :func:`dpsyngen.programs.image_grid`."""
    from dpsyngen.programs import image_grid

    return _url(image_grid(images, columns, scale=scale, pad=pad))


def image_data(pixels: NDArray[np.uint8]) -> str:
    """One image, uint8 [C, H, W], as a ``data:`` URL, a pixel of it a pixel of the PNG: the page enlarges it."""
    from PIL import Image

    return _url(Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(np.moveaxis(pixels, 0, -1))))


def _url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
