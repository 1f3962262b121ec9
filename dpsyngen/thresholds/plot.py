"""The picture of ``dpsyngen stages``: the gap by noise level with its thresholds, and the losses on the proxy."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsyngen.files import write_atomically, write_text
from dpsyngen.thresholds.results import PROXY

if TYPE_CHECKING:
    from dpsyngen.thresholds.files import StagesResult

_COLOURS = {"public": "#2a9d8f", "private": "#d1495b"}
_LINES = ("#4c72b0", "#dd8452", "#8172b3", "#937860", "#da8bc3", "#64b5cd", "#ccb974", "#8c8c8c")
_IN_WORDS = {
    "programs": "other programs",
    "wiener": "the proxy's Wiener filter",
    "proxy": "the proxy",
    "private": "private images (DP)",
}
_LOWEST = 3e-4


def write_plot(folder: Path, result: StagesResult) -> list[Path]:
    """Write ``gap.svg`` and ``gap.png``, on white."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 2 if result.losses else 1
    with matplotlib.rc_context({"svg.hashsalt": "dpsyngen", "font.size": 9}):
        figure, axes = plt.subplots(1, panels, figsize=(6.4 * panels, 5.4), squeeze=False)
        _gap(axes[0][0], result)
        if result.losses:
            _losses(axes[0][1], result)
        for panel in axes[0]:
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
            panel.set_xlim(result.measured.log_sigma[0], result.measured.log_sigma[-1])
            panel.set_xlabel("noise level log σ   (clean image at the left, pure noise at the right)")
        figure.tight_layout()
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=130, metadata={"Software": None})
        plt.close(figure)
    write_text(folder / "gap.svg", re.sub(r"[ \t]+\n", "\n", svg.getvalue()))
    write_atomically(folder / "gap.png", lambda path: _save(path, png.getvalue()))
    return [folder / "gap.svg", folder / "gap.png"]


def _save(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _gap(panel: Any, result: StagesResult) -> None:
    u = result.measured.log_sigma
    decided = result.decided
    panel.set_yscale("log")
    # The student against every stand-in, and the other students against the one that decides.
    others = [f for f in result.found if f is not decided and (f.student == decided.student or f.by == decided.by)]
    for number, f in enumerate(others):
        colour = _LINES[number % len(_LINES)]
        style = "-" if f.by == decided.by else (0, (4, 2))
        panel.plot(u, _shown(f.mean.relative), color=colour, lw=1.1, ls=style, label=_label(f.student, f.by))
    main = _COLOURS["public"]
    panel.fill_between(u, *(_shown(b) for b in decided.band()), color=main, alpha=0.25, lw=0)
    label = f"{_label(decided.student, decided.by)}, 95 % band"
    panel.plot(u, _shown(decided.mean.relative), color=main, lw=2.2, label=label)
    floors = result.measured.floors
    if floors:
        floor = np.concatenate([c.relative() for c in floors if c.student in (decided.student, PROXY)]).mean(0)
        panel.plot(u, _shown(floor), color="#777", lw=1.2, ls=":", label="another seed of the same (floor)")
    tolerance = result.settings["tolerance"]
    if result.method == "tolerance":
        panel.axhline(tolerance, color="#333", lw=0.9, ls="--", label=f"tolerance {100 * tolerance:g} %")
    for elbow in (result.cleaning,) if result.moments else (result.cleaning, result.coarse):
        if elbow.log_sigma is None:
            continue
        panel.axvline(elbow.log_sigma, color=_COLOURS["private"], lw=1.4)
        if elbow.low is not None and elbow.high is not None:
            panel.axvspan(elbow.low, elbow.high, color=_COLOURS["private"], alpha=0.12, lw=0)
        left = elbow.side == "cleaning"
        panel.annotate(
            f"τ_{elbow.side} = {elbow.log_sigma:.2f}",
            (elbow.log_sigma, 1.02),
            xycoords=("data", "axes fraction"),
            ha="right" if left else "left",
            color=_COLOURS["private"],
        )
    panel.set_ylim(_LOWEST, None)
    panel.set_ylabel("gap of the denoisers, relative to the teacher's loss")
    _legend(panel)


def _legend(panel: Any) -> None:
    """Below, where no curve is."""
    panel.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _label(student: str, by: str) -> str:
    return f"{student} in place of {_IN_WORDS[by]}"


def _shown(values: Any) -> Any:
    return np.maximum(values, _LOWEST / 10)


def _losses(panel: Any, result: StagesResult) -> None:
    m = result.measured
    assert m.zero_loss is not None
    zero = m.zero_loss.mean(0)
    number = 0
    for name, losses in m.proxy_losses.items():
        curve = losses.mean((0, 1)) / zero
        if name == PROXY:
            panel.plot(m.log_sigma, curve, color="#222", lw=1.8, label="trained on the proxy itself")
            continue
        colour = _COLOURS["public"] if name == result.decided.student else _LINES[number % len(_LINES)]
        number += name != result.decided.student
        panel.plot(m.log_sigma, curve, color=colour, lw=1.6, label=f"trained on {name}")
    if m.wiener_loss is not None:
        panel.plot(m.log_sigma, m.wiener_loss.mean(0) / zero, color="#777", lw=1.2, ls=":", label="Wiener filter")
    panel.axhline(1, color="#333", lw=0.9, ls="--", label="knows mean and variance of the pixels only")
    panel.set_ylim(0, min(2.2, panel.get_ylim()[1]))
    panel.set_ylabel("loss on proxy images, relative")
    _legend(panel)
