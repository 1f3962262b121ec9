"""What the private copy of the report shows besides: figures of private images, read from the private half."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpsyngen.errors import RunError
from dpsyngen.evaluation.pairs import FILE
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.report.charts import Series, line_chart
from dpsyngen.report.class_accuracy import class_accuracy
from dpsyngen.report.curves import curves
from dpsyngen.report.figure_table import figure_table
from dpsyngen.report.ledger_rows import ledger_rows
from dpsyngen.report.tables import memorisation_rows, metric_rows
from dpsyngen.training.log import JsonLines
from dpsyngen.training.run import Run

_CURVES = (
    ("loss", "Loss", False),
    ("clipped", "Share of clipped gradients", True),
    ("median_norm", "Median gradient norm before clipping", False),
)


def private_values(run: Run, class_names: Sequence[str]) -> dict[str, Any]:
    """The values of the template that the publishable copy must not have.

    Args:
        run: a finished run.
        class_names: of its generator, for the table of classes.

    Raises:
        RunError: a file of the private half is damaged.
        LedgerError: the ledger is.
    """
    log = JsonLines(run.private / "training.jsonl", 0o600).read()
    metrics, health = kept(run.private / "metrics.json"), kept(run.private / "health.json")
    return {
        "ledger": figure_table(ledger_rows(Ledger(run.ledger_path).entries)),
        "charts": _charts(log),
        "summary": _summary(log),
        "metrics": figure_table(metric_rows(metrics)) if metrics else None,
        "classes": class_accuracy(metrics, class_names) if metrics else None,
        "protocol": _readable(metrics) if metrics else None,
        "memorisation": _memorisation(run),
        "health": None if health is None else health["findings"],
    }


def _readable(values: dict[str, Any]) -> str:
    """The same as YAML, in which short lists stand on one line."""
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100))


def _charts(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Title and picture of each curve of private training."""
    out = []
    for name, title, percent in _CURVES:
        lines = [Series(phase, points, "private") for phase, points in curves(log, name).items()]
        chart = line_chart(lines, title, x_label="step", percent=percent)
        if chart is not None:
            out.append({"title": title, "chart": chart})
    return out


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
    figures, picture = kept(run.private / "memorisation.json"), run.private / "memorisation.png"
    if figures is None:
        return None
    pairs = kept(run.private / FILE)
    sheet = None
    if pairs is None and picture.exists():  # a check by an earlier version left the picture alone
        sheet = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    everything = next(iter(figures["spaces"].values()))["everything"]
    by_class = [
        (name, f"{100 * s['share']:.1f} %", f"{100 * s['expected']:.1f} %", f"{s['p_permutation']:.2g}", s["images"])
        for name, s in figures["by_class"].items()
    ]
    return {
        "conclusion": figures["conclusion"],
        "flagged": figures["flagged"],
        "rows": figure_table(memorisation_rows(figures)),
        "by_class": by_class,
        "pairs": pairs,
        "expected": None if everything is None else f"{100 * everything['expected']:.0f} %",
        "sheet": sheet,
    }


def kept(path: Path) -> dict[str, Any] | None:
    """What a command left in the private half; None if it was not run.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}).  Remove it, or run the command that made it again.") from None
    return values
