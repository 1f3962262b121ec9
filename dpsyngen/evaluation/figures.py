"""The figures of one kind of features, each with its interval, its floor and its ceiling."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.frechet import FeatureStatistics, frechet_distance, frechet_influence
from dpsyngen.evaluation.kernel import KernelDistance
from dpsyngen.evaluation.manifold import Manifold
from dpsyngen.evaluation.scatter import FEWEST, Bootstrap, Estimate
from dpsyngen.evaluation.sliced import SlicedWasserstein

Features = NDArray[np.float32]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Metric:
    """What a figure is, for whoever reads it.

    Attributes:
        title: its name in a table.
        better: "lower" or "higher".
        unit: what it is counted in.
    """

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


def checked_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """`metrics` in their usual order, each once.

    Raises:
        ConfigError: unknown names.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise ConfigError(f"metrics are {', '.join(map(repr, unknown))}, but must be among {', '.join(NAMES)}.")
    return tuple(name for name in NAMES if name in metrics)


def check_sizes(bootstrap: int, max_images: int) -> None:
    """Refuse numbers of replicates and of images that no figure or interval can be made of.

    Raises:
        ConfigError: see the message.
    """
    if max_images < 2:
        raise ConfigError(f"max_images is {max_images}, but metrics need at least 2 images.")
    if bootstrap and bootstrap < FEWEST:
        raise ConfigError(
            f"bootstrap is {bootstrap}, but must be at least {FEWEST} replicates for a 95 % interval, or 0 for none."
        )


class Measures:
    """Everything that is measured against the same real features.

    Args:
        real: features of real training images [m, d].
        metrics: names, see :data:`METRICS`.
        seed: of subsets and directions.
    """

    def __init__(self, real: Features, metrics: Sequence[str], seed: int) -> None:
        self.metrics = checked_metrics(metrics)
        self._statistics = FeatureStatistics.of(real) if "frechet" in self.metrics else None
        self._kernel = KernelDistance(real, seed=seed) if "kid" in self.metrics else None
        self._manifold = Manifold(real) if set(_OF_MANIFOLD) & set(self.metrics) else None
        self._sliced = SlicedWasserstein(real, seed=seed) if "sliced-wasserstein" in self.metrics else None

    def of(self, features: Features, scatter: bool = False) -> dict[str, Estimate]:
        """The figures of features [n, d]; with influences if `scatter` is asked for."""
        found: dict[str, Estimate] = {}
        if self._statistics is not None:
            found["frechet"] = _frechet(features, self._statistics, scatter)
        if self._kernel is not None:
            found["kid"] = self._kernel(features, scatter)
        if self._manifold is not None:
            found |= self._manifold(features, scatter)
        if self._sliced is not None:
            found["sliced-wasserstein"] = self._sliced(features, scatter)
        return {name: found[name] for name in self.metrics}


def figures(
    generated: Features,
    real: Features,
    *,
    floor: Features | None,
    ceiling: Features | None,
    metrics: Sequence[str],
    replicates: int,
    seed: int,
    on_progress: Tell,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """The figures by name, JSON-able, and what their intervals are (None if there are none).

    Args:
        generated: features of generated images [n, d].
        real: features of real training images [m, d].
        floor: features of real test images; None: no floor.
        ceiling: features of images drawn by programs; None: no ceiling.
        metrics: names.
        replicates: of the bootstrap; 0: no intervals.
        seed: of subsets, directions and the bootstrap.
        on_progress: called with a line about what is being done.
    """
    measures = Measures(real, metrics, seed)
    on_progress(f"comparing {len(generated):,} generated with {len(real):,} real images")
    found = measures.of(generated, scatter=replicates > 0)
    bounds: list[dict[str, Estimate]] = []
    for what, features in (("real test images", floor), ("images drawn by programs", ceiling)):
        if features is not None:
            on_progress(f"comparing {len(features):,} {what} with {len(real):,} real images")
        bounds.append({} if features is None else measures.of(features))
    bootstrap = Bootstrap(len(generated), replicates, seed) if replicates else None
    out = {}
    for name, estimate in found.items():
        low, high = (bootstrap.interval(estimate) if bootstrap else None) or (None, None)
        out[name] = {
            "value": estimate.value,
            "low": low,
            "high": high,
            "floor": bounds[0][name].value if bounds[0] else None,
            "ceiling": bounds[1][name].value if bounds[1] else None,
            "better": METRICS[name].better,
            "unit": METRICS[name].unit,
            "protocol": estimate.protocol,
        }
    return out, bootstrap.protocol() if bootstrap else None


def _frechet(features: Features, real: FeatureStatistics, scatter: bool) -> Estimate:
    statistics = FeatureStatistics.of(features)
    with warnings.catch_warnings():
        # `enough_images` says so on the figure itself, where a warning would be lost.
        warnings.simplefilter("ignore", UserWarning)
        value = frechet_distance(statistics, real)
    few = "" if statistics.full_rank and real.full_rank else ", fewer images than dimensions"
    influence = frechet_influence(features, real) if scatter else None
    return Estimate(value, f"of Gaussians{few}; biased upwards by few images", influence, smallest=0.0)
