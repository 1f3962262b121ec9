"""Pictures of the report, as inline SVG or PNG data, drawn by matplotlib without a display."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS = {"public": "#2a9d8f", "private": "#d1495b"}


def png_data(images: NDArray[np.uint8], columns: int, scale: int) -> str:
    """A grid of uint8 [N, C, H, W] as a ``data:`` URL."""
    from dpsyngen.programs import image_grid

    buffer = io.BytesIO()
    image_grid(images, columns, scale=scale).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    # No date and fixed ids: the same run gives the same file.
    with plt.rc_context({"svg.hashsalt": "dpsyngen"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#888")  # seen on white and on black
    return figure, axes


def stage_diagram(stages: list[dict[str, Any]], mean: float, std: float, sigma_min: float, sigma_max: float) -> str:
    """The log σ axis: which stage owns what, who trained it, and the density of training noise levels."""
    low, high = math.log(sigma_min) - 0.6, math.log(sigma_max) + 0.6
    figure, axes = _axes(8.0, 2.5)
    x = np.linspace(low, high, 600)
    density = np.exp(-0.5 * ((x - mean) / std) ** 2)
    for stage in stages:
        a = low if stage["log_sigma_low"] is None else stage["log_sigma_low"]
        b = high if stage["log_sigma_high"] is None else stage["log_sigma_high"]
        colour = COLOURS[stage["trained_by"]]
        inside = (x >= a) & (x <= b)
        axes.axvspan(a, b, color=colour, alpha=0.12, lw=0)
        axes.fill_between(x[inside], density[inside], color=colour, alpha=0.45, lw=0)
        who = "private images, DP-SGD" if stage["trained_by"] == "private" else "programs, no privacy cost"
        axes.text(
            (a + b) / 2, 1.12, stage["name"], ha="center", va="bottom", fontsize=10, fontweight="bold", color=colour
        )
        wide = b - a > 3.2
        axes.text(
            (a + b) / 2,
            1.02,
            who if wide else stage["trained_by"],
            ha="center",
            va="bottom",
            fontsize=8,
            color=colour,
        )
        if stage["log_sigma_low"] is not None:
            axes.axvline(a, color="#888", lw=1, ls="--")
            axes.text(a, -0.02, f"{a:g}", ha="center", va="top", fontsize=8, color="#888")
    axes.set_xlim(low, high)
    axes.set_ylim(0, 1.3)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    ticks = [s for s in (0.002, 0.01, 0.1, 1.0, 10.0, 80.0) if sigma_min <= s <= sigma_max]
    axes.set_xticks([math.log(t) for t in ticks], [f"σ = {t:g}" for t in ticks], fontsize=8, color="#888")
    axes.tick_params(axis="x", pad=12, length=0)
    axes.set_xlabel("log σ   (clean image on the left, pure noise on the right)", fontsize=9, color="#888")
    return _svg(figure)


def loss_curve(points: dict[str, list[tuple[int, float]]], colour: str) -> str:
    """Loss against step, one line a phase, with a running mean."""
    figure, axes = _axes(8.0, 2.6)
    for number, (phase, values) in enumerate(points.items()):
        steps, losses = (np.array(v, dtype=float) for v in zip(*values, strict=True))
        shade = 1.0 - 0.35 * (number % 3)
        axes.plot(steps, losses, color=colour, alpha=0.2 * shade, lw=0.8)
        width = max(1, len(losses) // 40)
        if len(losses) >= 2 * width:
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            axes.plot(steps[width - 1 :], smooth, color=colour, alpha=shade, lw=1.8, label=phase)
    axes.set_xlabel("step", fontsize=9, color="#888")
    axes.set_ylabel("loss", fontsize=9, color="#888")
    axes.tick_params(colors="#888", labelsize=8)
    axes.legend(frameon=False, fontsize=8, labelcolor="#888")
    return _svg(figure)
