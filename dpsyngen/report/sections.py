"""What the run report shows: of the release half in both copies, of the private half in the private copy alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError, RunError
from dpsyngen.evaluation.memorisation import PAIRS_FILE, image_data, png_url
from dpsyngen.files import read_yaml_file
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.privacy.ledger import Ledger, LedgerEntry
from dpsyngen.programs import image_grid, make_program
from dpsyngen.report.charts import Points, line_chart, stage_chart
from dpsyngen.report.tables import figure_table, memorisation_rows, metric_rows
from dpsyngen.training.log import JsonLines
from dpsyngen.training.run import Run

SEED = 0
"""Public, and the same in every report: image i of two runs starts from the same noise, so their grids compare."""
_PER_CLASS = 12  # images in a row
_MOST_CLASSES = 20
_CURVES = (
    ("loss", "Loss", False),
    ("clipped", "Share of clipped gradients", True),
    ("median_norm", "Median gradient norm before clipping", False),
)


# ----------------------------------------------------------------- of the release half: opens nothing else


def release_values(release: Path) -> dict[str, Any]:
    """The values of the template that need files of `release` alone, a release half or a copy of it.

    Raises:
        RunError, ConfigError: a file of it is damaged.
    """
    statement = json.loads((release / "privacy.json").read_text(encoding="utf-8"))
    config = read_yaml_file(release / "config.yaml", "the configuration")
    generator = ReleasedGenerator(release)
    programs, p = None, config["program"]
    with contextlib.suppress(ConfigError):  # this version may have no such program
        size = {"resolution": generator.resolution, "channels": generator.channels}
        programs = _grid(make_program(p["name"], **size, seed=p["seed"], **p["params"]).batch(range(24)))
    lines = curves(JsonLines(release / "public_training.jsonl", 0o644).read(), "loss")
    charts = {name: line_chart({name: points}, f"Loss of {name}", "public") for name, points in lines.items()}
    epsilon = None if statement["epsilon"] == "inf" else statement["epsilon"]
    return {
        "statement": statement,
        "mechanisms": figure_table([_mechanism(m) for m in statement["mechanisms"]]),
        "epsilon": epsilon,
        "odds": None if epsilon is None else math.exp(min(epsilon, 700)),
        "config_yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "samples": [(name, _grid(drawn)) for name, drawn in class_images(generator, _MOST_CLASSES, _PER_CLASS, SEED)],
        "omitted_classes": max(0, len(generator.class_names) - _MOST_CLASSES),
        "sampling": generator.settings(seed=SEED),
        "trajectory": trajectory_table(generator),
        "programs": programs,
        "stage_chart": stage_chart(statement["stages"], config["network"], config["sampling"]),
        "public_charts": {name: chart for name, chart in charts.items() if chart is not None},
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


def class_images(
    generator: ReleasedGenerator, most: int, each: int, seed: int, **sampling: Any
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Names of the first `most` classes and `each` images of each; "" and four times as many without classes."""
    shown = generator.class_names[:most]
    if not shown:
        return [("", generator.sample(4 * each, seed=seed, **sampling).images)]
    labels = generator.labels(each * len(shown), list(range(len(shown))))
    assert labels is not None
    images = generator.sample(len(labels), labels=labels, seed=seed, **sampling).images
    return [(name, images[labels == i]) for i, name in enumerate(shown)]


def _grid(images: NDArray[np.uint8]) -> str:
    return png_url(image_grid(images, _PER_CLASS, scale=max(1, round(66 / images.shape[-1])), pad=3))


