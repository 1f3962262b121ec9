"""Generated images next to their nearest real ones, for the report.  Private: it holds real images."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpsyngen.evaluation.memorisation import Memorisation

FILE = "memorisation_pairs.json"
"""Of the private half."""


def chosen_images(result: Memorisation, count: int, seed: int) -> list[tuple[str, NDArray[np.int64]]]:
    """The generated images to be shown, in two groups with a title: the most suspicious ones, and some at random.

    Args:
        result: of the check.
        count: in a group, at most as many as there are images.
        seed: which images are the random ones.
    """
    number = len(result.to_private)
    count = min(count, number)
    against = "distance to the training set" if result.distances[1] is None else "distances: private over held-out"
    return [
        (f"Most suspicious (smallest {against})", result.most_suspicious(count)),
        ("At random", np.random.default_rng(seed).choice(number, count, replace=False)),
    ]


def unit(result: Memorisation) -> str:
    """In what the distances are."""
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
    """The same images as :func:`dpsyngen.evaluation.neighbour_picture.neighbour_picture`, each with its distances.

    Args:
        result: of these images.
        generated, private, held_out: as they were given to the check, uint8 [N, C, H, W].
        count: in a group.
        seed: which images are the random ones.

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
                pair["held_out"] = image_data(held_out[result.to_held_out[i]])
                pair["to_held_out"] = float(to_held_out[i])
            pairs.append(pair)
        groups.append({"title": title, "pairs": pairs})
    return {"unit": unit(result), "groups": groups}


def image_data(pixels: NDArray[np.uint8]) -> str:
    """One image, uint8 [C, H, W], as a ``data:`` URL, a pixel of it a pixel of the PNG: the page enlarges it."""
    return png_url(Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(np.moveaxis(pixels, 0, -1))))


def png_url(image: Image.Image) -> str:
    """A picture as a PNG in a ``data:`` URL, so that the report is one file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
