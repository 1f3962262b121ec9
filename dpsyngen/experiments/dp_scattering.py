"""Wavelet scattering: image features that nobody's data went into, for a classifier trained by DP-SGD.

A scattering network is a convolutional network whose filters are fixed (Bruna & Mallat, "Invariant scattering
convolution networks", arXiv 1203.1513): |x * ψ| and ||x * ψ| * ψ'| for oriented Morlet wavelets ψ, each averaged over a
few pixels.  Tramèr & Boneh ("Differentially private learning needs better features", arXiv 2011.11660) found a linear
classifier on it ahead of convolutional networks trained by DP-SGD from end to end: far fewer numbers share the noise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

SCALES = 2
_AT_ONCE = 250
_LARGEST = 32
_ORIENTATIONS = 4
_STRIDE = 2**SCALES


class Scattering:
    """Two scales, orders 0 to 2, then each image's features normalised in groups of channels.

    Each image's features are a function of that image and of public constants alone.

    Args:
        shape: [C, H, W] of the images.
        angles: orientations of the wavelets, a multiple of 4; None: 8 for grey images, 4 for colour ones, whose
            features take three times the memory.

    Attributes:
        features: the shape [channels, h, w] of what :meth:`of` returns for an image: C (1 + 2·angles + angles²)
            channels, and a position for every 4×4 pixels.  Images above 32 pixels are averaged down to 32 at most.
    """

    def __init__(self, shape: tuple[int, ...], angles: int | None = None) -> None:
        channels, height, width = shape
        self.angles = (8 if channels == 1 else 4) if angles is None else angles
        self._shrink = -(-max(height, width) // _LARGEST)
        size = [-(-s // self._shrink) for s in (height, width)]
        whole = [-(-s // _STRIDE) * _STRIDE for s in size]
        self._pad = (_STRIDE, _STRIDE + whole[1] - size[1], _STRIDE, _STRIDE + whole[0] - size[0])
        padded = [s + 2 * _STRIDE for s in whole]
        half = [s // 2 for s in padded]
        turns = [math.pi * a / self.angles for a in range(self.angles)]
        slant = 4 / self.angles
        self._fine = [_wavelet(padded, 0.8, 0.75 * math.pi, t, slant) for t in turns]
        # The second scale: of the image itself, and of what the first has left, at half the resolution.
        self._coarse = [_wavelet(padded, 1.6, 0.375 * math.pi, t, slant) for t in turns]
        self._average = [_averaging(n, 1.6, _STRIDE) for n in padded]
        self._average_half = [_averaging(n, 0.8, _STRIDE // 2) for n in half]
        self.features = (
            channels * (1 + SCALES * self.angles + self.angles**2),
            whole[0] // _STRIDE,
            whole[1] // _STRIDE,
        )

    def of(self, images: NDArray[np.uint8]) -> Tensor:
        """uint8 [N, C, H, W] -> fp16 [N, channels, h, w]."""
        out = torch.empty((len(images), *self.features), dtype=torch.float16)
        for start in range(0, len(images), _AT_ONCE):
            part = torch.from_numpy(images[start : start + _AT_ONCE].copy())
            out[start : start + len(part)] = self._normalised(part.float().div_(127.5).sub_(1))
        return out

    def _normalised(self, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the positions of four neighbouring orientations at a time (and of order 0)."""
        if self._shrink > 1:
            x = F.avg_pool2d(x, self._shrink, ceil_mode=True)
        orders = self._scattered(F.pad(x, self._pad, mode="replicate"))
        zeroth, *rest = (o.flatten(1, 2) for o in orders)
        return torch.cat([F.group_norm(zeroth, 1), *(F.group_norm(o, o.shape[1] // _ORIENTATIONS) for o in rest)], 1)

    def _scattered(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, C, H, W] -> orders 0, 1 and 2, each [B, C, paths, h, w]."""
        spectrum = torch.fft.fft2(x)
        first, second = [], []
        for fine in self._fine:
            inner = torch.fft.ifft2(spectrum * fine).abs()
            first.append(_averaged(inner, self._average))
            inner_spectrum = torch.fft.fft2(inner)
            # |x * ψ| has little above half the frequencies, so half the resolution will do from here on.
            second += [_averaged(self._coarser(inner_spectrum, coarse), self._average_half) for coarse in self._coarse]
        first += [_averaged(self._coarser(spectrum, coarse), self._average_half) for coarse in self._coarse]
        return _averaged(x, self._average).unsqueeze(2), torch.stack(first, 2), torch.stack(second, 2)

    @staticmethod
    def _coarser(spectrum: Tensor, wavelet: Tensor) -> Tensor:
        """The modulus of what a wavelet of the second scale leaves, at half the resolution."""
        return torch.fft.ifft2(_folded(spectrum * wavelet, 2)).abs()


def _averaged(x: Tensor, average: list[Tensor]) -> Tensor:
    rows, columns = average
    return rows @ x @ columns.T


def _averaging(size: int, sigma: float, stride: int) -> Tensor:
    """Matrix [positions, size] of a Gaussian average around every `stride`-th position, none of them padding."""
    distance = torch.arange(size, dtype=torch.float64) - torch.arange(0, size, stride, dtype=torch.float64)[:, None]
    distance = torch.minimum(distance.abs(), size - distance.abs())  # as the transform has it: the border wraps
    bump = torch.exp(-(distance**2) / (2 * sigma**2))
    return (bump / bump.sum(1, keepdim=True))[1:-1].float()


def _folded(spectrum: Tensor, stride: int) -> Tensor:
    """The spectrum of every `stride`-th position: the mean of its aliases."""
    *lead, height, width = spectrum.shape
    return spectrum.reshape(*lead, stride, height // stride, stride, width // stride).mean((-4, -2))


def _grid(size: list[int]) -> tuple[Tensor, Tensor]:
    y, x = (torch.arange(s, dtype=torch.float64) - s // 2 for s in size)
    return y[:, None], x[None, :]


def _wavelet(size: list[int], sigma: float, frequency: float, turn: float, slant: float) -> Tensor:
    """Spectrum of a Morlet wavelet: a wave under a Gaussian, less the constant that makes its mean 0."""
    y, x = _grid(size)
    along, across = math.cos(turn) * x + math.sin(turn) * y, -math.sin(turn) * x + math.cos(turn) * y
    envelope = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    wave = torch.exp(1j * frequency * along)
    morlet = envelope * (wave - (envelope * wave).sum() / envelope.sum()) * slant / (2 * math.pi * sigma**2)
    # The wavelet is its own conjugate mirrored, so its spectrum is real.
    return torch.fft.fft2(torch.fft.ifftshift(morlet)).real.float()
