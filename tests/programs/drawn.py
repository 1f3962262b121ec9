"""What was drawn at random to make an image, by the functions that the families draw with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.programs import (
    Program,
    contours,
    fractal,
    random_network,
    smooth_noise,
    spectrum,
    strokes,
    wavelet_marginal,
    wrappers,
)
from dpsyngen.programs.dead_leaves import DeadLeaves
from dpsyngen.programs.drawing.exact_leaves import RECORDED, cover
from dpsyngen.programs.drawing.reference_leaves import paint_over
from dpsyngen.programs.drawing.shapes import KINDS


def covered(program: DeadLeaves, index: int, record: NDArray[np.float64]) -> tuple[NDArray[np.int32], int]:
    """The number of the leaf seen at each pixel of the canvas, and how many leaves were placed."""
    size = program.resolution * program.supersample
    canvas, leaves = cover(np.uint64(program.seed), np.uint64(index), program._law(), size, True, record)
    return canvas, leaves


def leaf_counts(program: DeadLeaves, count: int) -> NDArray[np.int64]:
    """How many leaves each of the first images took until no ground showed."""
    canvas = np.empty((program.resolution, program.resolution), dtype=np.int32)
    if program.mode == "exact":
        return np.array([covered(program, i, np.empty((0, RECORDED)))[1] for i in range(count)])
    law = program._law()
    return np.array([paint_over(canvas, np.uint64(program.seed), np.uint64(i), law) for i in range(count)])


def drawn(program: Any, index: int) -> dict[str, Any]:
    """Numbers, strings and arrays by name."""
    seed, number = np.uint64(program.seed), np.uint64(index)
    if isinstance(program, DeadLeaves):
        leaves = covered(program, index, np.empty((0, RECORDED)))[1]
        record = np.empty((leaves, RECORDED))
        covered(program, index, record)
        x, y, radius, kind, visible = record.T
        shapes = [KINDS[int(k)] for k in kind]
        return {"leaves": leaves, "x": x, "y": y, "radius": radius, "shape": shapes, "visible": visible.astype(int)}
    if isinstance(program, spectrum.Spectrum):
        slope, difference, turns = spectrum.law_of(seed, number, program._law())
        return {"slope": slope, "difference": difference, "angle": 2 * math.pi * turns}
    if isinstance(program, smooth_noise.SmoothNoise):
        return dict(zip(("kind", "cells", "octaves"), smooth_noise.law_of(seed, number, program._law()), strict=False))
    if isinstance(program, random_network.RandomNetwork):
        law = random_network.KINDS.index(program.kind), program.contrast
        names = ("kind", "noise", "alpha", "mean", "contrast")
        return dict(zip(names, random_network.law_of(seed, number, law), strict=True))
    if isinstance(program, wavelet_marginal.WaveletMarginal):
        tails = np.empty((int(math.log2(program._side // wavelet_marginal.COARSEST)), 3))
        offset = np.empty(2, dtype=np.int64)
        law = program.tails, program.decay, program._side
        return {"decay": wavelet_marginal.law_of(seed, number, law, tails, offset), "tails": tails, "offset": offset}
    if isinstance(program, fractal.Fractal):
        a, b, c, d, e, f, reached, s1, s2 = fractal.draw_maps(seed, number, *program.maps).T
        matrices = np.stack([np.stack([a, b, e], 1), np.stack([c, d, f], 1)], 1)
        return {
            "maps": matrices, "singular_values": np.stack([s1, s2], 1), "chances": np.diff(reached, prepend=0.0)
        }  # fmt: skip
    if isinstance(program, strokes.Strokes):
        values = strokes.draw_curves(seed, number, program._law(), program.resolution)
        return {"points": values[:, :8].reshape(-1, 4, 2), "widths": 2 * values[:, 8:]}
    if isinstance(program, contours.Contours):
        law, points, kinds = program._law(), [], []
        for k in range(contours.figure_count(seed, number, law)):
            kind, xs, ys, _ = contours.draw_figure(seed, number, k, law, program.resolution)
            kinds.append(kind)
            points.append(np.stack([xs, ys], 1))
        return {"shapes": [contours.SHAPES[k] for k in kinds], "points": np.stack(points)}
    if isinstance(program, wrappers.Affine):
        turns, scale, shear, right, down = wrappers.affine_law(seed, number, program._law())
        return {"turn": 360.0 * turns, "scale": scale, "shear": shear, "shift": (right, down)}
    if isinstance(program, wrappers.Blur):
        return {"deviation": wrappers.uniform_law(seed, wrappers._BLUR, number, *program.deviation)}
    if isinstance(program, wrappers.Invert):
        return {"inverted": wrappers.uniform_law(seed, wrappers._INVERT, number, 0.0, 1.0) < program.probability}
    assert isinstance(program, wrappers.Mixture)
    return {"program": program._choices(np.array([index], dtype=np.uint64))[0]}


__all__ = ["Program", "covered", "drawn", "leaf_counts"]
