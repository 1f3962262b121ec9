"""Arrays as pictures: one image, or many side by side, and their PNG files."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpsyngen.errors import ConfigError, require
from dpsyngen.programs.base import Program, as_integer
from dpsyngen.programs.drawing import Images

if TYPE_CHECKING:
    from PIL import Image

_GAP_LEVEL = 128  # neither black nor white: both occur at the border of images


def picture(pixels: Images) -> Image.Image:
    """Make a Pillow image, of mode "L" or "RGB", of one image [C, H, W]."""
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def png(image: Image.Image, *, optimize: bool = True) -> bytes:
    """Encode a picture as a PNG file; `optimize` takes some time for a smaller file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=optimize)
    return buffer.getvalue()


def png_url(image: Image.Image) -> str:
    """Encode a picture as a ``data:`` URL, so that a page with it is one file."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def image_grid(images: Images, columns: int, *, scale: int = 1, pad: int = 1) -> Image.Image:
    """Arrange images in reading order, `columns` to a row, as one Pillow image (mode "L" or "RGB").

    Args:
        images: uint8 [N, C, H, W], N ≥ 1, C is 1 or 3; else ConfigError.
        scale: side of the square of output pixels that shows one pixel.
        pad: width of the grey gaps and frame in output pixels.
    """
    right = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] in (1, 3) and 0 not in images.shape
    require(right, "images", (str(images.dtype), *images.shape), "uint8 [N, C, H, W] with N ≥ 1 and C 1 or 3")
    scale = as_integer("scale", scale, 1, 1024)
    pad = as_integer("pad", pad, 0, 1024)
    columns = min(as_integer("columns", columns, 1, 2**31), len(images))
    rows = -(-len(images) // columns)
    count, channels, height, width = images.shape
    height, width = scale * height, scale * width
    sheet = np.full((channels, rows * (height + pad) + pad, columns * (width + pad) + pad), _GAP_LEVEL, dtype=np.uint8)
    for n in range(count):
        top = pad + (n // columns) * (height + pad)
        left = pad + (n % columns) * (width + pad)
        sheet[:, top : top + height, left : left + width] = images[n].repeat(scale, 1).repeat(scale, 2)
    return picture(sheet)


def save_grid(
    program: Program,
    path: str | os.PathLike[str],
    *,
    count: int = 64,
    columns: int = 8,
    scale: int = 3,
    overwrite: bool = False,
) -> Path:
    """Write images 0 … count − 1 of `program` as one PNG file, whole or not at all; returns its path.

    ConfigError if `path` is no new .png in a folder (it may be there with `overwrite`), or a number is not positive.
    """
    from dpsyngen.files import write_atomically

    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ConfigError(f"{target} does not end in .png: grids are written as PNG; choose such a name.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder: create it, or write somewhere else.")
    if target.is_dir() or (target.exists() and not overwrite):
        raise ConfigError(f"{target} exists already: choose another name, remove it, or pass overwrite.")
    count = as_integer("count", count, 1, 2**20)
    grid = image_grid(program.batch(range(count)), columns, scale=scale)
    write_atomically(target, lambda temporary: grid.save(temporary, format="PNG"))
    return target
