"""What ``dpsyngen stages`` writes and prints: tables, the picture, every number with its origin, thresholds as YAML."""

from __future__ import annotations

import csv
import io
import math
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dpsyngen.config import load_config
from dpsyngen.errors import printable
from dpsyngen.files import strict_text, write_bytes, write_text
from dpsyngen.thresholds.denoisers import PROXY, WIENER, ZERO
from dpsyngen.thresholds.gap import (
    METHODS,
    SIDES,
    Array,
    Elbow,
    GapCurve,
    Method,
    data_radius,
    kl_bound,
    price,
    price_density,
)
from dpsyngen.thresholds.private import PrivateCurve
from dpsyngen.thresholds.search import BINS, Loss, Measured, StandInElbows
from dpsyngen.version import __version__

_IN_WORDS = {
    "programs": "other programs",
    "wiener": "the proxy's Wiener filter",
    "proxy": "the proxy",
    "private": "private images (DP)",
}


@dataclass(frozen=True)
class StagesResult:
    """All that a call found."""

    settings: Mapping[str, Any]  # all that decides the figures, JSON-able
    networks: Sequence[Mapping[str, Any]]  # of each network its family, seed and file
    measured: Measured
    found: Sequence[StandInElbows]  # of every student against every stand-in
    decided: StandInElbows  # the one of `found` that the thresholds are of
    method: Method  # of the elbow
    losses: Sequence[Loss]  # of the families on the proxy
    private: tuple[PrivateCurve, Mapping[str, Any]] | None = None  # the DP estimate and its statement
    moments: bool = False  # whether DP moments of the private images are to own the coarse stage

    @property
    def cleaning(self) -> Elbow:
        return self.decided.elbows["cleaning", self.method]

    @property
    def coarse(self) -> Elbow:
        return self.decided.elbows["coarse", self.method]

    @property
    def variant(self) -> str:
        """The variant of the method in which programs own exactly the stages that were found; with `moments`, those of
        the private images own the coarse one.
        """
        if self.moments:
            return "residual" if self.cleaning.log_sigma is None else "residual-cleaning"
        found = [elbow.side for elbow in (self.cleaning, self.coarse) if elbow.log_sigma is not None]
        return "both" if len(found) == 2 else found[0] if found else "dpdm"


def write_results(folder: Path, result: StagesResult, given: Mapping[str, Any]) -> list[Path]:
    """Write all results into an existing folder; ``gap.json``, which marks it as finished, comes last.

    Args:
        folder: see :mod:`dpsyngen.thresholds.run`.
        result: what was found.
        given: settings that the user gave, which ``stages.yaml`` keeps.

    Returns:
        the files, in this order.
    """
    svg, png = _picture(result)
    write_bytes(folder / "gap.png", png)
    texts = {"gap.svg": svg, "gap.csv": gap_csv(result)}
    if result.losses:
        texts["proxy_loss.csv"] = _csv(list(asdict(result.losses[0])), map(asdict, result.losses))
    texts["stages.yaml"] = stages_yaml(result, given)
    texts["gap.json"] = strict_text(document(result), indent=1) + "\n"
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in ("gap.png", *texts)]


# ---------------------------------------------------------------------------------------------- numbers

_FIGURES = ("relative_gap", "excess", "gap", "teacher_loss", "student_loss")
_COLUMNS = (
    *("stand_in", "images", "teacher", "student", "seed", "log_sigma", "sigma", "relative_gap", "low", "high"),
    *("excess", "gap", "teacher_loss", "student_loss", "nats_per_log_sigma"),
)


def _figures(curve: GapCurve | PrivateCurve) -> dict[str, Array]:
    """The figures of a curve, each [S, M]."""
    means = [curve.gap, curve.teacher_loss, curve.student_loss]
    if isinstance(curve, GapCurve):
        means = [v.mean(1) for v in means]
    return dict(zip(_FIGURES, map(np.atleast_2d, (curve.relative(), curve.excess(), *means)), strict=True))


