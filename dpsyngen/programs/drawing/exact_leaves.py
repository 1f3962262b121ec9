"""Exact dead leaves: the picture seen from below, drawn by coupling from the past.

Leaves fall on the plane forever, as a Poisson process in time, place and radius, and what one sees of them at any one
time is a dead-leaves image.  Looking at the fall backwards in time, each leaf lies *under* those placed before it here,
and once every pixel is covered nothing further back can be seen: the picture so far is an exact sample.  (Kendall and
Thönnes, "Perfect simulation in stochastic geometry", Pattern Recognition 32, 1999.  Painting forward and stopping at
coverage is not: it favours the large leaves that end the painting.)

Two ways to list the leaves still to come, both exact, because leaves that change nothing may be left out of a Poisson
process without changing the rest:

* while much is uncovered: all that could touch the canvas, radius density ∝ r^−α·(S + 2r)² and centre uniform in
  [−r, S + r]²;
* at the end: only those whose circumscribed disc holds an uncovered pixel.  Pick such a pixel evenly, a radius from the
  density ∝ r^−α·r², a centre uniform in the disc around it, and keep the leaf with probability 1/k where k counts
  the uncovered pixels in its disc, as it could have been proposed by each of them.

The second takes over when it is the faster way through the same stretch of time.
"""

from __future__ import annotations

import math

import numpy as np

from dpsyngen.programs.drawing import Canvas, Floats, Images, Ints, Word, Words
from dpsyngen.programs.drawing.colours import PALETTE, colour_of, draw_palette
from dpsyngen.programs.drawing.counter_rng import ONE, below, pick, unit32, words32
from dpsyngen.programs.drawing.portable import compiled, cos_sin
from dpsyngen.programs.drawing.shapes import DISC, LeafLaw, inverse, leaf_spans, mass, padded_masses, padded_radius

UNCOVERED = -1
RECORDED = 5  # x, y, radius, kind, pixels that stay visible

_STREAM = np.uint64(0x65786163)  # "exac"
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_WORTH = 3.0  # leaves of the first list that take as long as one of the second, measured


@compiled
def paint_under(canvas: Canvas, covered: Words, starts: Ints, stops: Ints, first: int, stop: int, value: int) -> int:
    """Give `value` to the uncovered pixels of the spans; returns how many there were.

    Bit j of ``covered[row, w]`` says that pixel (row, 64·w + j) is covered: most spans fall on covered ground, and are
    dismissed by one comparison.
    """
    fresh = 0
    for row in range(first, stop):
        a = starts[row]
        b = stops[row]
        if a >= b:
            continue
        for w in range(a >> 6, ((b - 1) >> 6) + 1):
            low = max(a - (w << 6), 0)
            high = min(b - (w << 6), 64)
            mask = (_ALL << np.uint64(low)) & (_ALL >> np.uint64(64 - high))
            if mask & ~covered[row, w] != np.uint64(0):
                covered[row, w] |= mask
                line = canvas[row, (w << 6) + low : (w << 6) + high]
                here = 0  # counted apart: adding to `fresh` pixel by pixel costs an image a tenth to a third more
                for j in range(line.shape[0]):
                    here += line[j] < 0
                    line[j] = value if line[j] < 0 else line[j]
                fresh += here
    return fresh


@compiled
def may_show(covered: Words, size: int, x: float, y: float, radius: float) -> bool:
    """Say whether the square around a leaf's circle has an uncovered pixel; half of all leaves fail this."""
    a = max(0, math.floor(x - radius))
    b = min(size, math.ceil(x + radius))
    top = max(0, math.floor(y - radius))
    stop = min(size, math.ceil(y + radius))
    for w in range(a >> 6, (b + 63) >> 6):
        mask = (_ALL << np.uint64(max(a - (w << 6), 0))) & (_ALL >> np.uint64(64 - min(b - (w << 6), 64)))
        for row in range(top, stop):
            if mask & ~covered[row, w] != np.uint64(0):
                return True
    return False


