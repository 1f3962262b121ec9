"""Features that need no network: principal components of the pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.extractor import Tell, batches


class PixelsPca:
    """Principal components of the pixels in [0, 1], fitted to the reference images (so the fit is private).

    Args:
        components: d at most; never more than there are pixels or reference images less one.
    """

    name = "pixels-pca"
    batch_size = 1000

    def __init__(self, components: int = 64) -> None:
        if components < 1:
            raise ConfigError(f"components is {components}, but must be at least 1.")
        self.components = components
        self._mean: NDArray[np.float64] | None = None
        self._axes: NDArray[np.float64] | None = None

    @property
    def dim(self) -> int:
        return self._fitted()[1].shape[1]

    def _fitted(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if self._mean is None or self._axes is None:
            raise ConfigError("pixels-pca must be fitted to the reference images first.")
        return self._mean, self._axes

    def config(self) -> dict[str, Any]:
        d = self.components if self._axes is None else self._axes.shape[1]
        return {"name": self.name, "dimensions": d, "fitted_to": "reference images", "pixels": "[0, 1]"}

    def identity(self) -> None:
        """None: features follow from the images that it was fitted to, too, and take no time."""

    def fit(self, reference: NDArray[np.uint8]) -> None:
        """Find the axes of the reference images [N, C, H, W].

        Raises:
            ConfigError: fewer than two images, or images of another form.
        """
        flat = np.concatenate([_flat(part) for part in batches(reference, self.batch_size, None)])
        if len(flat) < 2:
            raise ConfigError("pixels-pca needs at least 2 reference images.")
        mean = flat.mean(0)
        flat -= mean
        self._mean, self._axes = mean, _principal_axes(flat, min(self.components, flat.shape[1], len(flat) - 1))

    def __call__(
        self, images: NDArray[np.uint8], batch_size: int | None = None, on_progress: Tell | None = None
    ) -> NDArray[np.float32]:
        mean, axes = self._fitted()
        out = []
        for part in batches(images, self.batch_size if batch_size is None else batch_size, on_progress):
            flat = _flat(part)
            if flat.shape[1] != len(mean):
                raise ConfigError(f"images of {flat.shape[1]} pixels were given, but pixels-pca saw {len(mean)}.")
            out.append(((flat - mean) @ axes).astype(np.float32))
        return np.concatenate(out)


def _flat(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    return images.reshape(len(images), -1) / 255.0


def _principal_axes(centred: NDArray[np.float64], d: int) -> NDArray[np.float64]:
    """The d directions [pixels, d] of largest variance of centred rows [N, pixels], largest first."""
    from scipy import linalg

    n, pixels = centred.shape
    # Only d eigenvectors, of the smaller of the two products: all 12,288 of 64×64 RGB would take many minutes.
    side = min(n, pixels)
    product = centred.T @ centred if pixels <= n else centred @ centred.T
    if side <= 4096:
        values, vectors = linalg.eigh(product, subset_by_index=[side - d, side - 1], overwrite_a=True)
    else:
        from scipy.sparse.linalg import eigsh

        start = np.random.default_rng(0).normal(size=side)  # ARPACK would draw it from the global random state
        values, vectors = eigsh(product, k=d, v0=start)
    vectors = vectors[:, np.argsort(values)[::-1]]
    if pixels > n:
        vectors = centred.T @ vectors
        # Reference images that repeat leave directions of length zero, which any small number keeps at zero.
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-12)
    axes: NDArray[np.float64] = vectors
    return axes
