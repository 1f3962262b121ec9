"""Findings about generated images: blank ones, noise, copies of one another, classes that look alike.

Generated images are post-processing of the mechanism's output, so nothing here looks at private data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dpsyngen.training.health import Basis, Finding

SAME = 0.02
"""Root mean square difference of pixels in [0, 1] below which two images are one: 5 of 255 grey levels, which the eye
does not tell apart.  Different digits or dead leaves are 0.1 to 0.6 apart."""

FLAT = 0.02
"""Standard deviation of the pixels of a blank image, by the same reasoning; digits and dead leaves have 0.2 to 0.4."""

SMOOTH = 0.15
"""Correlation of neighbouring pixels, median over images, below which they are noise.  White noise has 0; digits of 8×8
pixels have 0.6 (none below 0.4), dead leaves of 28×28 pixels 0.5."""

_PERMUTATIONS = 999
_BASIS: Basis = "released"


def of_images(
    images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None, class_names: Sequence[str] = ()
) -> list[Finding]:
    """What is wrong with generated images, as far as it shows in a few dozen.

    Args:
        images: uint8 [N, C, H, W], N ≥ 2, not selected in any way.
        labels: their classes [N], several images each; None: unconditional.
        class_names: names of the classes.
    """
    out: list[Finding] = []
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    apart = _distances(flat)
    blank = flat.std(1) < FLAT
    if blank.mean() > 0.1:
        level = float(flat[blank].mean())
        colour = "black" if level < 0.05 else "white" if level > 0.95 else "of one grey or colour"
        out.append(
            Finding(
                "blank-images",
                "error" if blank.mean() > 0.5 else "warning",
                f"{int(blank.sum())} of {len(images)} generated images are {colour} all over",
                "the network diverged, or never learned what the images look like",
                "lower --lr by a factor of 10; if the loss fell as it should, draw with lower guidance",
                _BASIS,
            )
        )
    count = distinct(apart)
    pairs = apart[np.triu_indices(len(images), 1)]
    if count <= len(images) / 2 and blank.mean() <= 0.5:
        one = float(np.median(pairs)) < SAME
        out.append(
            Finding(
                "collapsed",
                "error" if one or count <= len(images) / 10 else "warning",
                f"{len(images)} generated images show {count} different ones; half of the pairs differ by less than "
                f"{float(np.median(pairs)):.2g} (two images count as one below {SAME:g})",
                "the generator draws the same image over and over"
                if one
                else "the generator knows few images and repeats them",
                "lower --lr, draw with lower guidance, and see whether another finding says that the loss rose",
                _BASIS,
            )
        )
    correlation = neighbour_correlation(images[~blank])
    if correlation is not None and correlation < SMOOTH:
        out.append(
            Finding(
                "noise-images",
                "error",
                f"neighbouring pixels of generated images correlate by {correlation:.2f} (pictures: 0.4 and more)",
                "the images are noise: the network removes too little of it",
                "take more --steps, raise --lr if the loss is still falling, and see whether another finding says that "
                "DP noise dominates.  If your images are meant to look like noise, all is well",
                _BASIS,
            )
        )
    if labels is not None and not any(f.severity == "error" for f in out):
        out += _of_classes(apart, labels, class_names)
    return out


def _of_classes(apart: NDArray[np.float64], labels: NDArray[np.int64], class_names: Sequence[str]) -> list[Finding]:
    out: list[Finding] = []
    single = []
    for number in np.unique(labels):
        rows = np.flatnonzero(labels == number)
        within = apart[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)]
        if len(within) and np.median(within) < SAME:
            single.append(class_names[number] if number < len(class_names) else str(number))
    if single:
        out.append(
            Finding(
                "classes-collapsed",
                "error" if 2 * len(single) > len(np.unique(labels)) else "warning",
                f"the images of a class look all alike in {len(single)} of {len(np.unique(labels))} classes: "
                + ", ".join(single[:10]),
                "such a class has one image, not a distribution",
                "draw with lower guidance (`dpsyngen sample --guidance 1`); lower --lr",
                _BASIS,
            )
        )
    ratio, p = label_effect(apart, labels)
    if p > 0.01:
        out.append(
            Finding(
                "label-ignored",
                "warning",
                f"images of different classes differ no more than images of one (pseudo-F = {ratio:.2f}, where 1 is no "
                f"difference; p = {p:.2g})",
                "the generator does not use the class: labelled images from it teach a classifier nothing",
                "draw with guidance (--set sampling.guidance=2, or `dpsyngen sample --guidance 2`; the network must "
                "have been trained with network.label_dropout above 0), take more --steps, or train --unconditional if "
                "classes do not matter",
                _BASIS,
            )
        )
    return out


def _distances(flat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square differences [N, N]."""
    squares = (flat**2).sum(1)
    total = squares[:, None] + squares[None] - 2 * flat @ flat.T
    return np.sqrt(np.maximum(total, 0) / flat.shape[1])


def distinct(apart: NDArray[np.float64]) -> int:
    """Images that are left if each one that is the same as an earlier one is taken away."""
    kept: list[int] = []
    for i in range(len(apart)):
        if not kept or apart[i, kept].min() >= SAME:
            kept.append(i)
    return len(kept)


def neighbour_correlation(images: NDArray[np.uint8]) -> float | None:
    """Correlation of horizontal and vertical neighbours within an image, median over images; None if there is none."""
    if not len(images):
        return None
    x = images.astype(np.float64)
    x = x - x.mean((2, 3), keepdims=True)
    variance = (x**2).mean((1, 2, 3))
    across = ((x[..., 1:] * x[..., :-1]).mean((1, 2, 3)) + (x[:, :, 1:] * x[:, :, :-1]).mean((1, 2, 3))) / 2
    return float(np.median(across / np.maximum(variance, 1e-12)))


def label_effect(apart: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Pseudo-F of distances between and within classes, and its permutation p (PERMANOVA, Anderson 2001)."""
    squares = apart**2
    n, classes = len(labels), len(np.unique(labels))
    if classes < 2 or n <= classes:
        return 1.0, 0.0  # nothing to compare, so nothing to report
    total = squares.sum() / (2 * n)

    def ratio(of: NDArray[np.int64]) -> float:
        same = of[:, None] == of[None]
        within = (squares * same / same.sum(1)[:, None]).sum() / 2
        return float(((total - within) / (classes - 1)) / max(within / (n - classes), 1e-300))

    seen = ratio(labels)
    rng = np.random.default_rng(0)  # of the permutations: the same run gives the same finding
    larger = sum(ratio(rng.permutation(labels)) >= seen for _ in range(_PERMUTATIONS))
    return seen, (1 + larger) / (1 + _PERMUTATIONS)