def _named(curve: GapCurve) -> dict[str, str]:
    return {"images": curve.images, "teacher": curve.teacher, "student": curve.student}


def gap_csv(result: StagesResult) -> str:
    """All curves, a line a level: of each seed, and for each student and stand-in the mean with its 95 % interval."""
    return _csv(_COLUMNS, _lines(result))


def _lines(result: StagesResult) -> Iterator[dict[str, Any]]:
    m = result.measured
    curves: list[tuple[dict[str, Any], GapCurve | PrivateCurve]] = [
        ({"stand_in": by} | _named(c), c) for by, of_it in m.curves.items() for c in of_it
    ]
    if result.private is not None:
        names = {k: result.settings[k] for k in ("teacher", "student")}
        curves.append(({"stand_in": "private", "images": "private"} | names, result.private[0]))
    for names, curve in curves:
        figures = _figures(curve)
        figures["nats_per_log_sigma"] = price_density(m.log_sigma, m.pixels * figures["gap"])
        for seed in range(len(figures["gap"])):
            yield from _levels(m.log_sigma, names | {"seed": seed}, {k: v[seed] for k, v in figures.items()})
    for f in result.found:
        low, high = f.mean.band()
        figures = {"relative_gap": f.mean.relative, "low": low, "high": high, "excess": f.mean.excess}
        yield from _levels(m.log_sigma, {"stand_in": f.by, "student": f.student, "seed": "mean"}, figures)


def _levels(log_sigma: Array, names: dict[str, Any], figures: Mapping[str, Array]) -> Iterator[dict[str, Any]]:
    for i, u in enumerate(log_sigma):
        yield names | {"log_sigma": u, "sigma": math.exp(u)} | {k: v[i] for k, v in figures.items()}


def _csv(columns: Sequence[str], rows: Any) -> str:
    out = io.StringIO()
    lines = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    lines.writeheader()
    lines.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return out.getvalue()


def document(result: StagesResult) -> dict[str, Any]:
    """Everything, for programs; each number with the settings, seeds and versions it came from."""
    import torch

    m, tau = result.measured, result.coarse.log_sigma
    radius = data_radius(m.pixels)
    return {
        "dpsyngen": __version__,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "settings": dict(result.settings),
        "networks": list(result.networks),
        "stages": {
            "variant": result.variant,
            "tau_cleaning": result.cleaning.log_sigma,
            "tau_coarse": None if result.moments else result.coarse.log_sigma,
            "method": result.method,
            "decided_by": result.decided.by,
            "student": result.decided.student,
        },
        "elbows": elbow_rows(result),
        # The worst case that the data range allows, beside what was measured.
        "theory": {
            "radius": radius,
            "largest_w2": 2 * radius,
            "kl_bound_at_tau_coarse": None if tau is None else kl_bound(2 * radius, math.exp(tau)),
            "kl_bound_at_80": kl_bound(2 * radius, 80.0),
        },
        "log_sigma": m.log_sigma.tolist(),
        "pixels": m.pixels,
        "curves": [
            {"stand_in": by} | _named(c) | {k: v.tolist() for k, v in _figures(c).items()}
            for by, of_it in m.curves.items()
            for c in of_it
        ],
        "means": [
            {
                "stand_in": f.by,
                "student": f.student,
                "relative_gap": f.mean.relative.tolist(),
                "relative_gap_95": [b.tolist() for b in f.mean.band()],
                "excess": f.mean.excess.tolist(),
                "excess_95": [b.tolist() for b in f.mean.band(excess=True)],
            }
            for f in result.found
        ],
        "proxy_loss": [asdict(loss) for loss in result.losses],
        "proxy_loss_by_level": {k: v.mean((0, 1)).tolist() for k, v in m.proxy_losses.items()} or None,
        "private": None if result.private is None else result.private[0].to_dict() | dict(result.private[1]),
    }


