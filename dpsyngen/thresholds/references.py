"""What a denoiser's loss is to be compared with: the best predictors that know only an image's moments.

Both are affine in x = x₀ + σ·n, so that their expected loss over the noise is known for each image x₀, with no noise
drawn: for D(x) = m + A(x - m) it is |(I - A)(x₀ - m)|² + σ²·tr(A Aᵀ).

- *zero-information*: A = a·I and m one grey level.  It knows two numbers of a data set, the mean and the variance of
  its pixels, and nothing of how pixels hang together: v/(v + σ²) is the best a.
- *Wiener*: m the mean image and A = C(C + σ²I)⁻¹ with the pixels' covariance C: the optimal denoiser of a Gaussian
  with these moments, and the best affine one of any images that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

MOST_PIXELS = 4096
"""Beyond that the Wiener filter is left out: its covariance matrix would take minutes and gigabytes."""

_CHUNK = 4096


@dataclass(frozen=True)
class Moments:
    """Of the pixels of some images in [-1, 1].

    Attributes:
        mean: [d].
        covariance: [d, d]; None with more than ``MOST_PIXELS`` pixels.
        level, variance: mean and variance of all pixels together.
    """

    mean: Array
    covariance: Array | None
    level: float
    variance: float

    @classmethod
    def of(cls, images: NDArray[np.uint8]) -> Moments:
        """Of uint8 images [n, C, H, W], a few thousand in memory at a time."""
        n, pixels = len(images), int(np.prod(images.shape[1:]))
        total, square = np.zeros(pixels), 0.0
        second = np.zeros((pixels, pixels)) if pixels <= MOST_PIXELS else None
        for start in range(0, n, _CHUNK):
            x = as_range(images[start : start + _CHUNK])
            total += x.sum(0)
            square += float(np.square(x).sum())
            if second is not None:
                second += x.T @ x
        mean, level = total / n, float(total.sum() / (n * pixels))
        covariance = None if second is None else second / n - np.outer(mean, mean)
        return cls(mean, covariance, level, square / (n * pixels) - level**2)


def as_range(images: NDArray[np.uint8]) -> Array:
    """uint8 [n, C, H, W] as float64 [n, d] in [-1, 1]."""
    return images.reshape(len(images), -1).astype(np.float64) / 127.5 - 1


def zero_information_loss(images: NDArray[np.uint8], fitted: Moments, log_sigma: Sequence[float] | Array) -> Array:
    """Expected loss of each image, mean over its pixels, [N, M].

    Args:
        images: x₀, uint8 [N, C, H, W].
        fitted: of other images of the same kind.
        log_sigma: M levels.
    """
    square = np.exp(2 * np.asarray(log_sigma, dtype=np.float64))
    a = fitted.variance / (fitted.variance + square)
    distance = np.square(as_range(images) - fitted.level).mean(1)
    return np.asarray(distance[:, None] * (1 - a) ** 2 + square * a**2)


def wiener_loss(images: NDArray[np.uint8], fitted: Moments, log_sigma: Sequence[float] | Array) -> Array | None:
    """The same of the Wiener filter; None with more than ``MOST_PIXELS`` pixels."""
    if fitted.covariance is None:
        return None
    values, axes = np.linalg.eigh(fitted.covariance)
    values = np.maximum(values, 0)
    along = np.square((as_range(images) - fitted.mean) @ axes)  # [N, d]
    out = np.empty((len(images), len(log_sigma)))
    for m, level in enumerate(log_sigma):
        square = np.exp(2 * level)
        a = values / (values + square)
        out[:, m] = (along @ np.square(1 - a) + square * np.square(a).sum()) / len(values)
    return out


class WienerFilter:
    """The same as a :class:`dpsyngen.diffusion.denoiser.Denoiser`; there are no classes.

    Args:
        fitted: with a covariance.
        device: where to compute.
    """

    def __init__(self, fitted: Moments, device: str = "cpu") -> None:
        if fitted.covariance is None:
            raise ValueError(f"images of more than {MOST_PIXELS} pixels have no covariance here.")
        values, axes = np.linalg.eigh(fitted.covariance)
        self.values, self.axes, self.mean = (
            torch.as_tensor(v, dtype=torch.float32, device=device) for v in (np.maximum(values, 0), axes, fitted.mean)
        )

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        share = self.values / (self.values + sigma.to(self.values).square()[:, None])
        along = (x.flatten(1) - self.mean) @ self.axes
        return (self.mean + (share * along) @ self.axes.T).view(x.shape)
