"""Classification accuracy by class, and what was taken for what, from the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MOST_CLASSES = 20  # of the table of mistakes, which is square


def class_accuracy(metrics: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any] | None:
    """The tables of classes; None if no classifier was scored.

    Args:
        metrics: ``private/metrics.json``.
        class_names: in the order of the labels.

    Returns:
        ``classifiers``: names; ``rows``: of each class its name and, for each classifier, ``text`` and ``percent``
        (None where the class has no test image); ``confusion``: None, or ``classifier`` and, for each real class, its
        name and cells of ``count``, ``right`` (the diagonal) and ``many`` (more than a tenth of the class went there).
    """
    scored = {name: c for name, c in metrics.get("cas", {}).items() if c.get("per_class_accuracy")}
    if not scored:
        return None
    rows = [
        {"name": name, "cells": [_cell(c["per_class_accuracy"][i]) for c in scored.values()]}
        for i, name in enumerate(class_names)
    ]
    chosen = str(metrics.get("cas_chosen"))
    chosen = chosen if chosen in scored else next(iter(scored))
    return {"classifiers": list(scored), "rows": rows, "confusion": _confusion(chosen, scored[chosen], class_names)}


def _cell(accuracy: float | None) -> dict[str, Any]:
    if accuracy is None:
        return {"text": "no test image", "percent": None}
    return {"text": f"{100 * accuracy:.1f} %", "percent": round(100 * accuracy, 1)}


def _confusion(classifier: str, figures: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any] | None:
    counts = figures.get("confusion")
    if not counts or len(class_names) > _MOST_CLASSES or len(counts) != len(class_names):
        return None
    return {
        "classifier": classifier,
        "rows": [
            {
                "name": class_names[i],
                "cells": [
                    {"count": n, "right": i == j, "many": i != j and n > 0.1 * max(1, sum(row))}
                    for j, n in enumerate(row)
                ],
            }
            for i, row in enumerate(counts)
        ],
    }
