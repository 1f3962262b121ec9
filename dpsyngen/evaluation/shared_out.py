"""Evaluation by several processes: features of images are shared out, and each classifier is trained by one of them.

Private images travel to the other processes, as in distributed training; files and figures stay with the main one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.distributed import Ranks, device_of
from dpsyngen.evaluation.cas import ClassifierResult, classification_accuracy
from dpsyngen.evaluation.extractor import FeatureExtractor, Tell
from dpsyngen.evaluation.features import FeatureSpec
from dpsyngen.evaluation.pixels_pca import PixelsPca

_FEATURES, _CLASSIFIERS = "features", "classifiers"
_PART = 512  # images of a process in a round, about


class SharedExtractor:
    """A feature extractor, images for which are shared out over processes; for the main one.

    Each gets whole batches, the same as in one process, so the features are the same up to what processors differ in.
    """

    def __init__(self, own: FeatureExtractor, spec: FeatureSpec, device: str, ranks: Ranks) -> None:
        self._own, self._spec, self._device, self._ranks = own, spec, device, ranks
        self.name = own.name

    @property
    def dim(self) -> int:
        return self._own.dim

    def config(self) -> dict[str, Any]:
        return self._own.config()

    def identity(self) -> dict[str, Any] | None:
        return self._own.identity()

    def fit(self, reference: NDArray[np.uint8]) -> None:
        """Nothing to fit: see :func:`shared_extractor`."""

    def __call__(
        self, images: NDArray[np.uint8], batch_size: int | None = None, on_progress: Tell | None = None
    ) -> NDArray[np.float32]:
        size = batch_size or int(getattr(self._own, "batch_size", 64))
        per_round = size * max(1, _PART // size) * self._ranks.count
        out = []
        for start in range(0, len(images), per_round):
            part = images[start : start + per_round]
            with self._ranks.lead(_FEATURES, spec=self._spec, device=self._device, images=part, size=size):
                found = _features(self._ranks, lambda: self._own, part, size)
            out += [features for features in found or () if features is not None]
            if on_progress:
                on_progress(f"features of {min(start + per_round, len(images)):,} of {len(images):,} images")
        return np.concatenate(out)


def _features(
    ranks: Ranks, extractor: Callable[[], FeatureExtractor], images: NDArray[np.uint8], size: int
) -> list[NDArray[np.float32] | None] | None:
    """Features of each process's batches among `images`, None where it has none; None but in the main process.

    The main process always has some: it has to know what its extractor gives.
    """
    share = size * -(-len(images) // (size * ranks.count))
    mine = images[ranks.rank * share : (ranks.rank + 1) * share]
    found = ranks.agree(lambda: extractor()(mine, size) if len(mine) else None)
    return ranks.gather_to_main(found)


def shared_extractor(spec: FeatureSpec, device: str, ranks: Ranks) -> FeatureExtractor:
    """The extractor, with its network loaded; to be called by the main process.

    Principal components, which are fitted to private images and take no time, stay with the main process.
    """
    own = spec.make(device_of(device, ranks))
    return own if ranks.alone or isinstance(own, PixelsPca) else SharedExtractor(own, spec, device, ranks)


def shared_accuracy(
    ranks: Ranks, *images: NDArray[Any], classifiers: tuple[str, ...], **options: Any
) -> dict[str, Any]:
    """As :func:`classification_accuracy`, each classifier trained by one process; to be called by the main one."""
    tell = options.pop("on_progress", None)
    if ranks.alone:
        return classification_accuracy(*images, classifiers=classifiers, on_progress=tell, **options)
    with ranks.lead(_CLASSIFIERS, images=images, classifiers=classifiers, options=options):
        found = _accuracy(ranks, images, classifiers, options, tell)
    results = {name: result for part in found or () for name, result in part.items()}
    return {name: results[name] for name in classifiers}


def _accuracy(
    ranks: Ranks,
    images: tuple[NDArray[Any], ...],
    classifiers: tuple[str, ...],
    options: dict[str, Any],
    tell: Tell | None = None,
) -> list[dict[str, ClassifierResult]] | None:
    mine = classifiers[ranks.rank :: ranks.count]
    own = {**options, "device": device_of(options["device"], ranks), "on_progress": tell}
    # The main process takes part even with nothing to train: it is the one to say what is wrong with the images.
    found = ranks.agree(lambda: classification_accuracy(*images, classifiers=mine, **own) if mine else {})
    return ranks.gather_to_main(found)


def handlers(ranks: Ranks) -> Mapping[str, Callable[..., None]]:
    """What a follower has to know to help with evaluation."""
    made: dict[FeatureSpec, FeatureExtractor] = {}

    def features(spec: FeatureSpec, device: str, images: NDArray[np.uint8], size: int) -> None:
        def extractor() -> FeatureExtractor:
            if spec not in made:
                made[spec] = spec.make(device_of(device, ranks))
            return made[spec]

        _features(ranks, extractor, images, size)

    def classifiers(images: tuple[NDArray[Any], ...], classifiers: tuple[str, ...], options: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the main process sees the same images
            _accuracy(ranks, images, classifiers, options)

    return {_FEATURES: features, _CLASSIFIERS: classifiers}
