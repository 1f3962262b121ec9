"""All figures of a set of generated images, each with its protocol.  Every one of them is private."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.data import ImageDataset
from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.cas import HELD_OUT, best_by_validation, classification_accuracy
from dpsyngen.evaluation.features import FeatureSpec
from dpsyngen.evaluation.frechet import FeatureStatistics, frechet_distance


def evaluate_images(
    generated: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    *,
    reference: ImageDataset,
    test: ImageDataset | None,
    features: Sequence[FeatureSpec | str] = ("pixels-pca",),
    classifiers: Sequence[str] = ("logreg", "mlp", "cnn"),
    seed: int = 0,
    device: str = "cpu",
    max_images: int = 10_000,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Fréchet distances to real training images, and classification accuracy on real test images.

    The result is computed from private images and is **not** differentially private: store it in the private half.

    Args:
        generated: uint8 [N, C, H, W].
        labels: their classes [N], or None.
        reference: real training images.
        test: real test images; None: no classification accuracy and no floor.
        features: feature extractors for the Fréchet distance, by name or with their weights file.
        classifiers: see :func:`classification_accuracy`; () for none.
        seed: of splits, subsets and classifiers.
        device: where to compute.
        max_images: of each set, for Fréchet distances; a random subset beyond that.
        on_progress: called with a line about what is being done.

    Returns:
        JSON-able.  ``frechet``: for each extractor the ``distance``, how it was taken, and, if there are test images,
        the ``floor``: real test images against real training images, about what a perfect generator would get.  Both
        are biased upwards by few images, so a floor of far fewer images (``floor_images``) lies too high.
        ``cas``: :meth:`ClassifierResult.to_dict` for each classifier; ``cas_chosen``: the one that held-out generated
        images choose.  ``protocol``: numbers of images, split and seed.

    Raises:
        ConfigError: shapes that differ, unknown features or classifiers, too few images.
        DataError: a weights file is missing or wrong.
    """
    specs = [FeatureSpec(f) if isinstance(f, str) else f for f in features]
    if max_images < 2:
        raise ConfigError(f"max_images is {max_images}, but a Fréchet distance needs at least 2 images.")
    if test is not None and test.images.shape[1:] != reference.images.shape[1:]:
        raise ConfigError(
            f"test images are {test.images.shape[1:]}, but the real training images {reference.images.shape[1:]}: give "
            "images of the same size and number of channels."
        )
    if generated.shape[1:] != reference.images.shape[1:]:
        raise ConfigError(
            f"generated images are {generated.shape[1:]}, but the real ones {reference.images.shape[1:]}: give real "
            "images of the same size and number of channels."
        )
    tell = on_progress or (lambda line: None)
    out: dict[str, Any] = {
        "private": "computed from private images without noise: publishing these figures costs privacy",
        "frechet": {},
        "cas": {},
        "protocol": {"generated_images": len(generated), "real_train_images": len(reference), "seed": seed},
    }
    rng = np.random.default_rng(seed)
    real = _subset(reference.images, max_images, rng)
    made = _subset(generated, max_images, rng)
    held_out = None if test is None else _subset(test.images, max_images, rng)
    for spec in specs:
        tell(f"Fréchet distance on {spec.name}, {len(made):,} generated and {len(real):,} real images")
        extractor = spec.make(device)
        extractor.fit(real)
        of_real = FeatureStatistics.of(extractor(real))
        of_made = FeatureStatistics.of(extractor(made))
        figure: dict[str, Any] = {
            "distance": _distance(of_made, of_real),
            "features": extractor.config(),
            "generated_images": len(made),
            "real_images": len(real),
            "subset_seed": seed,
            "enough_images": of_made.full_rank and of_real.full_rank,
        }
        if held_out is not None:
            # What a perfect generator would get: real test images against real training images.
            figure["floor"] = _distance(FeatureStatistics.of(extractor(held_out)), of_real)
            figure["floor_images"] = len(held_out)
        out["frechet"][spec.name] = figure
    if test is not None and classifiers and labels is not None and test.labels is not None:
        results = classification_accuracy(
            generated,
            labels,
            test.images,
            test.labels,
            num_classes=test.num_classes,
            classifiers=classifiers,
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


def _distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    with warnings.catch_warnings():
        # `enough_images` says so on the figure itself, where a warning would be lost.
        warnings.simplefilter("ignore", UserWarning)
        return frechet_distance(a, b)


def _subset(images: NDArray[np.uint8], most: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    if len(images) <= most:
        return np.asarray(images)
    return np.asarray(images[np.sort(rng.choice(len(images), most, replace=False))])
