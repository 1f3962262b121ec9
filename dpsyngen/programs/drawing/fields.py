"""Random fields: a Fourier transform whose bits are the same on every machine, and colours for fields.

The transform is Cooley and Tukey's (1965) radix 2, down the columns, so that the inner loop runs along memory, then a
transposition.  The libraries' transforms choose their order of operations by the processor they find.
"""

from __future__ import annotations

import numpy as np

from dpsyngen.programs.drawing import Floats, Images, Word
from dpsyngen.programs.drawing.colours import MIX_VALUES, colour_mix
from dpsyngen.programs.drawing.counter_rng import fill_uniform
from dpsyngen.programs.drawing.portable import compiled, cos_sin
from dpsyngen.programs.drawing.raster import stretch

COLOURS = ("grey", "rotation", "palette")
COLOURED = COLOURS[1:]  # need 3 channels
ROTATION = 1

_MIX = np.uint64(0x636D6978)  # "cmix"


@compiled
def paint_fields(seed: Word, index: Word, fields: Floats, law: int, out: Images) -> None:
    """Write the top left corner of one field, or of three for `ROTATION`, to `out`, uint8 [C, S, S].

    `fields` is float64 [3 or more, H, W], and is used up.
    """
    if law == 0:
        stretch(fields, out[:1])
        for c in range(1, out.shape[0]):
            out[c] = out[0]
        return
    u = np.empty(MIX_VALUES)
    fill_uniform(seed, _MIX, index, np.uint64(0), u)
    colours, weights, root = colour_mix(u)
    if law == ROTATION:
        for c in range(2, -1, -1):  # R·field at each pixel, from the last row of R: each needs those before it
            mixed = root[c, 0] * fields[0]
            for k in range(1, c + 1):
                mixed += root[c, k] * fields[k]
            fields[c] = mixed
        stretch(fields, out)
    else:
        cut_into_colours(fields[0], colours, weights, out)


@compiled
def cut_into_colours(field: Floats, colours: Floats, weights: Floats, out: Images) -> None:
    """Colour the pixels by rank: the lowest share weights[0] gets the first colour, and so on; shares are exact."""
    size = out.shape[1]
    # By rank and not by level: then each colour has its share whatever the histogram of the field.
    order = np.argsort(np.ascontiguousarray(field[:size, :size]).ravel())
    levels = np.minimum(255.0, np.floor(256.0 * colours)).astype(np.uint8)
    colour = 0
    reached = weights[0]
    for rank in range(size * size):
        while colour < len(colours) - 1 and rank + 0.5 > reached * size * size:
            colour += 1
            reached += weights[colour]
        for c in range(3):
            out[c, order[rank] // size, order[rank] % size] = levels[colour, c]


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is `size` or more."""
    return 1 << max(0, size - 1).bit_length()


@compiled
def _columns(re: Floats, im: Floats, unity: Floats) -> None:
    n = re.shape[0]
    j = 0
    for i in range(1, n):  # put the rows in bit-reversed order: j counts with its bits mirrored
        bit = n >> 1
        while j & bit:
            j ^= bit
            bit >>= 1
        j |= bit
        if i < j:
            for a in (re, im):
                for k in range(n):
                    a[i, k], a[j, k] = a[j, k], a[i, k]
    half = 1
    while half < n:  # join transforms of length `half` in pairs: (a + w·b, a − w·b), w a root of unity
        step = n // (2 * half)
        for start in range(0, n, 2 * half):
            for k in range(half):
                c = unity[0, k * step]
                s = unity[1, k * step]
                a_re = re[start + k]
                a_im = im[start + k]
                b_re = re[start + k + half]
                b_im = im[start + k + half]
                for m in range(n):
                    x = c * b_re[m] - s * b_im[m]
                    y = c * b_im[m] + s * b_re[m]
                    b_re[m] = a_re[m] - x
                    b_im[m] = a_im[m] - y
                    a_re[m] += x
                    a_im[m] += y
        half *= 2


@compiled
def inverse_2d(re: Floats, im: Floats) -> None:
    """Replace re + i·im, [n, n], by Σ_f (re + i·im)[f]·e^{2πi f·x/n}, unnormalised.

    Swap the two arrays for the forward transform.
    """
    n = re.shape[0]
    unity = np.empty((2, n // 2))  # cos and sin of the first half of the n-th roots of unity
    for k in range(n // 2):
        unity[0, k], unity[1, k] = cos_sin(k / n)
    for _ in range(2):  # columns, then rows
        _columns(re, im, unity)
        re[:] = re.T.copy()
        im[:] = im.T.copy()
