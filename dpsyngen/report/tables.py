"""Rows of the metric table, shared by the terminal and the report."""

from __future__ import annotations

from typing import Any


def metric_rows(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, protocol) for each figure of :func:`dpsyngen.api.evaluate`."""
    rows: list[tuple[str, str, str]] = []
    chosen = metrics.get("cas_chosen")
    for name, c in metrics["cas"].items():
        note = (
            f"trained on {c['n_train']:,} generated images, {c['chosen']} chosen on {c['n_validation']:,} held-out "
            f"generated ones ({100 * c['validation_accuracy']:.1f} %), scored once on {c['n_test']:,} real test images"
        )
        star = " (chosen by validation)" if name == chosen else ""
        rows.append((f"CAS, {name}{star}", f"{100 * c['accuracy']:.2f} %", note))
    for name, f in metrics["frechet"].items():
        floor = f"; real test images get {f['floor']:.3f} with {f['floor_images']:,} images" if "floor" in f else ""
        few = "" if f["enough_images"] else "; TOO FEW IMAGES for its dimensions, biased upwards"
        note = f"{f['generated_images']:,} generated against {f['real_images']:,} real training images{floor}{few}"
        rows.append((f"Fréchet distance, {name}", f"{f['distance']:.3f}", note))
    return rows