def trajectory_table(generator: ReleasedGenerator) -> dict[str, Any]:
    """The images with which the class rows of the report begin, at nine steps that are even in log σ.

    Returns:
        ``sigmas``: a text for each column; ``trainers``: of each column; ``stages``: name, trainer and number of
        columns of each run of columns that one stage owns; ``noisy``: pictures of x, what the sampler had, for the
        first image; ``rows``: for each image its name, pictures of D(x; σ), what was expected of it, and the image.
    """
    count = min(6, len(generator.class_names)) or 4
    found = generator.trajectory(count, 9, seed=SEED)
    labels = found.samples.labels
    return {
        # Two digits, without an exponent where that is short.
        "sigmas": [f"{float(f'{s:.2g}'):g}" if s >= 1e-4 else f"{s:.1e}" for s in found.sigmas],
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


def curves(log: Iterable[Mapping[str, Any]], name: str) -> dict[str, Points]:
    """(step, value) of a figure, such as "loss", of each phase of a log; without values that are not finite."""
    out: dict[str, list[tuple[float, float]]] = {}
    for line in log:
        value = line.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            out.setdefault(str(line["phase"]), []).append((line["step"], float(value)))
    return {phase: sorted(points) for phase, points in out.items()}


# ------------------------------------------------------------------------------------ of the private half


def private_values(run: Run, class_names: Sequence[str]) -> dict[str, Any]:
    """The values of the template that the publishable copy must not have.

    Raises:
        RunError, LedgerError: a file of the private half is damaged.
    """
    log = JsonLines(run.private / "training.jsonl", 0o600).read()
    metrics, health = _kept(run.private / "metrics.json"), _kept(run.private / "health.json")
    charts = {
        title: line_chart(curves(log, name), title, "private", percent=percent) for name, title, percent in _CURVES
    }
    return {
        "ledger": figure_table(ledger_rows(Ledger(run.ledger_path).entries)),
        "charts": {title: chart for title, chart in charts.items() if chart is not None},
        "summary": _summary(log),
        "metrics": figure_table(metric_rows(metrics)) if metrics else None,
        "classes": class_accuracy(metrics, class_names) if metrics else None,
        # Short lists on one line.
        "protocol": yaml.safe_dump(metrics, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
        if metrics
        else None,
        "memorisation": _memorisation(run),
        "health": None if health is None else health["findings"],
    }


def _kept(path: Path) -> dict[str, Any] | None:
    """What a command left in the private half; None if it was not run."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}).  Remove it, or run the command that made it again.") from None
    return values


def _summary(log: list[dict[str, Any]]) -> dict[str, float] | None:
    if not log:
        return None
    last = log[-max(1, len(log) // 10) :]
    return {
        "clipped": sum(v["clipped"] for v in last) / len(last),
        "median_norm": sum(v["median_norm"] for v in last) / len(last),
        "not_finite": sum(v["not_finite"] for v in log),
        "examples": sum(v["examples"] for v in log) / len(log),
    }


def _memorisation(run: Run) -> dict[str, Any] | None:
    """The figures and the images of the last memorisation check; None if there was none."""
    figures = _kept(run.private / "memorisation.json")
    if figures is None:
        return None
    everything = next(iter(figures["spaces"].values()))["everything"]
    return {
        "conclusion": figures["conclusion"],
        "flagged": figures["flagged"],
        "rows": figure_table(memorisation_rows(figures)),
        "pairs": _kept(run.private / PAIRS_FILE),
        "expected": None if everything is None else f"{100 * everything['expected']:.0f} %",
    }


def class_accuracy(metrics: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any] | None:
    """Accuracy by class, and which classes were mistaken for which; None if no classifier was scored.

    Returns:
        ``classifiers``: names; ``rows``: of each class its name and, for each classifier, the accuracy in percent (None
        where the class has no test image); ``confusion``: None, or a classifier and for each real class its name and
        how many of its images were taken for each class.
    """
    scored = {name: c for name, c in metrics.get("cas", {}).items() if c.get("per_class_accuracy")}
    if not scored:
        return None
    percents = ([None if a is None else round(100 * a, 1) for a in c["per_class_accuracy"]] for c in scored.values())
    rows = list(zip(class_names, zip(*percents, strict=True), strict=True))
    chosen = metrics.get("cas_chosen") if metrics.get("cas_chosen") in scored else next(iter(scored))
    counts, confusion = scored[chosen].get("confusion"), None
    if counts and len(counts) == len(class_names) <= _MOST_CLASSES:
        confusion = chosen, list(zip(class_names, counts, strict=True))
    return {"classifiers": list(scored), "rows": rows, "confusion": confusion}


def ledger_rows(entries: Sequence[LedgerEntry]) -> list[dict[str, str]]:
    """Rows of texts: ``entry`` (numbers, from 1), ``kind``, ``reason``, ``runs``, ``rate``, ``noise``, ``details``.

    Neighbouring entries, such as steps of DP-SGD, share a row if all but their counts and their places agree.  Its runs
    are their sum, and its details those on which they agree.
    """

    def alike(pair: tuple[int, LedgerEntry]) -> tuple[Any, ...]:
        entry, m = pair[1], pair[1].mechanism
        return entry.kind, entry.reason, m and (m.sampling_rate, m.noise_multiplier)

    rows = []
    for _, group in itertools.groupby(enumerate(entries, 1), alike):
        numbers, same = zip(*group, strict=True)
        first, m = same[0], same[0].mechanism
        details = {k: v for k, v in first.details.items() if all(e.details.get(k) == v for e in same)}
        rows.append(
            {
                "entry": str(numbers[0]) if len(same) == 1 else f"{numbers[0]}–{numbers[-1]}",
                "kind": first.kind,
                "reason": first.reason,
                "runs": "" if m is None else f"{sum(e.mechanism.count for e in same if e.mechanism):,}",
                "rate": "" if m is None else f"{m.sampling_rate:.5g}",
                "noise": "" if m is None else f"{m.noise_multiplier:.5g}",
                "details": "; ".join(f"{k.replace('_', ' ')} {_text(v)}" for k, v in details.items()),
            }
        )
    return rows


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v is not None) + ")"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
