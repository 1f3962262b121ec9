"""What a feature extractor is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError

Tell = Callable[[str], None]


class FeatureExtractor(Protocol):
    """Images to features."""

    name: str

    @property
    def dim(self) -> int:
        """Number of features of an image; an extractor that must be fitted knows it (or raises) only then."""
        ...

    def config(self) -> dict[str, Any]:
        """What the features are, JSON-able, to be stamped on every figure."""
        ...

    def identity(self) -> dict[str, Any] | None:
        """All that the features of an image follow from beside the image, JSON-able; None where that cannot be told.

        Features without an identity are never kept: see :class:`dpsyngen.evaluation.feature_cache.FeatureCache`.
        """
        ...

    def fit(self, reference: NDArray[np.uint8]) -> None:
        """Adapt to the reference images [N, C, H, W], where the extractor does so.  The fit is then private."""
        ...

    def __call__(
        self, images: NDArray[np.uint8], batch_size: int | None = None, on_progress: Tell | None = None
    ) -> NDArray[np.float32]:
        """uint8 [N, C, H, W], C = 1 or 3 -> [N, d], `batch_size` images at a time (None: the extractor's own).

        `on_progress` is called with a line now and then.

        Raises:
            ConfigError: images of another form, or a batch size below 1.
        """
        ...


def batches(images: NDArray[np.uint8], size: int, tell: Tell | None) -> Iterator[NDArray[np.uint8]]:
    """`size` images at a time; `tell` is called with a line every 1,000 images or so, and at the end.

    Raises:
        ConfigError: images that are not uint8 [N, C, H, W] with C = 1 or 3, none at all, or a size below 1.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ConfigError(f"images are {images.dtype} {images.shape}, but must be uint8 [N, C, H, W] with C = 1 or 3.")
    if size < 1:
        raise ConfigError(f"batch_size is {size}, but must be at least 1.")
    told = 0
    for start in range(0, len(images), size):
        yield images[start : start + size]
        done = min(start + size, len(images))
        if tell and (done - told >= 1000 or done == len(images)):
            told = done
            tell(f"features of {done:,} of {len(images):,} images")
