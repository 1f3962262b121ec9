"""Making feature extractors by name, keeping features of real images, and sharing their work over processes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.distributed import Ranks
from dpsyngen.errors import ConfigError, DataError, require
from dpsyngen.evaluation.features import FORM, EfficientNetLite0, FeatureExtractor, OwnFeatures, PixelsPca, Tell
from dpsyngen.files import write_atomically
from dpsyngen.version import __version__

Compute = Callable[..., NDArray[np.float32]]
NAMES = ("pixels-pca", "efficientnet-lite0", "inception")


def make_extractor(name: str, **options: Any) -> FeatureExtractor:
    """Make the extractor called `name`, with its network loaded.

    Args:
        name: one of "pixels-pca", "efficientnet-lite0", "inception", or a user's own, ``path/to/module.py:name`` or
            ``package.module:name`` (which is run).
        options: the arguments of its class, see :mod:`dpsyngen.evaluation.features`.

    Raises:
        ConfigError: unknown name or option, or a value that is not allowed.
        DataError: a weights file is missing or wrong, or cannot be downloaded.
    """
    make = _maker(name)
    allowed = inspect.signature(make).parameters
    unknown = [o for o in options if o not in allowed]
    if unknown:
        raise ConfigError(f"the features {name!r} take {', '.join(allowed)}, not {', '.join(unknown)}.")
    return make(**options)


def _maker(name: str) -> Callable[..., FeatureExtractor]:
    if ":" in name:
        return partial(OwnFeatures, name)
    if name == "inception":
        from dpsyngen.evaluation.inception import Inception

        return Inception
    known: dict[str, Callable[..., FeatureExtractor]] = {c.name: c for c in (PixelsPca, EfficientNetLite0)}
    require(name in known, "features", name, f"one of {', '.join(NAMES)}, or your own, given as {FORM}")
    return known[name]


@dataclass(frozen=True)
class FeatureSpec:
    """A feature extractor to be made: its name and, for "inception", its weights file.  Nothing is run before."""

    name: str
    weights: Path | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            _maker(self.name)
        if self.weights is not None and self.name != "inception":
            raise ConfigError(f"a weights file goes with the features 'inception' only, not with {self.name!r}.")

    def make(self, device: str = "cpu") -> FeatureExtractor:
        """Make the extractor, with its network loaded."""
        given, taken = {"device": device, "weights": self.weights}, inspect.signature(_maker(self.name)).parameters
        return make_extractor(self.name, **{k: v for k, v in given.items() if k in taken})


def kept_features(
    folder: Path | None,
    extractor: FeatureExtractor,
    images: NDArray[np.uint8],
    on_progress: Tell | None = None,
    compute: Compute | None = None,
) -> NDArray[np.float32]:
    """``extractor(images)``, kept in the **private** `folder` (made with mode 0700; None: nothing is kept).

    A file is named by a digest of all that features follow from: images, extractor, versions of dpsyngen and PyTorch.
    One that is damaged is computed again.  Features that nobody can tell what they follow from are not kept.  `compute`
    is what computes them, see :func:`computed_by_all`; None: the extractor itself.
    """
    compute, identity = compute or extractor, extractor.identity()
    if folder is None or identity is None:
        return compute(images, on_progress=on_progress)
    import torch

    content = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
    facts = [content, images.shape, extractor.name, identity, __version__, torch.__version__]
    path = folder / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]}.npz"
    with suppress(Exception), np.load(path, allow_pickle=False) as file:  # np.load raises many kinds
        kept: NDArray[np.float32] = file["features"]
        if kept.ndim == 2 and len(kept) == len(images):
            if on_progress:
                on_progress(f"features of {len(images):,} images were kept from before")
            return kept
    features = compute(images, on_progress=on_progress)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # to a file, for NumPy would add .npz to a name
            np.savez(file, features=features)

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise DataError(f"{folder} is no folder, so no features can be kept in it.  Move it away.") from None
    write_atomically(path, write, 0o600)
    return features


def computed_by_all(extractor: FeatureExtractor, spec: FeatureSpec, device: str, ranks: Ranks) -> Compute:
    """What computes features in the main process: the extractor, or all processes, a share of the images each.

    Each process gets whole batches, the same as in one process, so the features are the same up to what processors
    differ in.  Private images travel to the other processes, as in distributed training; files and figures stay here.
    Principal components, which are fitted to private images and take no time, stay with the main process.
    """
    if ranks.alone or isinstance(extractor, PixelsPca):
        return extractor

    def compute(images: NDArray[np.uint8], on_progress: Tell | None = None) -> NDArray[np.float32]:
        with ranks.lead("features", spec=spec, device=device, images=images):
            found = shared_features(ranks, lambda: extractor, images)
        return np.concatenate([features for features in found or () if features is not None])

    return compute


def shared_features(
    ranks: Ranks, extractor: Callable[[], FeatureExtractor], images: NDArray[np.uint8]
) -> list[NDArray[np.float32] | None] | None:
    """Features of each process's batches among `images`, None where it has none; None but in the main process.

    The main process always has some: it has to know what its extractor gives.
    """

    def own() -> NDArray[np.float32] | None:
        compute = extractor()
        share = compute.batch_size * -(-len(images) // (compute.batch_size * ranks.count))
        mine = images[ranks.rank * share : (ranks.rank + 1) * share]
        return compute(mine) if len(mine) else None

    return ranks.gather_to_main(ranks.agree(own))
