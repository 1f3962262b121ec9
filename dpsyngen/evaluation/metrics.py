"""All figures of a set of generated images, each with its interval, bounds and protocol.  Every one is private."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dpsyngen.config import explain
from dpsyngen.data import ImageDataset, ImageStore
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.errors import ConfigError, listed, require
from dpsyngen.evaluation import cas, distances
from dpsyngen.evaluation.extractors import FeatureSpec, computed_by_all, kept_features
from dpsyngen.evaluation.features import Tell
from dpsyngen.evaluation.neighbours import NEIGHBOURS, Features, Manifold, digests


class Metric(NamedTuple):
    """A metric of features: its title in tables, which direction is better ("lower" or "higher"), and its unit."""

    title: str
    better: str
    unit: str


METRICS: dict[str, Metric] = {
    "frechet": Metric("Fréchet distance", "lower", "squared units of the features"),
    "kid": Metric("kernel distance", "lower", "of the kernel (⟨x, y⟩/d + 1)³"),
    "precision": Metric("precision", "higher", "share of generated images"),
    "recall": Metric("recall", "higher", "share of real images"),
    "density": Metric("density", "higher", "1 where generated images are as real ones"),
    "coverage": Metric("coverage", "higher", "share of real images"),
    "sliced-wasserstein": Metric("sliced Wasserstein distance", "lower", "units of the features"),
}
NAMES = tuple(METRICS)
_OF_MANIFOLD = ("precision", "recall", "density", "coverage")
FEW = 50
"""Different images below which every figure of a set is flagged."""


class Measured(BaseModel):
    """What is measured of generated images.

    `features` are names or specs (a user's own are **run**), `metrics` names among :data:`METRICS`, `classifiers` names
    for :func:`~dpsyngen.evaluation.cas.classification_accuracy`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: tuple[FeatureSpec | str, ...] = ("pixels-pca",)
    metrics: tuple[str, ...] = NAMES
    classifiers: tuple[cas.Classifier, ...] = cas.DEFAULT
    bootstrap: int = Field(200, ge=0, le=100_000, description="replicates for the 95 % intervals; 0: none")
    max_images: int = Field(10_000, ge=2, le=10**7, description="of each set, for features; a random subset beyond")

    @field_validator("features")
    @classmethod
    def _known(cls, value: tuple[FeatureSpec | str, ...]) -> tuple[FeatureSpec | str, ...]:
        for name in value:
            if isinstance(name, str):
                FeatureSpec(name)  # refuses what it does not know
        return value

    @field_validator("metrics")
    @classmethod
    def _in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            require(name in NAMES, "metrics", name, NAMES)
        return tuple(name for name in NAMES if name in value)

    @field_validator("bootstrap")
    @classmethod
    def _enough(cls, value: int) -> int:
        if 0 < value < distances.FEWEST:
            raise ValueError(f"a 95 % interval takes at least {distances.FEWEST} replicates; 0 is none")
        return value


class EvaluationSettings(Measured):
    """What is measured, and how.

    `seed` is that of splits, subsets, directions, the bootstrap and classifiers.  `cache` is a **private** folder that
    keeps features of real images.
    """

    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "cpu"
    cache: Path | None = None

    @classmethod
    def of(cls, given: dict[str, Any]) -> EvaluationSettings:
        """Make settings of keyword arguments; ConfigError for an unknown one, or numbers that will not do."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None

    @property
    def specs(self) -> list[FeatureSpec]:
        """The feature extractors to be made; none where no metric is asked for."""
        return [FeatureSpec(f) if isinstance(f, str) else f for f in self.features if self.metrics]


@dataclass(frozen=True)
class _Set:
    """What makes figures of a set of images perfect, or bad, for no reason of theirs: few of them, or copies."""

    what: str
    images: NDArray[np.uint8]
    different: int
    crowded: float  # share of the images that have so many copies that the neighbours of all are copies

    @classmethod
    def of(cls, what: str, images: NDArray[np.uint8]) -> _Set:
        """Count the images [N, C, H, W] that differ in a pixel."""
        _, copies = np.unique(digests(images), return_counts=True)
        return cls(what, images, len(copies), float(copies[copies > NEIGHBOURS].sum() / len(images)))

    @property
    def count(self) -> int:
        return len(self.images)

    def note(self) -> str | None:
        """What to know of the set before any figure is read."""
        if self.different == 1:
            return f"all {self.count:,} {self.what} are alike"
        if self.different < FEW:
            return f"there are only {self.different} different {self.what}"
        if 2 * self.different < self.count:
            return f"of {self.count:,} {self.what} only {self.different:,} are different"
        return None

    def refusal(self, metric: str, *, real: bool = True) -> str | None:
        """Why the metric cannot be taken of the set; of generated images that are alike it can: they are bad."""
        if real and self.different == 1:
            return f"all {self.count:,} {self.what} are alike"
        if metric in _OF_MANIFOLD and self.count <= 2 * NEIGHBOURS:
            return f"{self.count} {self.what}: the {NEIGHBOURS} neighbours of each are half of them or more"
        if real and metric in _OF_MANIFOLD and 2 * self.crowded > 1:
            return f"most {self.what} have {NEIGHBOURS} copies or more, so the balls around them have no size"
        return None


class Measures:
    """The metrics asked for, against the features of real training images [m, d]; `seed`: of subsets and directions."""

    def __init__(self, real: Features, metrics: Sequence[str], seed: int) -> None:
        self.metrics = [name for name in NAMES if name in metrics]
        self._statistics = distances.FeatureStatistics.of(real) if "frechet" in self.metrics else None
        self._kernel = distances.KernelDistance(real, seed=seed) if "kid" in self.metrics else None
        self._manifold = Manifold(real) if set(_OF_MANIFOLD) & set(self.metrics) else None
        self._sliced = distances.SlicedWasserstein(real, seed=seed) if "sliced-wasserstein" in self.metrics else None

    def of(self, features: Features, scatter: bool = False) -> dict[str, distances.Estimate]:
        """Measure features [n, d], without balls where these are too few; `scatter`: with each image's influence."""
        found: dict[str, distances.Estimate] = {}
        if self._statistics is not None:
            found["frechet"] = _frechet(features, self._statistics, scatter)
        if self._kernel is not None:
            found["kid"] = self._kernel(features, scatter)
        if self._manifold is not None and len(features) > 2 * NEIGHBOURS:
            found |= self._manifold(features, scatter)
        if self._sliced is not None:
            found["sliced-wasserstein"] = self._sliced(features, scatter)
        return {name: found[name] for name in self.metrics if name in found}


def _frechet(features: Features, real: distances.FeatureStatistics, scatter: bool) -> distances.Estimate:
    statistics = distances.FeatureStatistics.of(features)
    with warnings.catch_warnings():
        # `enough_images` says so on the figure itself, where a warning would be lost.
        warnings.simplefilter("ignore", UserWarning)
        value = distances.frechet_distance(statistics, real)
    few = "" if statistics.full_rank and real.full_rank else ", fewer images than dimensions"
    influence = distances.frechet_influence(features, real) if scatter else None
    return distances.Estimate(value, f"of Gaussians{few}; biased upwards by few images", influence, smallest=0.0)


def evaluate_images(
    generated: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    *,
    reference: ImageDataset,
    test: ImageDataset | None,
    programs: NDArray[np.uint8] | None = None,
    on_progress: Tell | None = None,
    ranks: Ranks = ALONE,
    **settings: Any,
) -> dict[str, Any]:
    """Distances to real training images, and classification accuracy on real test images.

    The result is computed from private images and is **not** differentially private: store it in the private half.

    Beside each figure stand the *floor*, real test images in place of the generated ones, about what a perfect
    generator would get, and the *ceiling*, images drawn by programs, what is to be had without looking at a private
    image.  Either takes as many images as were generated, if there are so many: most figures depend on the number.

    Args:
        generated: uint8 [N, C, H, W].
        labels: their classes [N], or None.
        reference: real training images.
        test: real test images; None: no classification accuracy and no floor.
        programs: uint8 [M, C, H, W]; None: no ceiling.
        ranks: the processes that share the work; this is the main one.
        settings: see :class:`EvaluationSettings`.

    Returns:
        JSON-able.  ``notes``: what to know before the figures are read, a sentence each.
        ``features``: for each extractor its ``config``, numbers of images, ``enough_images`` (whether all
        sets have more images than features have dimensions, which a Fréchet distance needs), ``interval`` (what the
        intervals are) and ``metrics``: by name ``value``, ``low``, ``high`` (None where resampling shows no scatter),
        ``floor``, ``ceiling`` (None without), ``better``, ``unit``, ``protocol`` and ``flag``: None, or why the figure
        says little, or, where ``value`` is None, why it was not taken: images that are too few or copies of each other
        make figures perfect.
        ``cas``: :meth:`ClassifierResult.to_dict` by classifier; ``cas_chosen``: the one that held-out generated images
        choose; ``protocol``: numbers of images, split and seed.

    Raises:
        ConfigError: shapes that differ, unknown names, too few images, or own features that fail.
        DataError: a weights file is missing or wrong, or `cache` cannot be used.
    """
    s = EvaluationSettings.of(settings)
    if s.specs and len(generated) < 2:
        raise ConfigError(f"there is {len(generated)} generated image, but metrics need at least 2: generate more.")
    count = min(len(generated), s.max_images)
    given = {
        "real": ("real training images", reference.images, s.max_images),
        "generated": ("generated images", generated, count),
        "floor": ("real test images", None if test is None else test.images, count),
        "ceiling": ("images drawn by programs", programs, count),
    }
    for what, images, _ in given.values():
        if images is not None:
            cas.require_same_size(what, images, "the real training images", reference.images)
    out: dict[str, Any] = {
        "private": "computed from private images without noise: publishing these figures costs privacy",
        "notes": [],
        "features": {},
        "cas": {},
        "protocol": {"generated_images": len(generated), "real_train_images": len(reference), "seed": s.seed},
    }
    if test is not None and test.absent_classes:
        out["notes"].append(
            f"no test image is of {listed(test.absent_classes)}: accuracy and floors are of the other classes"
        )
    if test is not None and len(test) == len(reference) and test.fingerprint() == reference.fingerprint():
        out["notes"].append("the test images are the training images: accuracy and floors say nothing of new images")
    # Subsets are drawn in this order, whatever is measured, so that a seed means the same sets.
    rng = np.random.default_rng(s.seed)
    sets = {
        name: _Set.of(what, _subset(images, most, rng))
        for name, (what, images, most) in given.items()
        if images is not None
    }
    from dpsyngen.hardware import device_of  # brings torch, without which this module can be imported

    device, tell = device_of(s.device, ranks), on_progress or (lambda line: None)
    out["notes"] += [note for name, each in sets.items() if name != "ceiling" and (note := each.note())]
    for spec in s.specs:
        tell(f"features {spec.name}: {count:,} generated, {sets['real'].count:,} real training images")
        out["features"][spec.name] = _figures(spec, sets, s, device, tell, ranks)
    if test is not None and s.classifiers and labels is not None and test.labels is not None:
        results = cas.classification_accuracy(
            *(generated, labels, test.array(), test.labels),
            num_classes=test.num_classes,
            classifiers=s.classifiers,
            seed=s.seed,
            device=device,
            on_progress=on_progress,
        )
        out["cas"] = {name: result.to_dict() for name, result in results.items()}
        out["cas_chosen"] = cas.best_by_validation(results)
        out["protocol"]["real_test_images"] = len(test)
        shares = np.bincount(test.labels, minlength=test.num_classes) / len(test)
        if shares.max() == 1:
            out["notes"].append("all test images are of one class: accuracy is perfect for whatever always says it")
        out["protocol"]["cas"] = {
            "most_frequent_class": float(shares.max()),
            "held_out_share": cas.HELD_OUT,
            "split": "generated images, by class",
            "chosen_on": "held-out generated images",
            "scored_on": "real test images, once",
            "seed": s.seed,
        }
    return out


def _figures(
    spec: FeatureSpec, sets: dict[str, _Set], s: EvaluationSettings, device: str, tell: Tell, ranks: Ranks
) -> dict[str, Any]:
    """All metrics of one extractor: of the set "generated" against "real", beside "floor" and "ceiling" if given."""
    real, made = sets["real"], sets["generated"]
    bounding = {name: each for name, each in sets.items() if name in ("floor", "ceiling")}
    extractor = spec.make(device)
    extractor.fit(real.images)
    compute = computed_by_all(extractor, spec, s.device, ranks)
    of_real = kept_features(s.cache, extractor, real.images, tell, compute)
    of_made = compute(made.images, on_progress=tell)
    of_bounds = {name: kept_features(s.cache, extractor, each.images, tell, compute) for name, each in bounding.items()}
    tell(f"comparing {made.count:,} {', '.join(('generated images', *of_bounds))} with {real.count:,} real ones")
    refused = {name: real.refusal(name) or made.refusal(name, real=False) for name in s.metrics}
    measures = Measures(of_real, [name for name in s.metrics if not refused[name]], s.seed)
    found = measures.of(of_made, scatter=s.bootstrap > 0)
    bounds = {
        bound: {name: e.value for name, e in measures.of(x).items() if not bounding[bound].refusal(name)}
        for bound, x in of_bounds.items()
        if len(x) > 1
    }
    bootstrap = distances.Bootstrap(made.count, s.bootstrap, s.seed) if s.bootstrap else None
    # Components that are fewer because the images they are fitted to are few do not make these images enough.
    dimensions = max(of_real.shape[1], min(getattr(extractor, "components", 0), real.images[0].size))
    enough = all(each.different > dimensions for each in sets.values())
    metrics: dict[str, Any] = {}
    for name in s.metrics:
        estimate = found.get(name)
        low, high = (bootstrap.interval(estimate) if bootstrap and estimate else None) or (None, None)
        few = "fewer different images than dimensions" if name == "frechet" and not enough else None
        metrics[name] = {
            "value": None if estimate is None else estimate.value,
            "low": low,
            "high": high,
            "floor": bounds.get("floor", {}).get(name),
            "ceiling": bounds.get("ceiling", {}).get(name),
            "better": METRICS[name].better,
            "unit": METRICS[name].unit,
            "protocol": "not measured" if estimate is None else estimate.protocol,
            "flag": refused[name] or "; ".join(filter(None, (real.note(), made.note(), few))) or None,
        }
    return {
        "config": extractor.config(),
        "generated_images": made.count,
        "real_images": real.count,
        **{f"{name}_images": bounding[name].count if name in bounding else None for name in ("floor", "ceiling")},
        "subset_seed": s.seed,
        "enough_images": enough,
        "interval": bootstrap.protocol() if bootstrap else None,
        "metrics": metrics,
    }


def _subset(images: NDArray[np.uint8] | ImageStore, most: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    if len(images) <= most:
        return np.asarray(images[:])  # a store has no array of itself
    return np.asarray(images[np.sort(rng.choice(len(images), most, replace=False))])
