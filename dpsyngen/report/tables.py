"""Rows of the tables of figures, shared by the terminal and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dpsyngen.evaluation.metrics import METRICS

_WORDS = {"name": "figure", "note": "how to read it", "interval": "95 % interval"}


class FigureRow(NamedTuple):
    """A figure as a line of a table; what it lacks is an empty text."""

    name: str
    value: str
    interval: str = ""
    floor: str = ""
    ceiling: str = ""
    note: str = ""


def figure_table(rows: Sequence[FigureRow | Mapping[str, str]]) -> dict[str, Any]:
    """Figures for a template: ``columns``, headings, and ``rows``, a text for each column; without empty columns."""
    named = [row._asdict() if isinstance(row, FigureRow) else row for row in rows]
    used = [name for name in (named[0] if named else ()) if any(row[name] for row in named)]
    return {
        "columns": [_WORDS.get(name, name) for name in used],
        "rows": [[row[name] for name in used] for row in named],
    }


def metric_rows(metrics: dict[str, Any]) -> list[FigureRow]:
    """A row for each figure of :func:`dpsyngen.evaluate`."""
    rows = [FigureRow("READ FIRST", "–", note=note) for note in metrics.get("notes", ())]
    most = metrics.get("protocol", {}).get("cas", {}).get("most_frequent_class")
    usual = "" if most is None else f"; {100 * most:.1f} % of them are of the most frequent class"
    for name, c in metrics["cas"].items():
        note = (
            f"trained on {c['n_train']:,} generated images, {c['chosen']} chosen on {c['n_validation']:,} held-out "
            f"generated ones ({100 * c['validation_accuracy']:.1f} %), scored once on {c['n_test']:,} real test images"
            f"{usual}"
        )
        star = " (chosen by validation)" if name == metrics.get("cas_chosen") else ""
        interval = f"{100 * c['accuracy_low']:.2f} to {100 * c['accuracy_high']:.2f} %"
        rows.append(FigureRow(f"CAS, {name}{star}", f"{100 * c['accuracy']:.2f} %", interval, note=note))
    for features, f in metrics.get("features", {}).items():
        counts = f"{f['generated_images']:,} generated against {f['real_images']:,} real training images"
        for what, key in (("floor", "floor_images"), ("ceiling", "ceiling_images")):
            # Most figures depend on the number of images, so bounds of fewer are not bounds of the same figure.
            if f[key] is not None and f[key] != f["generated_images"]:
                counts += f", {what} of {f[key]:,}"
        for name, m in f["metrics"].items():
            flag = f"{'DOUBTFUL' if m['value'] is not None else 'NOT MEASURED'}: {m['flag']}; " if m.get("flag") else ""
            value, low, high, floor, ceiling = (
                "" if m[key] is None else f"{m[key]:.4g}" for key in ("value", "low", "high", "floor", "ceiling")
            )
            title = f"{METRICS[name].title if name in METRICS else name}, {features}"
            note = f"{flag}{m['better']} is better; {counts}; {m['protocol']}"
            rows.append(FigureRow(title, value or "–", f"{low} to {high}" if low else "", floor, ceiling, note))
    return rows


def memorisation_rows(figures: dict[str, Any]) -> list[FigureRow]:
    """A row for each figure of a memorisation check, ``private/memorisation.json``."""
    rows = []
    for features, space in figures["spaces"].items():
        about, everything, few = (space[k] for k in ("features", "everything", "nearest_few"))
        real = "training" if everything is None else "held-out"
        if everything is None:
            note = f"nothing to compare it with: there are no held-out images; {about['unit']}"
            found = [("median distance to a training image", f"{space['median_private']:.3g}", note)]
        else:
            found = [
                (
                    "nearest to a training image",
                    _percent(everything["share"]),
                    f"{_percent(everything['expected'])} if not memorised; {about['private_images']:,} training and "
                    f"{about['held_out_images']:,} held-out images; 95 % interval {100 * everything['low']:.1f} to "
                    f"{_percent(everything['high'])}; permutation test p = {everything['p_permutation']:.2g}",
                ),
                (
                    f"the same for the {few['images']:,} nearest images",
                    _percent(few["share"]),
                    f"{_percent(few['expected'])} if not memorised; permutation test p = {few['p_permutation']:.2g}",
                ),
                (
                    "distance to training over held-out images",
                    "–" if space["ratio"] is None else f"{space['ratio']:.3f}",
                    f"1 if not memorised; medians {space['median_private']:.3g} and {space['median_held_out']:.3g}, "
                    f"real sets of {space['size']:,} images each; {about['unit']}",
                ),
            ]
        note = f"nearer to a training image than 99 % of the {real} images are to another ({space['threshold']:.3g}); "
        if space["closer"] is None:
            found.append(
                (
                    "closer than real images are",
                    "–",
                    f"NOT MEASURED: {_percent(space['copies'])} of the {real} images are copies of training images",
                )
            )
        else:
            note += f"95 % interval {100 * space['closer_low']:.1f} to {_percent(space['closer_high'])}"
            found.append(("closer than real images are", _percent(space["closer"]), note))
        rows += [FigureRow(f"{name}, {features}", value, note=note) for name, value, note in found]
    note = "generated images that equal a training image in every pixel"
    if figures["duplicates_held_out"] is not None:
        note += f"; {figures['duplicates_held_out']:,} equal a held-out image"
    rows.append(FigureRow("exact copies", f"{figures['duplicates']:,}", note=note))
    if figures["held_out_in_training"]:
        note = "no control, and counted for neither side"
        rows.append(
            FigureRow("held-out images that are training images", f"{figures['held_out_in_training']:,}", note=note)
        )
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
