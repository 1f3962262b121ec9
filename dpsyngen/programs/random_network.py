"""Images from untrained convolutional generators: what a network of StyleGAN's build draws before it has seen anything.

Source: the StyleGAN models of Baradad et al., "Learning to See by Looking at Noise", arXiv 2106.05963, after Karras et
al., "Analyzing and improving the image quality of StyleGAN", CVPR 2020.  Written from those descriptions, at a size
for small images.  A constant of 4 × 4 is doubled until it covers the image.  At each size two convolutions of 3 × 3,
whose weights are multiplied by a style for each input channel and normalised for each output channel, are followed by
noise, a bias and a leaky ReLU; one of 1 × 1 adds the channels of each size to the picture.

================  =========================================================================================
random            weights normal, noise white and weak
high-frequency    the same with strong noise of spectrum 1/f^α, α uniform on [½, 2]: detail at all scales
sparse            each 3 × 3 filter is one of 9 wavelets with a normal factor; biases uniform on ±0.2
oriented          sparse, with one wavelet for each input channel, the same for all output channels, and the
                  same noise for all convolutions of a size: lines that go on over the picture
mixed             each image one of these, evenly
================  =========================================================================================

Differences from the published images: every image has fresh weights (theirs share them in groups of 400), and its mean
and contrast are drawn from uniform ranges (theirs are matched to statistics of photographs, which we never use).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dpsyngen.programs.base import Program, as_choice, as_integer, as_range, param
from dpsyngen.programs.drawing import Floats, Images, Law, Singles, Word, Words
from dpsyngen.programs.drawing.counter_rng import below, fill_normal, fill_uniform, unit32, words32
from dpsyngen.programs.drawing.fields import inverse_2d, power_of_two, roots
from dpsyngen.programs.drawing.portable import compiled, cos_sin, power
from dpsyngen.programs.drawing.raster import to_levels
from dpsyngen.programs.registry import register

KINDS = ("random", "high-frequency", "sparse", "oriented", "mixed")
RANDOM, HIGH_FREQUENCY, SPARSE, ORIENTED, MIXED = range(5)
MIN_CHANNELS = 4
FULL_WIDTH_UP_TO = 16  # pixels; each further doubling halves the channels

_LAW = np.uint64(0x6E65746C)  # "netl"
_WEIGHTS = np.uint64(0x6E657477)  # "netw"
_NOISE = np.uint64(0x6E65746E)  # "netn"
_PINK = np.uint64(0x6E657470)  # "netp"
_SLOPE = np.float32(0.2)
_FADE = np.float32(0.7)  # of the picture at each doubling: the finest size shows most

# Products of a low pass and first and second differences along rows and columns.
_ONE_SIDED = np.array([[0.5, 1.0, 0.5], [-1.0, 0.0, 1.0], [-0.5, 1.0, -0.5]])
WAVELETS = np.array([np.outer(a, b) for a in _ONE_SIDED for b in _ONE_SIDED]) / 1.5


@register("random-network")
@dataclass(frozen=True, kw_only=True)
class RandomNetwork(Program):
    """Pictures of untrained convolutional generators of StyleGAN's build.

    Attributes:
        kind: "random", "high-frequency", "sparse", "oriented" or "mixed".
        width: channels up to 16 pixels, 4 to 64; half as many at each further doubling, 4 at least.
        contrast: range of the standard deviation of an image in levels, uniform; 1 to 127.
    """

    prior_tier: ClassVar[int] = 0

    kind: str = param("oriented", as_choice, KINDS)
    width: int = param(12, as_integer, MIN_CHANNELS, 64)
    contrast: Any = param((35.0, 75.0), as_range, 1.0, 127.0)

    def _draw(self, indices: Words, out: Images) -> None:
        law = KINDS.index(self.kind), self.contrast
        draw(indices, np.uint64(self.seed), law, self.width, max(8, power_of_two(self.resolution)), out)


@compiled
def law_of(seed: Word, index: Word, law: Law) -> tuple[int, float, float, float, float]:
    """Draw kind, strength and exponent of the noise, mean and contrast of an image."""
    kind, (low, high) = law
    a, b, c, d = words32(seed, _LAW, index, np.uint64(0))
    e, _, _, _ = words32(seed, _LAW, index, np.uint64(1))
    if kind == MIXED:
        kind = below(a, 4)
    noise = 0.1 * unit32(b)
    alpha = 0.0
    if kind == HIGH_FREQUENCY:
        noise = 0.5 + unit32(b)
        alpha = 0.5 + 1.5 * unit32(c)
    elif kind != RANDOM:
        noise = 0.3 * unit32(b)
    return kind, noise, alpha, 64.0 + 128.0 * unit32(d), low + unit32(e) * (high - low)


@compiled
def channels_at(size: int, width: int) -> int:
    """Return the number of feature maps at a size in pixels."""
    while size > FULL_WIDTH_UP_TO and width > MIN_CHANNELS:
        width //= 2
        size //= 2
    return max(MIN_CHANNELS, width)


@compiled
def draw_filters(
    seed: Word, index: Word, block: Word, kind: int, inputs: int, outputs: int, filters: Singles, biases: Singles
) -> Word:
    """Fill filters [outputs, inputs, 3, 3], styled and normalised, and biases [outputs]; returns the next block."""
    styles = np.empty(inputs)
    block = fill_normal(seed, _WEIGHTS, index, block, styles)
    each = 9 if kind < SPARSE else 1  # normals to a filter
    normals = np.empty(outputs * inputs * each)
    block = fill_normal(seed, _WEIGHTS, index, block, normals)
    picks = np.empty(outputs * inputs)
    shifts = np.empty(outputs)
    if kind >= SPARSE:
        block = fill_uniform(seed, _WEIGHTS, index, block, picks)
        block = fill_uniform(seed, _WEIGHTS, index, block, shifts)
    for o in range(outputs):
        biases[o] = 0.4 * shifts[o] - 0.2 if kind >= SPARSE else 0.0
        for i in range(inputs):
            style, n = 1.0 + styles[i], (o * inputs + i) * each
            if kind < SPARSE:
                for k in range(9):
                    filters[o, i, k // 3, k % 3] = style * normals[n + k]
            else:
                wavelet = WAVELETS[min(8, int(9.0 * picks[i if kind == ORIENTED else n]))]
                for k in range(9):
                    filters[o, i, k // 3, k % 3] = style * normals[n] * wavelet[k // 3, k % 3]
        # StyleGAN's demodulation: each output channel gets weights of one norm, whatever the styles were.
        square = 0.0
        for i in range(inputs):
            for k in range(9):
                square += float(filters[o, i, k // 3, k % 3]) * float(filters[o, i, k // 3, k % 3])
        scale = np.float32(1.4 / math.sqrt(square + 1e-8))  # keeps the mean square through a leaky ReLU
        for i in range(inputs):
            for k in range(9):
                filters[o, i, k // 3, k % 3] *= scale
    return block


@compiled
def convolve(
    maps: Singles,
    inputs: int,
    size: int,
    filters: Singles,
    biases: Singles,
    strengths: Singles,
    noise: Singles,
    outputs: int,
    out: Singles,
) -> None:
    """Apply a 3 × 3 convolution, noise, bias and leaky ReLU.

    `maps` [inputs, size + 2, ≥ size + 2] has a frame, which is filled here by repeating the border; so has `out`.
    """
    for i in range(inputs):
        for y in range(1, size + 1):
            maps[i, y, 0] = maps[i, y, 1]
            maps[i, y, size + 1] = maps[i, y, size]
        for x in range(size + 2):
            maps[i, 0, x] = maps[i, 1, x]
            maps[i, size + 1, x] = maps[i, size, x]
    for o in range(outputs):
        for y in range(size):
            line = out[o, y + 1, 1 : size + 1]
            grain = noise[y, :size]
            for x in range(size):
                line[x] = biases[o] + strengths[o] * grain[x]
            for i in range(inputs):
                for ky in range(3):
                    a = filters[o, i, ky, 0]
                    b = filters[o, i, ky, 1]
                    c = filters[o, i, ky, 2]
                    left = maps[i, y + ky, 0:size]
                    middle = maps[i, y + ky, 1 : size + 1]
                    right = maps[i, y + ky, 2 : size + 2]
                    for x in range(size):
                        line[x] += a * left[x] + b * middle[x] + c * right[x]
            for x in range(size):
                line[x] = line[x] if line[x] > np.float32(0.0) else _SLOPE * line[x]


@compiled
def enlarge(maps: Singles, count: int, size: int, frame: int, out: Singles) -> None:
    """Double the size of the maps by linear interpolation; `frame` is the width of the frame in both arrays."""
    near = np.float32(0.75)
    far = np.float32(0.25)
    for k in range(count):
        for y in range(2 * size):
            i = y // 2
            other = min(size - 1, max(0, i - 1 if y % 2 == 0 else i + 1))
            for x in range(2 * size):
                j = x // 2
                beside = min(size - 1, max(0, j - 1 if x % 2 == 0 else j + 1))
                a = near * maps[k, i + frame, j + frame] + far * maps[k, i + frame, beside + frame]
                b = near * maps[k, other + frame, j + frame] + far * maps[k, other + frame, beside + frame]
                out[k, y + frame, x + frame] = near * a + far * b


@compiled
def pink_noise(seed: Word, index: Word, alpha: float, unity: Floats, re: Floats, im: Floats) -> None:
    """Draw a field with amplitudes 1/f^α and variance 1 into `re`, [n, n]."""
    n = re.shape[0]
    total = 0.0
    for i in range(n):
        for j in range(n):
            fy = float(min(i, n - i))
            fx = float(min(j, n - j))
            square = fy * fy + fx * fx
            a, _, _, _ = words32(seed, _PINK, index, np.uint64(i * n + j))
            amplitude = power(square, -0.5 * alpha) if square > 0.0 else 0.0
            c, s = cos_sin(unit32(a))
            re[i, j] = amplitude * c
            im[i, j] = amplitude * s
            total += amplitude * amplitude
    # Phases are not those of a real field, so take the real part, which has half of the power.
    inverse_2d(re, im, unity)
    re *= 1.0 / math.sqrt(0.5 * total)


@compiled
def fill_noise(seed: Word, index: Word, number: int, pink: bool, size: int, field: Floats, out: Singles) -> None:
    """Draw noise map `number` of an image, [size, size]: white, or a shifted piece of the pink field."""
    if pink:
        n = field.shape[0]
        a, b, _, _ = words32(seed, _NOISE, index, np.uint64(number) << np.uint64(24))
        top = below(a, n)
        left = below(b, n)
        for i in range(size):
            for j in range(size):
                out[i, j] = field[(top + i) % n, (left + j) % n]
        return
    u = np.empty(size * size)
    fill_uniform(seed, _NOISE, index, np.uint64(number) << np.uint64(24), u)
    for i in range(size):
        for j in range(size):
            # Uniform with variance 1: cheaper than normal, and sums of many look the same.
            out[i, j] = 3.4641016 * (u[i * size + j] - 0.5)


@compiled
def draw(indices: Words, seed: Word, law: Law, width: int, side: int, out: Images) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    channels = out.shape[1]
    size = out.shape[2]
    maps = np.zeros((width, side + 2, side + 2), dtype=np.float32)
    next_maps = np.zeros((width, side + 2, side + 2), dtype=np.float32)
    picture = np.zeros((channels, side, side), dtype=np.float32)
    next_picture = np.zeros((channels, side, side), dtype=np.float32)
    noise = np.zeros((side, side), dtype=np.float32)
    filters = np.empty((width, width, 3, 3), dtype=np.float32)
    biases = np.empty(width, dtype=np.float32)
    strengths = np.empty(width, dtype=np.float32)
    unity = roots(side)
    re = np.empty((side, side))
    im = np.empty((side, side))
    start = np.empty(width * 16)
    scales = np.empty(width)
    last = np.empty(channels * width)
    canvas = np.empty((channels, size, size))
    for n in range(indices.shape[0]):
        index = indices[n]
        chosen, strength, alpha, mean, contrast = law_of(seed, index, law)
        if chosen == HIGH_FREQUENCY:
            pink_noise(seed, index, alpha, unity, re, im)
        block = np.uint64(0)
        inputs = channels_at(4, width)
        block = fill_normal(seed, _WEIGHTS, index, block, start)  # the constant of 4 × 4
        maps[:inputs, 1:5, 1:5] = start[: inputs * 16].reshape(inputs, 4, 4)
        picture[:] = np.float32(0.0)
        here = 4
        layer = 0
        while True:  # a block: two convolutions, to the picture, and twice the size
            outputs = channels_at(here, width)
            for part in range(2):
                if part == 0 or chosen != ORIENTED:
                    fill_noise(seed, index, layer, chosen == HIGH_FREQUENCY, here, re, noise)
                layer += 1
                block = draw_filters(seed, index, block, chosen, inputs, outputs, filters, biases)
                block = fill_normal(seed, _WEIGHTS, index, block, scales)
                strengths[:outputs] = strength * scales[:outputs]
                convolve(maps, inputs, here, filters, biases, strengths, noise, outputs, next_maps)
                maps, next_maps = next_maps, maps
                inputs = outputs
            block = fill_normal(seed, _WEIGHTS, index, block, last)
            for c in range(channels):
                for i in range(inputs):
                    w = np.float32(last[c * width + i] / math.sqrt(inputs))
                    for y in range(here):
                        for x in range(here):
                            picture[c, y, x] += w * maps[i, y + 1, x + 1]
            if here >= side:
                break
            enlarge(maps, inputs, here, 1, next_maps)
            maps, next_maps = next_maps, maps
            enlarge(picture, channels, here, 0, next_picture)
            picture, next_picture = next_picture, picture
            here *= 2
            picture[:, :here, :here] *= _FADE
        _level(picture, mean, contrast, canvas)
        to_levels(canvas, out[n])


@compiled
def _level(picture: Singles, mean: float, contrast: float, canvas: Floats) -> None:
    """Bring the top left corner of the picture to a mean and a standard deviation over all channels."""
    size = canvas.shape[1]
    canvas[:] = picture[:, :size, :size]
    total, square = 0.0, 0.0
    for level in canvas.flat:
        total += level
    centre = total / canvas.size
    for level in canvas.flat:
        square += (level - centre) * (level - centre)
    scale = contrast / math.sqrt(square / canvas.size + 1e-12)
    canvas[:] = mean + scale * (canvas - centre)
