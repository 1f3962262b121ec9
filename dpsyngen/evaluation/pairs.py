"""Generated images next to their nearest real ones, for the report.  Private: it holds real images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.evaluation.memorisation import Memorisation
from dpsyngen.report.plots import image_data

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
