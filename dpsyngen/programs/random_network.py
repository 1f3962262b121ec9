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
from dpsyngen.programs.drawing.fields import inverse_2d, power_of_two
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
    seed: Word, index: Word, block: Word, kind: int, inputs: int, outputs: int
) -> tuple[Singles, Singles, Word]:
    """Draw filters [outputs, inputs, 3, 3], styled and normalised, and biases [outputs]; also the next block."""
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
    filters = np.empty((outputs, inputs, 3, 3), dtype=np.float32)
    biases = np.zeros(outputs, dtype=np.float32)
    for o in range(outputs):
        if kind >= SPARSE:
            biases[o] = 0.4 * shifts[o] - 0.2
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
        filters[o] *= np.float32(1.4 / math.sqrt(square + 1e-8))  # keeps the mean square through a leaky ReLU
    return filters, biases, block


@compiled
def convolve(maps: Singles, filters: Singles, biases: Singles, strengths: Singles, noise: Singles) -> Singles:
    """Convolve by 3 × 3 with repeated borders, add noise and bias, leaky ReLU: [inputs, S, S] to [outputs, S, S]."""
    inputs, size = maps.shape[:2]
    framed = np.empty((inputs, size + 2, size + 2), dtype=np.float32)
    framed[:, 1:-1, 1:-1] = maps
    framed[:, 1:-1, 0], framed[:, 1:-1, -1] = maps[:, :, 0], maps[:, :, -1]
    framed[:, 0], framed[:, -1] = framed[:, 1], framed[:, -2]
    out = np.empty((len(filters), size, size), dtype=np.float32)
    for o in range(len(filters)):
        for y in range(size):
            line = out[o, y]
            for x in range(size):
                line[x] = biases[o] + strengths[o] * noise[y, x]
            for i in range(inputs):
                for ky in range(3):
                    a, b, c = filters[o, i, ky, 0], filters[o, i, ky, 1], filters[o, i, ky, 2]
                    row = framed[i, y + ky]
                    left, middle, right = row[:size], row[1 : size + 1], row[2:]
                    for x in range(size):
                        line[x] += a * left[x] + b * middle[x] + c * right[x]
            for x in range(size):
                line[x] = line[x] if line[x] > np.float32(0.0) else _SLOPE * line[x]
    return out


@compiled
def enlarge(maps: Singles) -> Singles:
    """Double the size of the maps [K, S, S] by linear interpolation."""
    near, far = np.float32(0.75), np.float32(0.25)
    count, size = maps.shape[:2]
    out = np.empty((count, 2 * size, 2 * size), dtype=np.float32)
    for k in range(count):
        for y in range(2 * size):
            i = y // 2
            other = min(size - 1, max(0, i - 1 if y % 2 == 0 else i + 1))
            for x in range(2 * size):
                j = x // 2
                beside = min(size - 1, max(0, j - 1 if x % 2 == 0 else j + 1))
                a = near * maps[k, i, j] + far * maps[k, i, beside]
                b = near * maps[k, other, j] + far * maps[k, other, beside]
                out[k, y, x] = near * a + far * b
    return out


@compiled
def pink_noise(seed: Word, index: Word, alpha: float, n: int) -> Floats:
    """Draw a field with amplitudes 1/f^α and variance 1, [n, n]."""
    re, im = np.empty((n, n)), np.empty((n, n))
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
    inverse_2d(re, im)
    return re * (1.0 / math.sqrt(0.5 * total))


@compiled
def noise_map(seed: Word, index: Word, number: int, size: int, pink: bool, field: Floats) -> Singles:
    """Draw noise map `number` of an image, [size, size]: white, or a shifted piece of the pink `field`."""
    block = np.uint64(number) << np.uint64(24)
    if not pink:
        u = np.empty(size * size)
        fill_uniform(seed, _NOISE, index, block, u)
        # Uniform with variance 1: cheaper than normal, and sums of many look the same.
        return (3.4641016 * (u - 0.5)).astype(np.float32).reshape(size, size)
    a, b, _, _ = words32(seed, _NOISE, index, block)
    n = len(field)
    top, left = below(a, n), below(b, n)
    out = np.empty((size, size), dtype=np.float32)
    for i in range(size):
        for j in range(size):
            out[i, j] = field[(top + i) % n, (left + j) % n]
    return out


@compiled
def draw(indices: Words, seed: Word, law: Law, width: int, side: int, out: Images) -> None:
    """Draw image ``indices[n]`` into ``out[n]``, [C, S, S]."""
    channels = out.shape[1]
    start = np.empty(width * 16)
    scales = np.empty(width)
    last = np.empty(channels * width)
    canvas = np.empty(out.shape[1:])
    for n in range(indices.shape[0]):
        index = indices[n]
        chosen, strength, alpha, mean, contrast = law_of(seed, index, law)
        pink = chosen == HIGH_FREQUENCY
        field = pink_noise(seed, index, alpha, side) if pink else np.empty((0, 0))
        block = fill_normal(seed, _WEIGHTS, index, np.uint64(0), start)  # the constant of 4 × 4
        maps = start.astype(np.float32).reshape(width, 4, 4)
        picture = np.zeros((channels, 4, 4), dtype=np.float32)
        noise = np.empty((0, 0), dtype=np.float32)
        layer = 0
        while True:  # a block: two convolutions, to the picture, and twice the size
            here = maps.shape[1]
            for part in range(2):
                if part == 0 or chosen != ORIENTED:
                    noise = noise_map(seed, index, layer, here, pink, field)
                layer += 1
                outputs = channels_at(here, width)
                filters, biases, block = draw_filters(seed, index, block, chosen, len(maps), outputs)
                block = fill_normal(seed, _WEIGHTS, index, block, scales)
                maps = convolve(maps, filters, biases, (strength * scales[:outputs]).astype(np.float32), noise)
            block = fill_normal(seed, _WEIGHTS, index, block, last)
            for c in range(channels):
                for i in range(len(maps)):
                    picture[c] += np.float32(last[c * width + i] / math.sqrt(len(maps))) * maps[i]
            if here >= side:
                break
            maps, picture = enlarge(maps), _FADE * enlarge(picture)
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
