"""Features of real images, kept in a private folder so that they are computed once.

They are as private as the images: the folder belongs into the private half of a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import DataError
from dpsyngen.evaluation.extractor import FeatureExtractor
from dpsyngen.files import write_atomically
from dpsyngen.version import __version__

_SOURCES = ("extractor.py", "features.py", "inception.py", "own_features.py", "feature_cache.py")
# Taken when the code is loaded: a file may be changed while it runs.
_CODE = [hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest() for name in _SOURCES]


class FeatureCache:
    """Features by what they follow from: the images, the extractor, the code and PyTorch's version.

    A file holds that key in full and a SHA-256 of its numbers.  One that is damaged, or whose key is another than its
    name says, is computed again and replaced.  An extractor that cannot tell what its features follow from is not
    cached, nor is one that was fitted to other images.

    Args:
        folder: a private folder; made (mode 0700) if it is not there.  None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = None if folder is None else Path(folder)

    def features(
        self, extractor: FeatureExtractor, images: NDArray[np.uint8], on_progress: Callable[[str], None] | None = None
    ) -> NDArray[np.float32]:
        """``extractor(images)``, from the folder where it is known.

        Raises:
            DataError: the folder cannot be made or written.
        """
        identity = extractor.identity()
        if self._folder is None or identity is None:
            return extractor(images, on_progress=on_progress)
        key = _key(extractor, identity, images)
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.npz"
        kept = _read(path, key, len(images))
        if kept is not None:
            if on_progress:
                on_progress(f"features of {len(images):,} images were kept from before")
            return kept
        features = extractor(images, on_progress=on_progress)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: _write(temporary, key, features), 0o600)
        except FileExistsError:
            raise DataError(f"{self._folder} is no folder, so no features can be kept in it.  Move it away.") from None
        return features


def _key(extractor: FeatureExtractor, identity: dict[str, Any], images: NDArray[np.uint8]) -> str:
    import torch

    content = {
        "images": hashlib.sha256(np.ascontiguousarray(images).data).hexdigest(),
        "shape": list(images.shape),
        "extractor": extractor.name,
        "identity": identity,
        "code": _CODE,
        "dpsyngen": __version__,
        "torch": torch.__version__,
    }
    return json.dumps(content, sort_keys=True)


def _write(path: Path, key: str, features: NDArray[np.float32]) -> None:
    with open(path, "wb") as file:  # to a file, for NumPy would add .npz to a name
        np.savez(file, key=np.frombuffer(key.encode(), np.uint8), features=features, digest=_digest(features))


def _digest(features: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(features).data).digest(), np.uint8)


def _read(path: Path, key: str, n: int) -> NDArray[np.float32] | None:
    """What `path` holds; None if it is not there or not what it should be."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if file["key"].tobytes() != key.encode():
                return None
            features, digest = file["features"], file["digest"]
        good = (
            features.dtype == np.float32
            and features.ndim == 2
            and len(features) == n
            and np.array_equal(digest, _digest(features))
            and bool(np.isfinite(features).all())
        )
    except Exception:  # np.load raises many kinds; whatever is wrong, the features can be computed again
        return None
    return features if good else None