def elbow_rows(result: StagesResult) -> list[dict[str, Any]]:
    """Every elbow, with what stands in for the private images and what the stage would cost in nats."""
    rows = []
    for f in result.found:
        if f.by == "private":
            gap = None if result.private is None else np.maximum(result.private[0].gap, 0)
        else:
            mine = [c.gap.mean(1) for c in result.measured.curves[f.by] if c.student == f.student]
            gap = np.concatenate(mine).mean(0)
        for e in f.elbows.values():
            nats = None if e.log_sigma is None or gap is None else stage_price(result.measured, gap, e)
            rows.append({"stand_in": f.by, "student": f.student, **asdict(e), "price_nats": nats})
    return rows


def stage_price(measured: Measured, gap: Array, elbow: Elbow) -> float:
    """∫ G/σ² d log σ over the stage, as far as the grid goes; see :func:`dpsyngen.thresholds.gap.price`."""
    u, tau = measured.log_sigma, elbow.log_sigma
    assert tau is not None
    inside = u < tau if elbow.side == "cleaning" else u > tau
    order = np.argsort(np.append(u[inside], tau))
    at_tau = math.exp(np.interp(tau, u, np.log(np.maximum(gap, 1e-30))))
    return price(np.append(u[inside], tau)[order], measured.pixels * np.append(gap[inside], at_tau)[order])


# ------------------------------------------------------------------------------------------------- YAML


