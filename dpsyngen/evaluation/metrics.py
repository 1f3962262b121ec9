"""All figures of a set of generated images, each with its protocol.  Every one of them is private."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data import ImageDataset, ImageStore
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.cas import HELD_OUT, best_by_validation
from dpsyngen.evaluation.feature_cache import FeatureCache
from dpsyngen.evaluation.features import FeatureSpec
from dpsyngen.evaluation.figures import NAMES, check_sizes, checked_metrics, figures
from dpsyngen.evaluation.shared_out import shared_accuracy, shared_extractor


def evaluate_images(
    generated: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    *,
    reference: ImageDataset,
    test: ImageDataset | None,
    programs: NDArray[np.uint8] | None = None,
    features: Sequence[FeatureSpec | str] = ("pixels-pca",),
    metrics: Sequence[str] = NAMES,
    classifiers: Sequence[str] = ("logreg", "mlp", "cnn"),
    seed: int = 0,
    device: str = "cpu",
    max_images: int = 10_000,
    bootstrap: int = 200,
    cache: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Distances to real training images, and classification accuracy on real test images.

    The result is computed from private images and is **not** differentially private: store it in the private half.

    Beside each figure stand what bounds it: the *floor*, real test images in place of the generated ones, about what a
    perfect generator would get, and the *ceiling*, images drawn by programs in their place, what is to be had without
    looking at a private image.  Either takes as many images as were generated, if there are so many, since most figures
    depend on their number.

    Args:
        generated: uint8 [N, C, H, W].
        labels: their classes [N], or None.
        reference: real training images.
        test: real test images; None: no classification accuracy and no floor.
        programs: images drawn by programs, uint8 [M, C, H, W]; None: no ceiling.
        features: feature extractors, by name or with their weights file; a user's own are **run**.
        metrics: among "frechet", "kid", "precision", "recall", "density", "coverage", "sliced-wasserstein".
        classifiers: see :func:`classification_accuracy`; () for none.
        seed: of splits, subsets, directions, the bootstrap and classifiers.
        device: where to compute.
        max_images: of each set, for `metrics`; a random subset beyond that.
        bootstrap: replicates for the 95 % intervals (see :mod:`dpsyngen.evaluation.scatter`); 0: none.
        cache: a **private** folder where features of real and of programmatic images are kept; None: they are not.
        on_progress: called with a line about what is being done.
        ranks: the processes that share the work; this is the main one.

    Returns:
        JSON-able.  ``features``: for each extractor its ``config``, the numbers of images (``floor_images`` and
        ``ceiling_images`` are None without such images), ``enough_images`` (whether all sets have more images than the
        features have dimensions, which a Fréchet distance needs), ``interval`` (what the intervals are) and
        ``metrics``: by name ``value``, ``low``, ``high`` (None without an interval, or where resampling shows no
        scatter), ``floor``, ``ceiling``, ``better`` ("lower" or "higher"), ``unit`` and ``protocol``.
        ``cas``: :meth:`ClassifierResult.to_dict` for each classifier; ``cas_chosen``: the one that held-out generated
        images choose.  ``protocol``: numbers of images, split and seed.

    Raises:
        ConfigError: shapes that differ, unknown names, too few images, or own features that fail.
        DataError: a weights file is missing or wrong, or `cache` cannot be used.
    """
    specs = [FeatureSpec(f) if isinstance(f, str) else f for f in features]
    asked = checked_metrics(metrics)
    check_sizes(bootstrap, max_images)
    if specs and asked and len(generated) < 2:
        raise ConfigError(f"there is {len(generated)} generated image, but metrics need at least 2: generate more.")
    _require_shape(generated, "generated images", reference)
    if test is not None:
        _require_shape(test.images, "test images", reference)
    if programs is not None:
        _require_shape(programs, "images drawn by programs", reference)
    tell = on_progress or (lambda line: None)
    out: dict[str, Any] = {
        "private": "computed from private images without noise: publishing these figures costs privacy",
        "features": {},
        "cas": {},
        "protocol": {"generated_images": len(generated), "real_train_images": len(reference), "seed": seed},
    }
    rng = np.random.default_rng(seed)
    real = _subset(reference.images, max_images, rng)
    made = _subset(generated, max_images, rng)
    held_out = None if test is None else _subset(test.images, len(made), rng)
    drawn = None if programs is None else _subset(programs, len(made), rng)
    kept = FeatureCache(cache)
    for spec in specs if asked else []:
        tell(f"features {spec.name}: {len(made):,} generated, {len(real):,} real training images")
        extractor = shared_extractor(spec, device, ranks)
        extractor.fit(real)
        of_real = kept.features(extractor, real, tell)
        of_made = extractor(made, on_progress=tell)
        floor, ceiling = (None if i is None else kept.features(extractor, i, tell) for i in (held_out, drawn))
        found, interval = figures(
            of_made,
            of_real,
            floor=floor,
            ceiling=ceiling,
            metrics=asked,
            replicates=bootstrap,
            seed=seed,
            on_progress=tell,
        )
        out["features"][spec.name] = {
            "config": extractor.config(),
            "generated_images": len(made),
            "real_images": len(real),
            "floor_images": None if held_out is None else len(held_out),
            "ceiling_images": None if drawn is None else len(drawn),
            "subset_seed": seed,
            "enough_images": all(
                len(x) > of_real.shape[1] for x in (of_made, of_real, floor, ceiling) if x is not None
            ),
            "interval": interval,
            "metrics": found,
        }
    if test is not None and classifiers and labels is not None and test.labels is not None:
        results = shared_accuracy(
            ranks,
            generated,
            labels,
            test.array(),
            test.labels,
            num_classes=test.num_classes,
            classifiers=tuple(classifiers),
            seed=seed,
            device=device,
            on_progress=on_progress,
        )
        out["cas"] = {name: result.to_dict() for name, result in results.items()}
        out["cas_chosen"] = best_by_validation(results)
        out["protocol"]["real_test_images"] = len(test)
        out["protocol"]["cas"] = {
            "held_out_share": HELD_OUT,
            "split": "generated images, by class",
            "chosen_on": "held-out generated images",
            "scored_on": "real test images, once",
            "seed": seed,
        }
    return out


def _require_shape(images: NDArray[np.uint8] | ImageStore, what: str, reference: ImageDataset) -> None:
    if images.shape[1:] != reference.images.shape[1:]:
        raise ConfigError(
            f"{what} are {images.shape[1:]}, but the real training images {reference.images.shape[1:]}: give images of "
            "the same size and number of channels."
        )


def _subset(images: NDArray[np.uint8] | ImageStore, most: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    if len(images) <= most:
        return np.asarray(images)
    return np.asarray(images[np.sort(rng.choice(len(images), most, replace=False))])
