"""Rows of the tables of figures, shared by the terminal and the report."""

from __future__ import annotations

from typing import Any, NamedTuple

from dpsyngen.evaluation.metrics import METRICS


class MetricRow(NamedTuple):
    """A figure as a line of a table; what it lacks is an empty text."""

    name: str
    value: str
    interval: str
    floor: str
    ceiling: str
    note: str


def metric_rows(metrics: dict[str, Any]) -> list[MetricRow]:
    """A row for each figure of :func:`dpsyngen.fit.evaluate`."""
    rows: list[MetricRow] = []
    chosen = metrics.get("cas_chosen")
    for name, c in metrics["cas"].items():
        note = (
            f"trained on {c['n_train']:,} generated images, {c['chosen']} chosen on {c['n_validation']:,} held-out "
            f"generated ones ({100 * c['validation_accuracy']:.1f} %), scored once on {c['n_test']:,} real test images"
        )
        star = " (chosen by validation)" if name == chosen else ""
        low, high = c.get("accuracy_low"), c.get("accuracy_high")  # figures of earlier versions have none
        interval = "" if low is None or high is None else f"{100 * low:.2f} to {100 * high:.2f} %"
        rows.append(MetricRow(f"CAS, {name}{star}", f"{100 * c['accuracy']:.2f} %", interval, "", "", note))
    for features, f in metrics.get("features", {}).items():
        counts = f"{f['generated_images']:,} generated against {f['real_images']:,} real training images"
        for what, key in (("floor", "floor_images"), ("ceiling", "ceiling_images")):
            # Most figures depend on the number of images, so bounds of fewer are not bounds of the same figure.
            if f[key] is not None and f[key] != f["generated_images"]:
                counts += f", {what} of {f[key]:,}"
        for name, m in f["metrics"].items():
            few = "; TOO FEW IMAGES for its dimensions" if name == "frechet" and not f["enough_images"] else ""
            title = METRICS[name].title if name in METRICS else name
            rows.append(
                MetricRow(
                    f"{title}, {features}",
                    _number(m["value"]),
                    "" if m["low"] is None else f"{_number(m['low'])} to {_number(m['high'])}",
                    _number(m["floor"]),
                    _number(m["ceiling"]),
                    f"{m['better']} is better; {counts}; {m['protocol']}{few}",
                )
            )
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def memorisation_rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, protocol) for each figure of :func:`dpsyngen.evaluation.run.check_memorisation`."""
    rows: list[tuple[str, str, str]] = []
    for name, space in figures["spaces"].items():
        unit = space["features"]["unit"]
        everything, few, equal = space["everything"], space["nearest_few"], space["equal"]
        if everything is not None:
            sizes = f"{space['features']['private_images']:,} training and {space['features']['held_out_images']:,}"
            rows.append(
                (
                    f"nearest to a training image, {name}",
                    _share(everything),
                    f"{100 * everything['expected']:.1f} % if not memorised; {sizes} held-out images; permutation test "
                    f"p = {everything['p_permutation']:.2g}",
                )
            )
            rows.append(
                (
                    f"the same for the {few['images']:,} nearest images, {name}",
                    _share(few),
                    f"{100 * few['expected']:.1f} % if not memorised; permutation test p = {few['p_permutation']:.2g}",
                )
            )
            rows.append(
                (
                    f"the same with sets of equal size, {name}",
                    _share(equal),
                    f"50 % if not memorised; {space['size']:,} images each, 95 % interval {100 * equal['low']:.1f} to "
                    f"{100 * equal['high']:.1f} %; p = {equal['p_binomial']:.2g} of these sets (binomial, two-sided), "
                    f"p = {equal['p_permutation']:.2g} of sets like these (permutation)",
                )
            )
            rows.append(
                (
                    f"distance to training over held-out images, {name}",
                    "–" if space["ratio"] is None else f"{space['ratio']:.3f}",
                    f"1 if not memorised; medians {space['median_private']:.3g} and {space['median_held_out']:.3g}, "
                    f"sets of equal size; {unit}",
                )
            )
        else:
            note = f"nothing to compare it with: there are no held-out images; {unit}"
            rows.append((f"median distance to a training image, {name}", f"{space['median_private']:.3g}", note))
        real = "held-out" if everything is not None else "training"
        rows.append(
            (
                f"closer than real images are, {name}",
                f"{100 * space['closer']:.1f} %",
                f"nearer to a training image than 99 % of the {real} images are to another ({space['threshold']:.3g}); "
                f"95 % interval {100 * space['closer_low']:.1f} to {100 * space['closer_high']:.1f} %",
            )
        )
    held_out = figures["duplicates_held_out"]
    note = "generated images that equal a training image in every pixel"
    if held_out is not None:
        note += f"; {held_out:,} equal a held-out image"
    rows.append(("exact copies", f"{figures['duplicates']:,}", note))
    if figures["held_out_in_training"]:
        note = "no control, and counted for neither side"
        rows.append(("held-out images that are training images", f"{figures['held_out_in_training']:,}", note))
    return rows


def _share(share: dict[str, Any]) -> str:
    return f"{100 * share['share']:.1f} %"
