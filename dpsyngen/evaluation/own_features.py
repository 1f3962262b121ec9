"""Features from a user's own module, named as ``path/to/module.py:name`` or ``package.module:name``.

The file is **run**, with the rights of whoever runs dpsyngen, and sees private images: only its owner can know that it
is fit for that.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError, DpsyngenError, shown
from dpsyngen.evaluation.extractor import Tell, batches

FORM = "path/to/module.py:name or package.module:name"


class OwnFeatures:
    """Features [N, d] that a function or a ``torch.nn.Module`` of the user computes.

    What is named is one of
    * a ``torch.nn.Module``;
    * a class or function that can be called without arguments and returns a module or a function;
    * a function of the images.

    It is given float32 images [n, 3, H, W] in [0, 1] (grey ones repeated; [n, 1, H, W] if it has an attribute
    ``channels`` equal to 1), on `device` and without gradients, and returns finite numbers [n, d], with
    the same d each time.  A module is moved to the device and put into evaluation mode.

    Args:
        name: ``path/to/module.py:name`` or ``package.module:name``.
        device: where to compute.
        batch_size: images at a time.

    Raises:
        ConfigError: there is no such file or name, it is not one of the above, or running it fails.
    """

    def __init__(self, name: str, device: str = "cpu", batch_size: int = 64) -> None:
        self.name, self.device, self.batch_size = name, device, batch_size
        module, attribute = _split(name)
        loaded = _load_file(Path(module)) if module.endswith(".py") else _load_module(module)
        self._file = Path(str(loaded.__file__))
        self._sha256 = file_sha256(self._file)
        try:
            named = getattr(loaded, attribute)
        except AttributeError:
            raise ConfigError(f"{module} has nothing called {attribute!r}; features are given as {FORM}.") from None
        self._compute = _made(named, name)
        self._dim: int | None = None
        self._weights = _prepare(self._compute, device)

    @property
    def dim(self) -> int:
        if self._dim is None:
            raise ConfigError(f"{self.name} has not computed any features yet, so their number is not known.")
        return self._dim

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dimensions": self._dim,
            "file": self._file.name,
            "sha256": self._sha256,
            "weights_sha256": self._weights,
        }

    def identity(self) -> dict[str, Any] | None:
        """Of a module the file and its weights; of a function nobody can tell what it depends on."""
        if self._weights is None:
            return None
        return {"sha256": self._sha256, "weights_sha256": self._weights, "device": self.device}

    def try_out(self, channels: int, side: int) -> None:
        """Compute the features of two images of noise, so that mistakes show before hours of other work.

        Raises:
            ConfigError: as for a call.
        """
        self(np.random.default_rng(0).integers(0, 256, (2, channels, side, side), dtype=np.uint8))

    def fit(self, reference: NDArray[np.uint8]) -> None:
        """Nothing to fit."""

    def __call__(
        self, images: NDArray[np.uint8], batch_size: int | None = None, on_progress: Tell | None = None
    ) -> NDArray[np.float32]:
        """See :class:`dpsyngen.evaluation.extractor.FeatureExtractor`.

        Raises:
            ConfigError: the module fails, or returns something other than finite numbers [n, d].
        """
        import torch

        channels = getattr(self._compute, "channels", 3)
        if channels == 1 and images.ndim == 4 and images.shape[1] != 1:
            raise ConfigError(
                f"{self.name} takes grey images (channels = 1), but these have {images.shape[1]} channels."
            )
        out = []
        with torch.inference_mode():
            for part in batches(images, self.batch_size if batch_size is None else batch_size, on_progress):
                batch = torch.from_numpy(part.copy()).to(self.device).float() / 255
                if channels != 1 and batch.shape[1] == 1:
                    batch = batch.repeat(1, 3, 1, 1)
                out.append(self._checked(self._run(batch), len(part)))
        return np.concatenate(out)

    def _run(self, batch: Any) -> Any:
        try:
            return self._compute(batch)
        except Exception as error:  # whatever a user's code raises
            raise ConfigError(
                f"{self.name} failed on images of shape {tuple(batch.shape)} in [0, 1]: {type(error).__name__}: {error}"
            ) from error

    def _checked(self, features: Any, n: int) -> NDArray[np.float32]:
        import torch

        if isinstance(features, np.ndarray):
            features = torch.from_numpy(features)
        if not isinstance(features, torch.Tensor) or features.is_complex():
            raise ConfigError(f"{self.name} returned {type(features).__name__}, but must return a real tensor [n, d].")
        if features.ndim != 2 or features.shape[0] != n or not features.shape[1]:
            raise ConfigError(
                f"{self.name} returned features of shape {tuple(features.shape)} for {n} images, but must return "
                f"[{n}, d]: pool or flatten what is left of height and width."
            )
        if self._dim not in (None, features.shape[1]):
            raise ConfigError(f"{self.name} returned {features.shape[1]} features, but {self._dim} before.")
        self._dim = int(features.shape[1])
        wide = features.float().cpu().numpy()
        if not np.isfinite(wide).all():
            raise ConfigError(f"{self.name} returned NaN or infinite features.")
        return np.asarray(wide, np.float32)


def is_own(name: str) -> bool:
    """Whether `name` has the form of a user's own features."""
    return ":" in name


def _split(name: str) -> tuple[str, str]:
    module, _, attribute = name.rpartition(":")
    if not module or not attribute.isidentifier():
        raise ConfigError(f"features are {shown(name)}, but a module of your own is given as {FORM}.")
    return module, attribute


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load_file(path: Path) -> ModuleType:
    """Run a file as a module of its own.  Files beside it are not found, unless Python finds them anyway."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; features of your own are given as {FORM}.")
    # One name a file: classes in it can be pickled, and a second load does not disturb the first.
    name = f"_dpsyngen_features_{file_sha256(path)[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        raise _failure(str(path), error) from error
    return module


def _load_module(name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"the module {name} cannot be imported: {error}.") from None
    except Exception as error:
        raise _failure(name, error) from error
    if not getattr(module, "__file__", None):
        raise ConfigError(f"the module {name} has no file whose content could be stamped on a figure.")
    return module


def _failure(what: str, error: BaseException) -> BaseException:
    """`error` as a message; what is no mistake of the code, such as an interrupt, as it is."""
    if not isinstance(error, Exception) or isinstance(error, DpsyngenError):
        return error
    return ConfigError(f"running {what} failed: {type(error).__name__}: {error}")


def _made(named: Any, name: str) -> Callable[[Any], Any]:
    """The function of images that was named, or that what was named makes."""
    from torch import nn

    if not isinstance(named, nn.Module) and callable(named) and _takes_nothing(named):
        try:
            named = named()
        except Exception as error:
            raise _failure(f"{name}()", error) from error
    if not callable(named):
        raise ConfigError(
            f"{name} is {type(named).__name__}, but must be a torch.nn.Module, a function of images, or something that "
            "makes one when called without arguments."
        )
    compute: Callable[[Any], Any] = named
    return compute


def _takes_nothing(named: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(named).parameters.values()
    except (TypeError, ValueError):
        return isinstance(named, type)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return not needed


def _prepare(compute: Any, device: str) -> str | None:
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
