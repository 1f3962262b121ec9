"""How long the DP moments of a run take: measured on noise, with as many frequencies as the run would have."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.privacy.accounting import calibrate_noise, default_delta
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.moments import MomentsPlan, estimate_moments, plan_moments
from dpsyngen.training.plan import Shape, stages_of

# Two batches at least as a query reads them, so that the second tells what an image costs.
_NUMBERS, _FEWEST, _MOST = 1 << 23, 32, 20_000


def coarse_noise(count: int, shape: Shape) -> NDArray[np.uint8]:
    """[count, C, H, W], noise in squares of two by two pixels: neighbours that agree, as those of pictures do."""
    half = -(-shape.resolution // 2)
    squares = np.random.default_rng(0).integers(0, 256, (count, shape.channels, half, half), dtype=np.uint8)
    return squares.repeat(2, 2).repeat(2, 3)[:, :, : shape.resolution, : shape.resolution]


class MomentsTime:
    """Seconds of the DP moments of runs; what was measured is kept for the next run that takes the same moments.

    Args:
        now_is: the clock.
    """

    def __init__(self, now_is: Callable[[], float]) -> None:
        self._now_is = now_is
        self._known: dict[tuple[float, int], tuple[float, float]] = {}

    def of(self, config: Config, shape: Shape) -> float:
        """Of one run; 0 if it takes no moments."""
        stages, privacy = stages_of(config), config.privacy
        if not stages.moments:
            return 0.0
        noise = 0.0
        if math.isfinite(privacy.epsilon):
            share = 1.0 if stages.gaussian else config.moments.share
            delta = default_delta(shape.records) if privacy.delta is None else privacy.delta
            # A looser bound than the run's own is good enough for a time, and takes milliseconds.
            noise = calibrate_noise(privacy.epsilon * share, delta, sampling_rate=1.0, steps=1, accountant="rdp")
        key = (noise, config.moments.rank)
        if key not in self._known:
            self._known[key] = self._measure(shape, plan_moments(noise, shape.num_classes), config.moments.rank)
        fixed, each = self._known[key]
        return fixed + each * shape.records

    def _measure(self, shape: Shape, plan: MomentsPlan, rank: int) -> tuple[float, float]:
        """Seconds whatever the number of images, and seconds an image."""
        size = shape.channels * shape.resolution**2
        count = min(shape.records, _MOST, max(_NUMBERS // size, _FEWEST))
        images = coarse_noise(count, shape)
        labels = np.arange(count, dtype=np.int64) % shape.num_classes if shape.num_classes else None
        seen: dict[int, list[tuple[int, float]]] = {}  # by query: images read, and when

        def look(done: int, total: int) -> None:
            seen.setdefault((done - 1) // count, []).append((done, self._now_is()))

        begun = self._now_is()
        estimate_moments(
            ImageDataset(images, labels, shape.class_names, "noise"),
            shape.num_classes,
            shape.records,
            plan,
            Randomness.from_insecure_seed(0),  # the images are no images
            rank=rank,
            on_progress=look,
        )
        whole = self._now_is() - begun
        ends = [(times[0], times[-1]) for times in seen.values() if len(times) > 1]
        if not ends:
            return 0.0, whole / count
        each = sum((last[1] - first[1]) / (last[0] - first[0]) for first, last in ends)
        return max(whole - each * count, 0.0), each