def stages_yaml(result: StagesResult, given: Mapping[str, Any]) -> str:
    """Settings for ``dpsyngen train --config``: the user's own, with the program and the stages that were found."""
    comment = [
        f"# Found by dpsyngen stages {__version__}; how is in gap.json beside this file.",
        f"# {result.decided.student} in place of {_IN_WORDS[result.decided.by]}, method {result.method}:",
        *(f"# {line}" for line in stage_lines(result)),
    ]
    values = dict(given) | {"stages": _stages(result, given)}
    return "\n".join(comment) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _stages(result: StagesResult, given: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``stages``: what the user set, with the variant and the thresholds that were found."""
    before = load_config(dict(given)).stages
    replaced = {"variant", "tau_cleaning"} if result.moments else {"variant", "tau_cleaning", "tau_coarse"}
    section: dict[str, Any] = {k: v for k, v in given.get("stages", {}).items() if k not in replaced}
    section["variant"] = result.variant
    cleaning = result.cleaning.log_sigma
    coarse = before.tau_coarse if result.moments else result.coarse.log_sigma
    # A threshold that is not in use must still be on its side of the other one, or the file would be refused.
    if cleaning is not None:
        section["tau_cleaning"] = round(cleaning if coarse is None else min(cleaning, coarse - 0.1), 3)
        if coarse is None and cleaning >= before.tau_coarse:
            section["tau_coarse"] = round(cleaning + 1, 3)
    if coarse is not None and not result.moments:
        section["tau_coarse"] = round(coarse, 3)
    low, high = (section.get(k, getattr(before, k)) for k in ("tau_cleaning", "tau_coarse"))
    if low >= high:
        section["tau_cleaning"] = round(high - 1, 3)
    return section


# ------------------------------------------------------------------------------------------------ words


def stage_lines(result: StagesResult) -> list[str]:
    """The two stages in words."""
    out = [_line(result.cleaning, "<")]
    if not result.moments:
        return [*out, _line(result.coarse, ">")]
    if result.decided.by != WIENER:
        out.append(
            "note: the training has DP moments of the private images, and nothing here shows where programs are better "
            "than what follows from those; with --proxy their Wiener filter is the one to compare with"
        )
    return [*out, f"coarse: owned by DP moments of the private images (variant {result.variant})"]


def _line(elbow: Elbow, relation: str) -> str:
    if elbow.log_sigma is None:
        return f"no {elbow.side} stage for programs: {elbow.reason}"
    interval = "" if elbow.low is None else f" [95 %: {elbow.low:.2f} to {elbow.high:.2f}]"
    line = f"{elbow.side}: programs own log σ {relation} {elbow.log_sigma:.2f}{interval}"
    if elbow.found < 0.95:
        line += f", but only {100 * elbow.found:.0f} % of the bootstrap's curves have such a stage"
    return line


def teacher_line(result: StagesResult) -> str | None:
    """Where the proxy's networks do not show what can be known of its images; None if there is no sign of that."""
    losses = result.measured.proxy_losses
    if WIENER not in losses:
        return None
    behind = losses[PROXY].mean((0, 1)) > losses[WIENER].mean((0, 1))
    if not behind.any():
        return None
    return (
        f"note: at {behind.sum()} of {len(behind)} noise levels the networks trained on the proxy are worse than its "
        "Wiener filter, so the gap to them is not the gap to the optimum; train longer (--steps), and see the rows "
        "in place of the Wiener filter"
    )


def tables(result: StagesResult) -> Iterator[str]:
    """For the terminal: the thresholds of every family against every stand-in by all methods, the ones that decide
    starred; and with a proxy, how well each family denoises it, over the zero-information predictor.
    """
    methods = {"tolerance": "gap", "loss": "loss", "kneedle": "Kneedle"}
    heads = ["programs of", "in place of", *(f"τ_{side}\nby {methods[m]}" for m in METHODS for side in SIDES)]
    rows = []
    for f in result.found:
        cells = [_threshold(f.elbows[side, method]) for method in METHODS for side in SIDES]
        rows.append([printable(f.student, 60) + (" *" if f is result.decided else ""), _IN_WORDS[f.by], *cells])
    tolerance = f"{100 * result.settings['tolerance']:g} % of the teacher's loss"
    yield _drawn(
        f"Thresholds in log σ [95 %] of a gap, and of an excess of the loss, of {tolerance}; * decides", heads, rows
    )
    if result.losses:
        pieces = [name for name, _, _ in BINS if any(loss.log_sigma == name for loss in result.losses)]
        names = {PROXY: "(the proxy itself)", WIENER: "(Wiener filter)"}
        by_family: dict[str, list[str]] = {}
        for c in result.losses:
            text = f"{c.over_zero:.3f} [{c.over_zero_low:.3f}, {c.over_zero_high:.3f}]"
            by_family.setdefault(c.family, [names.get(c.family, printable(c.family, 60))]).append(text)
        yield _drawn(
            "Loss on the proxy over that of a predictor that knows mean and variance only [95 %], by log σ",
            ["trained on", *pieces],
            list(by_family.values()),
        )


def _threshold(elbow: Elbow) -> str:
    if elbow.log_sigma is None:
        return "none"
    return f"{elbow.log_sigma:.2f}" + ("" if elbow.low is None else f" [{elbow.low:.2f}, {elbow.high:.2f}]")


def _drawn(title: str, heads: list[str], rows: list[list[str]]) -> str:
    from rich.console import Console as RichConsole
    from rich.table import Table as RichTable
    from rich.text import Text

    terminal = sys.stdout.isatty()
    buffer = io.StringIO()
    # A file has no width: lines must not be cut.
    width = None if terminal else 400
    rich = RichConsole(file=buffer, force_terminal=terminal, width=width, highlight=False, emoji=False)
    table = RichTable(title=Text(title), title_justify="left", title_style="bold")
    for number, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if number < 1 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    rich.print(table)
    return buffer.getvalue().rstrip("\n")


# ---------------------------------------------------------------------------------------------- picture

_MAIN, _MARK, _SOFT = "#2a9d8f", "#d1495b", "#777"
_LINES = ("#4c72b0", "#dd8452", "#8172b3", "#937860", "#da8bc3", "#64b5cd", "#ccb974", "#8c8c8c")
_LOWEST = 3e-4


def _picture(result: StagesResult) -> tuple[str, bytes]:
    """The gap by noise level with its thresholds, and the losses on the proxy, on white: SVG and PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = 2 if result.losses else 1
    # A fixed salt and no date: equal results give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "dpsyngen", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(6.4 * panels, 5.4))
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_gap(axes[0], result)
        if result.losses:
            _draw_losses(axes[1], result)
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xlim(result.measured.log_sigma[0], result.measured.log_sigma[-1])
            panel.set_xlabel("noise level log σ   (clean image at the left, pure noise at the right)")
            panel.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
        figure.tight_layout()
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=130, metadata={"Software": None})
    return re.sub(r"[ \t]+\n", "\n", svg.getvalue()), png.getvalue()


def _draw_gap(panel: Any, result: StagesResult) -> None:
    u, decided = result.measured.log_sigma, result.decided

    def draw(values: Array, label: str, **look: Any) -> None:
        panel.plot(u, np.maximum(values, _LOWEST / 10), label=label, **look)

    panel.set_yscale("log")
    # The student against every stand-in, and the other students against the one that decides.
    others = [f for f in result.found if f is not decided and (f.student == decided.student or f.by == decided.by)]
    for number, f in enumerate(others):
        style: Any = "-" if f.by == decided.by else (0, (4, 2))
        label = f"{f.student} in place of {_IN_WORDS[f.by]}"
        draw(f.mean.relative, label, color=_LINES[number % len(_LINES)], lw=1.1, ls=style)
    panel.fill_between(u, *(np.maximum(b, _LOWEST / 10) for b in decided.mean.band()), color=_MAIN, alpha=0.25, lw=0)
    label = f"{decided.student} in place of {_IN_WORDS[decided.by]}, 95 % band"
    draw(decided.mean.relative, label, color=_MAIN, lw=2.2)
    if floors := [c for c in result.measured.curves["floor"] if c.student in (decided.student, PROXY)]:
        floor = np.concatenate([c.relative() for c in floors]).mean(0)
        draw(floor, "another seed of the same (floor)", color=_SOFT, lw=1.2, ls=":")
    if result.method == "tolerance":
        tolerance = result.settings["tolerance"]
        panel.axhline(tolerance, color="#333", lw=0.9, ls="--", label=f"tolerance {100 * tolerance:g} %")
    for e in (result.cleaning,) if result.moments else (result.cleaning, result.coarse):
        if e.log_sigma is None:
            continue
        panel.axvline(e.log_sigma, color=_MARK, lw=1.4)
        if e.low is not None and e.high is not None:
            panel.axvspan(e.low, e.high, color=_MARK, alpha=0.12, lw=0)
        side = "right" if e.side == "cleaning" else "left"
        place = {"xycoords": ("data", "axes fraction"), "ha": side, "color": _MARK}
        panel.annotate(f"τ_{e.side} = {e.log_sigma:.2f}", (e.log_sigma, 1.02), **place)
    panel.set_ylim(_LOWEST, None)
    panel.set_ylabel("gap of the denoisers, relative to the teacher's loss")


def _draw_losses(panel: Any, result: StagesResult) -> None:
    losses = {name: values.mean((0, 1)) for name, values in result.measured.proxy_losses.items()}
    zero, colours = losses.pop(ZERO), iter(_LINES * len(losses))
    for name, loss in losses.items():
        label, look = f"trained on {name}", {"color": _MAIN, "lw": 1.6}
        if name == PROXY:
            label, look = "trained on the proxy itself", {"color": "#222", "lw": 1.8}
        elif name == WIENER:
            label, look = "Wiener filter", {"color": _SOFT, "lw": 1.2, "ls": ":"}
        elif name != result.decided.student:
            look["color"] = next(colours)
        panel.plot(result.measured.log_sigma, loss / zero, label=label, **look)
    panel.axhline(1, color="#333", lw=0.9, ls="--", label="knows mean and variance of the pixels only")
    panel.set_ylim(0, min(2.2, panel.get_ylim()[1]))
    panel.set_ylabel("loss on proxy images, relative")
