"""What the report shows of the release half.  It is in both copies, so nothing here may open another folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.pairs import png_url
from dpsyngen.files import read_yaml_file
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.programs import image_grid, make_program
from dpsyngen.report.charts import Series, line_chart
from dpsyngen.report.curves import curves
from dpsyngen.report.figure_table import figure_table
from dpsyngen.report.stage_chart import stage_charts
from dpsyngen.report.trajectory import trajectory_table
from dpsyngen.training.log import JsonLines

SEED = 0
"""Public, and the same in every report: image i of two runs starts from the same noise, so their grids compare."""
_PER_CLASS = 12
_ON_A_PHONE = 6
_MOST_CLASSES = 20


def release_values(release: Path) -> dict[str, Any]:
    """The values of the template that need files of `release` alone.

    Args:
        release: the release half of a finished run, or a copy of it.

    Raises:
        RunError, ConfigError: a file of it is damaged.
    """
    statement = json.loads((release / "privacy.json").read_text(encoding="utf-8"))
    config = read_yaml_file(release / "config.yaml", "the configuration")
    generator = ReleasedGenerator(release)
    network, sampling = config["network"], config["sampling"]
    drawn = _drawn_by_program(config["program"], generator)
    lines = curves(JsonLines(release / "public_training.jsonl", 0o644).read(), "loss")
    epsilon = statement["epsilon"]
    return {
        "statement": statement,
        "mechanisms": figure_table([_mechanism(m) for m in statement["mechanisms"]]),
        "epsilon": None if epsilon == "inf" else epsilon,
        "odds": None if epsilon == "inf" else math.exp(min(epsilon, 700)),
        "config_yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "samples": _class_rows(generator),
        "omitted_classes": max(0, len(generator.class_names) - _MOST_CLASSES),
        "sampling": generator.settings(seed=SEED),
        "trajectory": trajectory_table(generator, seed=SEED),
        "programs": None if drawn is None else _grids(drawn, generator.resolution),
        "stage_charts": stage_charts(
            statement["stages"],
            network["noise_mean"],
            network["noise_std"],
            sampling["sigma_min"],
            sampling["sigma_max"],
        ),
        "public_charts": [
            chart
            for name, points in lines.items()
            if (chart := line_chart([Series(name, points, "public")], f"Loss of {name}", x_label="step"))
        ],
        "public_names": [name for name, points in lines.items() if len(points) > 1],
    }


def _mechanism(m: dict[str, Any]) -> dict[str, str]:
    """A row of a table; a mechanism without noise has no rate."""
    noise = m.get("noise_multiplier")
    return {
        "mechanism": m["mechanism"],
        "runs": f"{m.get('count') or m.get('steps') or 1:,}",
        "sampling rate": f"{m['sampling_rate']:.5g}" if m.get("sampling_rate") else "–",
        "noise multiplier": "no noise" if noise is None else f"{noise:.5g}",
        "sensitivity": str(m.get("l2_sensitivity", "–")),
        "what for": m["reason"],
    }


def _class_rows(generator: ReleasedGenerator) -> list[dict[str, Any]]:
    """A row of images for each class; one of many images if there are no classes."""
    shown = generator.class_names[:_MOST_CLASSES]
    if not shown:
        images = generator.sample(4 * _PER_CLASS, seed=SEED).images
        return [{"name": "", **_grids(images, generator.resolution)}]
    labels = generator.labels(_PER_CLASS * len(shown), list(range(len(shown))))
    assert labels is not None
    images = generator.sample(len(labels), labels=labels, seed=SEED).images
    return [{"name": name, **_grids(images[labels == i], generator.resolution)} for i, name in enumerate(shown)]


def _grids(images: NDArray[np.uint8], resolution: int) -> dict[str, str]:
    """The same images in long rows and, for a phone, in short ones."""
    wide, narrow = (max(1, round(side / resolution)) for side in (66, 48))
    return {
        "wide": png_url(image_grid(images, _PER_CLASS, scale=wide, pad=3)),
        "narrow": png_url(image_grid(images, _ON_A_PHONE, scale=narrow, pad=3)),
    }


def _drawn_by_program(config: dict[str, Any], generator: ReleasedGenerator) -> NDArray[np.uint8] | None:
    """Some of the public images; None where they cannot be drawn, as for lack of the fonts that the run had."""
    try:
        program = make_program(
            config["name"],
            resolution=generator.resolution,
            channels=generator.channels,
            seed=config["seed"],
            **config["params"],
        )
    except ConfigError:
        return None
    return program.batch(range(24))
