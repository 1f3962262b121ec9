"""How images come about, as a table: images down, noise levels across, each level under the stage that owns it."""

from __future__ import annotations

import itertools
from typing import Any

from dpsyngen.evaluation.pairs import image_data
from dpsyngen.generator.generator import ReleasedGenerator

IMAGES, COLUMNS = 6, 9


def trajectory_table(generator: ReleasedGenerator, *, seed: int = 0) -> dict[str, Any]:
    """The first images of `seed`, one of each class, at steps that are even in log σ.

    They are the images with which the class rows of the report begin, drawn by the run's own sampler.

    Returns:
        ``sigmas``: a text for each column; ``trainers``: of each column; ``stages``: name, trainer and number of
        columns of each run of columns that one stage owns; ``noisy``: pictures of what the sampler had for the first
        image; ``rows``: for each image its name, the pictures of what was expected of it, and of what it became.
    """
    count = min(IMAGES, len(generator.class_names)) or 4
    found = generator.trajectory(count, COLUMNS, seed=seed)
    labels = found.samples.labels
    return {
        "sigmas": [_level(sigma) for sigma in found.sigmas],
        "stages": [
            {"name": stage.name, "trainer": stage.trainer, "columns": len(list(run))}
            for stage, run in itertools.groupby(found.stages)
        ],
        "trainers": [stage.trainer for stage in found.stages],
        "noisy": [image_data(images[0]) for images in found.noisy],
        "rows": [
            {
                "name": generator.class_names[labels[i]] if labels is not None else f"image {i + 1}",
                "expected": [image_data(images[i]) for images in found.denoised],
                "image": image_data(found.samples.images[i]),
            }
            for i in range(count)
        ],
    }


def _level(sigma: float) -> str:
    """σ to two digits, without an exponent."""
    return f"{float(f'{sigma:.2g}'):g}" if sigma >= 1e-4 else f"{sigma:.1e}"
