"""Weight gradients of 3x3 convolutions, example by example, as dot products (CPU, fp32).

The gradient of tap (i, j) is the dot product, over positions, of the output's gradient with the input shifted by
(i, j).  Stored with one column of zeros between its rows, every shift of an image is a constant offset into one
long vector, so nine taps times three output channels are 27 dot products that share their loads and stay in
registers.  Convolution libraries are built for whole batches and fall short of this for one example of few
channels; for many channels on small images they win, and the engine measures which.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor


def _compiled(function: Any) -> Any:
    # Sums may be reordered (that is what vectorising them is), but NaN and infinity must stay what they are: the
    # engine recognises broken examples by them.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    options["fastmath"] = {"reassoc", "contract", "nsz"}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # no writable place for the cache
        return njit(function, **options)


@_compiled
def _dot_products(x: Any, g: Any, out: Any, copies: int) -> None:  # pragma: no cover (compiled)
    height, width = x.shape[2], x.shape[3]
    inputs, outputs = x.shape[1], g.shape[1]
    pitch = width + 1
    length = (height * pitch + 15) // 16 * 16  # whole vectors, the rest of which is zeros
    front = pitch + 1
    thirds = (outputs + 2) // 3
    zero = np.float32(0.0)
    xs = np.zeros((inputs, length + 2 * front), np.float32)
    gs = np.zeros((3 * thirds, length), np.float32)
    for b in range(out.shape[0]):
        for k in range(copies):
            row = b * copies + k
            for c in range(inputs):
                for i in range(height):
                    at = front + i * pitch
                    for j in range(width):
                        xs[c, at + j] = x[row, c, i, j]
            for c in range(outputs):
                for i in range(height):
                    at = i * pitch
                    for j in range(width):
                        gs[c, at + j] = g[row, c, i, j]
            for third in range(thirds):
                o = 3 * third
                ga, gb, gc = gs[o], gs[o + 1], gs[o + 2]
                for c in range(inputs):
                    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = a8 = zero
                    b0 = b1 = b2 = b3 = b4 = b5 = b6 = b7 = b8 = zero
                    c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = c8 = zero
                    x0 = xs[c, front - pitch - 1 :]
                    x1 = xs[c, front - pitch :]
                    x2 = xs[c, front - pitch + 1 :]
                    x3 = xs[c, front - 1 :]
                    x4 = xs[c, front:]
                    x5 = xs[c, front + 1 :]
                    x6 = xs[c, front + pitch - 1 :]
                    x7 = xs[c, front + pitch :]
                    x8 = xs[c, front + pitch + 1 :]
                    for p in range(length):
                        u, v, w = ga[p], gb[p], gc[p]
                        t = x0[p]
                        a0, b0, c0 = a0 + u * t, b0 + v * t, c0 + w * t
                        t = x1[p]
                        a1, b1, c1 = a1 + u * t, b1 + v * t, c1 + w * t
                        t = x2[p]
                        a2, b2, c2 = a2 + u * t, b2 + v * t, c2 + w * t
                        t = x3[p]
                        a3, b3, c3 = a3 + u * t, b3 + v * t, c3 + w * t
                        t = x4[p]
                        a4, b4, c4 = a4 + u * t, b4 + v * t, c4 + w * t
                        t = x5[p]
                        a5, b5, c5 = a5 + u * t, b5 + v * t, c5 + w * t
                        t = x6[p]
                        a6, b6, c6 = a6 + u * t, b6 + v * t, c6 + w * t
                        t = x7[p]
                        a7, b7, c7 = a7 + u * t, b7 + v * t, c7 + w * t
                        t = x8[p]
                        a8, b8, c8 = a8 + u * t, b8 + v * t, c8 + w * t
                    sums = (
                        (a0, a1, a2, a3, a4, a5, a6, a7, a8),
                        (b0, b1, b2, b3, b4, b5, b6, b7, b8),
                        (c0, c1, c2, c3, c4, c5, c6, c7, c8),
                    )
                    for i in range(min(3, outputs - o)):
                        for tap in range(9):
                            if k == 0:
                                out[b, o + i, c, tap] = zero
                            out[b, o + i, c, tap] += sums[i][tap]


def dot_products(g: Tensor, x: Tensor, examples: int, copies: int) -> Tensor:
    """Weight gradients [examples, C_out, C_in, 3, 3] of a convolution with stride 1 and padding 1, for each example.

    g [examples*copies, C_out, H, W] is the gradient of the output, x [examples*copies, C_in, H, W] the input, fp32 on
    the CPU; gradients of the copies of an example add up.
    """
    out = torch.empty(examples, g.shape[1], x.shape[1], 9, dtype=torch.float32)
    _dot_products(x.contiguous().numpy(), g.contiguous().numpy(), out.numpy(), copies)
    return out.view(examples, g.shape[1], x.shape[1], 3, 3)