@compiled
def cover(seed: Word, index: Word, law: LeafLaw, size: int, number: bool, record: Floats) -> tuple[Canvas, int]:
    """Draw one image, [size, size]; also returns how many leaves were placed, those that stay hidden among them.

    Args:
        number: write the leaf's number to the canvas, not its colour.
        record: receives a row of `RECORDED` numbers for each leaf while it has room.
    """
    only, colour, exponent = law.only, law.colour, law.exponent
    r_min, r_max = law.r_min * size, law.r_max * size
    canvas = np.full((size, size), UNCOVERED, dtype=np.int32)
    covered = np.zeros((size, (size + 63) // 64), dtype=np.uint64)
    waiting = np.empty(size * size, dtype=np.int32)  # places of uncovered pixels
    starts = np.empty(size, dtype=np.int64)
    stops = np.empty(size, dtype=np.int64)
    corners = np.empty((2, 4))
    palette = np.empty(8, dtype=np.int64)
    colours = draw_palette(seed, index, law.grey, palette) if colour == PALETTE else 0
    masses = np.empty(3)
    # Leaves to a unit of time in either list; the loop ends when the second, at its price, has less to look at.
    everywhere = padded_masses(exponent, r_min, r_max, float(size), masses)
    at_pixel = math.pi * mass(exponent - 2.0, r_min, r_max)
    left = size * size
    leaves = 0
    count = 0  # of the waiting pixels
    block = np.uint64(0)
    angles = np.uint64(0)
    word_shape = np.uint64(0)
    word_angle = np.uint64(0)

    while left > 0:
        near = _WORTH * left * at_pixel <= everywhere
        if not near:
            # First list: all leaves that could touch the canvas.
            word_x, word_y, word_r, word_c = words32(seed, _STREAM, index, block)
            block += ONE
            radius = padded_radius(unit32(word_r), exponent, r_min, r_max, masses)
            x = unit32(word_x) * (size + 2.0 * radius) - radius
            y = unit32(word_y) * (size + 2.0 * radius) - radius
            # Most hidden leaves need no shape.  Discs are as fast to try.  Either way this uses the same blocks.
            shaped = leaves < record.shape[0] or only == DISC or may_show(covered, size, x, y, radius)
            if only != DISC:
                if shaped:
                    word_shape, word_angle, low, high = words32(seed, _STREAM, index, block)
                    angles = low | (high << np.uint64(32))
                block += ONE
        else:
            # Second list: only leaves around what is uncovered, thinned so that its law is the same.
            if count == 0:
                for row in range(size):
                    for column in range(size):
                        waiting[count] = row * size + column
                        count += canvas[row, column] < 0
            word_pixel, word_keep, word_r, word_c = words32(seed, _STREAM, index, block)
            word_d, word_turn, word_shape, word_angle = words32(seed, _STREAM, index, block + ONE)
            block += np.uint64(2)
            place = below(word_pixel, count)  # an uncovered pixel
            pixel = waiting[place]
            row = pixel // size
            column = pixel - row * size
            if canvas[row, column] >= 0:  # covered since the list was made: an even choice among the rest stays even
                count -= 1
                waiting[place] = waiting[count]
                continue
            radius = inverse(unit32(word_r), exponent - 2.0, r_min, r_max)
            distance = radius * math.sqrt(unit32(word_d))  # uniform in the disc
            cos, sin = cos_sin(unit32(word_turn))
            x = column + 0.5 + distance * cos
            y = row + 0.5 + distance * sin
            # Each of the k uncovered pixels in the disc could have proposed this leaf: keep one in k.
            if unit32(word_keep) * _uncovered_within(canvas, waiting, count, x, y, radius) > 1.0:
                continue
            shaped = True
            if only != DISC:
                low, high, _, _ = words32(seed, _STREAM, index, block)
                block += ONE
                angles = low | (high << np.uint64(32))
        if shaped:
            kind = only if only >= 0 else pick(word_shape, law.shares)
            first, stop = leaf_spans(size, kind, x, y, radius, word_angle, angles, corners, starts, stops)
            value = colour_of(word_c, colour, palette, colours)
            fresh = paint_under(canvas, covered, starts, stops, first, stop, leaves if number else value)
            left -= fresh
            if leaves < record.shape[0]:
                record[leaves] = (x, y, radius, float(kind), float(fresh))
        leaves += 1
    return canvas, leaves


@compiled
def _uncovered_within(canvas: Canvas, waiting: Canvas, count: int, x: float, y: float, radius: float) -> int:
    """Count the uncovered pixels whose centres lie in a disc: 1 or more, as it was drawn around one of them.

    Looks at the pixels of the disc or at the list of those waiting, whichever is shorter.
    """
    size = canvas.shape[0]
    found = 0
    square = radius * radius
    if 4.0 * square < count:
        for row in range(max(0, math.floor(y - radius)), min(size, math.ceil(y + radius) + 1)):
            for column in range(max(0, math.floor(x - radius)), min(size, math.ceil(x + radius) + 1)):
                dx = column + 0.5 - x
                dy = row + 0.5 - y
                found += canvas[row, column] < 0 and dx * dx + dy * dy <= square
    else:
        for n in range(count):
            row = waiting[n] // size
            column = waiting[n] - row * size
            dx = column + 0.5 - x
            dy = row + 0.5 - y
            if dx * dx + dy * dy <= square:
                found += canvas[row, column] < 0
    return max(found, 1)


@compiled
def unpack(canvas: Canvas, factor: int, out: Images) -> None:
    """Write colours as planes, out uint8 [C, S, S], each the mean of `factor` × `factor` pixels, halves rounded up."""
    area = factor * factor
    for c in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                if factor == 1:
                    out[c, i, j] = (canvas[i, j] >> (8 * c)) & 0xFF
                    continue
                total = 0
                for di in range(factor):
                    for dj in range(factor):
                        total += (canvas[i * factor + di, j * factor + dj] >> (8 * c)) & 0xFF
                out[c, i, j] = (2 * total + area) // (2 * area)


@compiled
def draw_exact(indices: Words, seed: Word, law: LeafLaw, factor: int, out: Images) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, H, W]; the side of the canvas is `factor` times the image's."""
    record = np.empty((0, RECORDED))
    for n in range(indices.shape[0]):
        canvas, _ = cover(seed, indices[n], law, out.shape[2] * factor, False, record)
        unpack(canvas, factor, out[n])
