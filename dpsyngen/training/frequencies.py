"""The orthonormal cosine transform of images, coefficients ordered from coarse to fine: a basis chosen without data.

DCT-II along height, width and colour.  Along colour the three vectors are grey, red - blue and green against both.  A
colour difference counts as twice as fine as grey of the same frequency, as in JPEG's halved colour resolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_matrix(size: int) -> Tensor:
    """[size, size] fp64, the orthonormal DCT-II: row f is √(2/size)·cos(π f (2i + 1) / (2 size)), row 0 over √2."""
    f, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    matrix = (math.pi * f * (2 * i + 1) / (2 * size)).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


class Frequencies:
    """The cosine transform of images [C, H, W].

    Attributes:
        size: D = C·H·W.
        radius: [D] fp64, how fine each coefficient is, ascending: √(f_y² + f_x²), twice √(f_y² + f_x² + 1) for a colour
            difference.
        bands: [D] int64, number of the ring that a coefficient belongs to, from 0: a whole radius, and whether it is
            grey or a colour difference.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        c, h, w = shape
        self.shape, self.size = shape, c * h * w
        self._matrices = cosine_matrix(c), cosine_matrix(h), cosine_matrix(w)
        colour, fy, fx = (a.flatten() for a in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        squares = (fy.square() + fx.square()).double()
        radius = torch.where(colour == 0, squares, 4 * (squares + 1)).sqrt()
        self._order = torch.argsort(radius, stable=True)
        self.radius = radius[self._order]
        rings = 2 * radius.round().long() + (colour > 0)
        self.bands = torch.unique(rings, return_inverse=True)[1][self._order]

    def transform(self, flat: Tensor, count: int | None = None) -> Tensor:
        """The `count` coarsest coefficients (all, if None) of images [N, D]: [N, count], fp64."""
        c, h, w = self._matrices
        images = flat.double().view(-1, *self.shape)
        out = h @ images @ w.mT
        if self.shape[0] > 1:
            out = torch.einsum("kc,nchw->nkhw", c, out)
        return out.flatten(1)[:, self._order[:count]]

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Images [N, D] of their coarsest coefficients [N, count]; the others are 0."""
        c, h, w = self._matrices
        every = coefficients.new_zeros(len(coefficients), self.size, dtype=torch.float64)
        every[:, self._order[: coefficients.shape[1]]] = coefficients.double()
        out = h.mT @ every.view(-1, *self.shape) @ w
        if self.shape[0] > 1:
            out = torch.einsum("kc,nkhw->nchw", c, out)
        return out.flatten(1)
