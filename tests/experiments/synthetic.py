"""Experiments whose figures are made up, for tests of tables, plots and reports."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.experiments.experiment import Experiment
from dpsyngen.experiments.spec import Job, parse_spec

EFFECTS = {"dpdm": 0.0, "finetune": 3.0, "cleaning": 0.5, "coarse": 1.5, "both": 8.0, "": 0.0}
"""Points of accuracy that each variant adds in truth."""
CLASSIFIERS = {"cnn": 2.0, "mlp": 0.0, "logreg": -3.0}
METRICS = {
    "frechet": ("lower", 60.0, 2.0),
    "kid": ("lower", 0.05, 0.04),
    "sliced-wasserstein": ("lower", 0.12, 0.01),
    "precision": ("higher", 0.4, 0.78),
    "recall": ("higher", 0.3, 0.7),
    "density": ("higher", 0.35, 0.98),
    "coverage": ("higher", 0.25, 0.9),
}
Change = Callable[[Job, dict[str, Any]], "dict[str, Any] | None"]


def make_experiment(
    path: Path,
    *,
    grid: dict[str, Any] | None = None,
    classes: int = 10,
    features: tuple[str, ...] = ("efficientnet-lite0", "pixels-pca"),
    spread: float = 1.0,
    change: Change | None = None,
    **spec: Any,
) -> Path:
    """An experiment of which every job is finished.

    Args:
        path: its folder, which must not exist.
        grid: of the specification.
        classes: number of classes; 0: no classifiers.
        features: extractors with figures.
        spread: standard deviation over seeds, in points of accuracy.
        change: is given (job, result) and returns what is written instead; None: the job has no result.
        spec: other parts of the specification.
    """
    values = {"name": "made-up", "data": {"train": "digits", "test": "digits:test"}, **spec, "grid": grid or {}}
    if not classes:
        values["evaluation"] = {"classifiers": []}
    experiment = Experiment.open_or_create(path, parse_spec(values))
    for job in experiment.jobs:
        rng = np.random.default_rng(list(job.name.encode()))
        result: dict[str, Any] | None = {
            "job": job.name,
            "delta": None if job.kind == "real" else 1e-5,
            "private": job.kind == "run" and not math.isinf(job.epsilon),
            "facts": _facts(job, rng),
            "evaluation": _evaluation(job, rng, classes, features, spread),
            "measured": experiment.measure_digest(job),
        }
        assert result is not None
        result = change(job, result) if change else result
        if result is not None:
            experiment.result_path(job).write_text(json.dumps(result))
    experiment.note(
        privacy={"total_epsilon": 9.87, "delta": 1e-5, "runs": len(experiment.jobs), "note": "all runs together"}
    )
    return path


def _facts(job: Job, rng: np.random.Generator) -> dict[str, Any]:
    facts = {"threads": 1, "device": "cpu", "seconds_evaluation": 60 + 5 * rng.random()}
    if job.kind == "run":
        facts |= {
            **{"steps": 450, "batch": 256, "copies": 1, "records": 60000, "parameters": 114660},
            "private_images_seen": 450 * 256,
            "noise_multiplier": 0.9,
            "seconds_public": 0.0 if job.variant == "dpdm" else 30 + 5 * rng.random(),
            "seconds_private": 170 + 20 * rng.random(),
            "seconds_sampling": 20 + rng.random(),
        }
        facts["seconds_training"] = facts["seconds_public"] + facts["seconds_private"]
    return facts


def _evaluation(
    job: Job, rng: np.random.Generator, classes: int, features: tuple[str, ...], spread: float
) -> dict[str, Any]:
    out: dict[str, Any] = {"cas": {}, "features": {}}
    epsilon = 100.0 if math.isinf(job.epsilon) else job.epsilon
    quality = 60 + 6 * math.log10(epsilon) + EFFECTS[job.variant] + spread * rng.normal()
    quality += 0.8 * sum(float(v) for v in job.settings.values() if isinstance(v, int | float))
    cas = {"run": CLASSIFIERS, "real": CLASSIFIERS, "dp-classifier": {"dp-cnn": 9.0}}[job.kind]
    for name, more in cas.items() if classes else ():
        accuracy = (0.9 if job.kind == "real" else quality / 100) + more / 100
        by_class = np.clip(accuracy + np.linspace(-0.2, 0.2, classes) + 0.02 * rng.normal(size=classes), 0, 1)
        out["cas"][name] = {
            "accuracy": accuracy,
            "accuracy_low": accuracy - 0.009,
            "accuracy_high": accuracy + 0.009,
            "validation_accuracy": min(1.0, accuracy + 0.1),
            "per_class_accuracy": [None if i == 99 else float(a) for i, a in enumerate(by_class)],
            "n_train": 4500,
            "n_validation": 500,
            "n_test": 10000,
            "chosen": "epoch 12",
        }
    if job.kind == "run":
        far = (100 - quality) / 40
        for extractor in features:
            metrics = {}
            for name, (better, value, floor) in METRICS.items():
                v = value * far if better == "lower" else value / far
                metrics[name] = {
                    **{"value": v, "low": 0.97 * v, "high": 1.03 * v, "better": better},
                    "floor": floor * (0.05 if better == "lower" else 1),
                    "ceiling": value * 2 if better == "lower" else value / 2,
                }
            out["features"][extractor] = {
                **{"generated_images": 5000, "real_images": 10000, "enough_images": True, "config": {}},
                "metrics": metrics,
            }
    if cas:
        out["cas_chosen"] = next(iter(cas))
    out["protocol"] = {"generated_images": 5000}
    return out
