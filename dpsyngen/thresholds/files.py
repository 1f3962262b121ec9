"""What ``dpsyngen stages`` writes and prints: tables, the picture, every number with its origin, thresholds as YAML."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dpsyngen.config import load_config
from dpsyngen.diffusion.stages import coarse_of
from dpsyngen.errors import printable
from dpsyngen.files import strict_text, write_atomically, write_text
from dpsyngen.thresholds.denoisers import PRIOR, PROXY, WIENER
from dpsyngen.thresholds.gap import HIGHEST, LOWEST, METHODS, SIDES, Array, Elbow
from dpsyngen.thresholds.search import Measured, StandInElbows, deciding
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
    measured: Measured
    found: Sequence[StandInElbows]  # of every student against every stand-in
    decided: StandInElbows  # the one of `found` that the thresholds are of
    private: Mapping[str, Any] | None = None  # what was spent on a DP estimate, and how

    @property
    def cleaning(self) -> Elbow:
        return self.decided.elbows["cleaning", self.settings["method"]]

    @property
    def reads_moments(self) -> bool:
        """Whether programs own by a prior and DP moments own the coarse stage."""
        return self.decided.student == PRIOR

    @property
    def coarse(self) -> Elbow:
        """Of the student, or of the Wiener filter where DP moments are to own the stage."""
        of = self.decided
        if self.reads_moments:
            of = deciding(self.found, WIENER)
        return of.elbows["coarse", self.settings["method"]]

    @property
    def variant(self) -> str:
        """The variant of the method in which programs own exactly the stages that were found."""
        if self.reads_moments:
            return "residual"
        found = [elbow.side for elbow in (self.cleaning, self.coarse) if elbow.log_sigma is not None]
        return "both" if len(found) == 2 else found[0] if found else "dpdm"

    def stages(self) -> dict[str, Any]:
        """What was found, in short."""
        return {
            "variant": self.variant,
            "tau_cleaning": self.cleaning.log_sigma,
            "tau_coarse": self.coarse.log_sigma,
            "method": self.settings["method"],
            "decided_by": self.decided.by,
            "student": self.decided.student,
        }


def write_results(folder: Path, result: StagesResult, given: Mapping[str, Any]) -> list[Path]:
    """Write all results into an existing folder and return the files; ``gap.json``, which marks it as finished, comes
    last.  `given` are the settings that the user gave, which ``stages.yaml`` keeps.
    """
    picture = folder / "gap.png"
    _draw(result, picture)
    rows, written = list(curve_rows(result)), io.StringIO()
    lines = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    for row in rows:
        for i in range(len(result.measured.log_sigma)):
            lines.writerow({k: f"{v[i]:.6g}" if isinstance(v, np.ndarray) else v for k, v in row.items()})
    texts = {"gap.csv": written.getvalue(), "stages.yaml": stages_yaml(result, given)}
    texts["gap.json"] = strict_text(
        {
            "dpsyngen": __version__,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "settings": dict(result.settings),
            "stages": result.stages(),
            "elbows": elbow_rows(result),
            "curves": [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows],
            "private": result.private,
        },
        indent=1,
    )
    for name, text in texts.items():
        write_text(folder / name, text)
    return [picture, *(folder / name for name in texts)]


# ---------------------------------------------------------------------------------------------- numbers


def curve_rows(result: StagesResult) -> Iterator[dict[str, Any]]:
    """Names and arrays, [M], of the curves of each student and stand-in, each with its 95 % interval."""
    u = result.measured.log_sigma
    for f in result.found:
        row = {"stand_in": f.by, "student": f.student, "log_sigma": u, "sigma": np.exp(u)}
        for name, estimate in (("relative_gap", f.mean.relative), ("excess", f.mean.excess)):
            low, high = estimate.band()
            row |= {name: estimate.curve, f"{name}_low": low, f"{name}_high": high}
        yield row


def elbow_rows(result: StagesResult) -> list[dict[str, Any]]:
    """Every elbow, with what stands in for the private images."""
    return [{"stand_in": f.by, "student": f.student, **asdict(e)} for f in result.found for e in f.elbows.values()]


def stages_yaml(result: StagesResult, given: Mapping[str, Any]) -> str:
    """Settings for ``dpsyngen train --config``: the user's own, with the variant and the thresholds that were found."""
    before = load_config(dict(given)).stages
    replaced = {"variant", "tau_cleaning", "tau_coarse"}
    section: dict[str, Any] = {k: v for k, v in given.get("stages", {}).items() if k not in replaced}
    section["variant"] = result.variant
    cleaning, coarse = result.cleaning.log_sigma, result.coarse.log_sigma
    known = coarse_of(result.variant, before.tau_coarse)
    if result.reads_moments:  # this variant has both stages: one that was not found lies beyond what is asked for
        cleaning, coarse = LOWEST if cleaning is None else cleaning, HIGHEST if coarse is None else coarse
    # A threshold that is not in use must still be on its side of the other one, or the file would be refused.
    if cleaning is not None:
        section["tau_cleaning"] = round(cleaning if coarse is None else min(cleaning, coarse - 0.1), 3)
        if coarse is None and cleaning >= known:
            section["tau_coarse"] = round(cleaning + 1, 3)
    if coarse is not None:
        section["tau_coarse"] = round(coarse, 3)
    low, high = section.get("tau_cleaning", before.tau_cleaning), section.get("tau_coarse", known)
    if low >= high:
        section["tau_cleaning"] = round(high - 1, 3)
    comment = [
        f"# Found by dpsyngen stages {__version__}; how is in gap.json beside this file.",
        f"# {result.decided.student} in place of {_IN_WORDS[result.decided.by]}, method {result.settings['method']}:",
        *(f"# {line}" for line in stage_lines(result)),
    ]
    if result.private is not None and not result.private["private"]:
        comment.insert(0, "# NOT PRIVATE: found on private images with reproducible noise, which no ε covers.")
    values = dict(given) | {"stages": section}
    return "\n".join(comment) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------------------------ words


def stage_lines(result: StagesResult) -> list[str]:
    """The two stages in words."""
    coarse = "DP moments" if result.reads_moments else "programs"
    return [_line(result.cleaning, "programs", "<"), _line(result.coarse, coarse, ">")]


def _line(elbow: Elbow, owner: str, relation: str) -> str:
    if elbow.log_sigma is None:
        return f"no {elbow.side} stage for {owner}: {elbow.reason}"
    interval = "" if elbow.low is None else f" [95 %: {elbow.low:.2f} to {elbow.high:.2f}]"
    line = f"{elbow.side}: {owner} own log σ {relation} {elbow.log_sigma:.2f}{interval}"
    if elbow.found < 0.95:
        line += f", but only {100 * elbow.found:.0f} % of the bootstrap's curves have such a stage"
    return line


def prior_line(result: StagesResult) -> str | None:
    """How the prior, shown the proxy's moments, denoises the proxy; None where that was not measured."""
    against = next((f for f in result.found if (f.student, f.by) == (PRIOR, WIENER)), None)
    if against is None:
        return None
    u, excess = result.measured.log_sigma, against.mean.excess.curve
    better, best = u[excess < 0], int(excess.argmin())
    words = "the prior, which programs trained, shown the proxy's moments: "
    if not len(better):
        return f"{words}at no noise level a better denoiser of the proxy than its Wiener filter"
    return (
        f"{words}a better denoiser of the proxy than its Wiener filter from log σ = {better[0]:.2f} to "
        f"{better[-1]:.2f}, with {1 + excess[best]:.2f} of its squared error at {u[best]:.2f}"
    )


def teacher_line(result: StagesResult) -> str | None:
    """Where the proxy's networks do not show what can be known of its images; None if there is no sign of that."""
    losses = {c.stand_in: c.squares()[1].mean(0) for c in result.measured.curves}
    behind = losses[PROXY] > losses[WIENER] if {PROXY, WIENER} <= losses.keys() else np.zeros(1, bool)
    if not behind.any():
        return None
    return (
        f"note: at {behind.sum()} of {len(behind)} noise levels the networks trained on the proxy are worse than its "
        "Wiener filter, so the gap to them is not the gap to the optimum; train longer (--steps), and see the rows "
        "in place of the Wiener filter"
    )


def table(result: StagesResult) -> str:
    """The thresholds of every family against every stand-in by both methods, as Markdown; a star marks what decides."""
    heads = ["programs of", "in place of"]
    heads += [f"τ_{side} by {'gap' if method == 'tolerance' else method}" for method in METHODS for side in SIDES]
    lines = [heads, ["---"] * len(heads)]
    for f in result.found:
        cells = [printable(f.student, 60) + (" \\*" if f is result.decided else ""), _IN_WORDS[f.by]]
        for e in (f.elbows[side, method] for method in METHODS for side in SIDES):
            interval = "" if e.low is None else f" ({e.low:.2f} to {e.high:.2f})"
            cells.append("none" if e.log_sigma is None else f"{e.log_sigma:.2f}{interval}")
        lines.append(cells)
    tolerance = f"{100 * result.settings['tolerance']:g} % of the teacher's loss"
    title = f"Thresholds in log σ (95 %) of a gap, and of an excess of the loss, of {tolerance}; \\* decides"
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines), ""])


# ---------------------------------------------------------------------------------------------- picture

_MAIN, _MARK, _SOFT = "#2a9d8f", "#d1495b", "#777"
_LINES = ("#4c72b0", "#dd8452", "#8172b3", "#937860", "#da8bc3", "#64b5cd", "#ccb974", "#8c8c8c")
_LOWEST = 3e-4


def _draw(result: StagesResult, path: Path) -> None:
    """Draw the gap by noise level with its thresholds, on white."""
    import matplotlib
    from matplotlib.figure import Figure

    u, decided, relative = result.measured.log_sigma, result.decided, result.decided.mean.relative
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(7, 5.4))
        panel: Any = figure.subplots()
        panel.set(yscale="log", xlim=(u[0], u[-1]), ylabel="gap of the denoisers, relative to the teacher's loss")
        panel.set_xlabel("noise level log σ   (clean image at the left, pure noise at the right)")
        panel.yaxis.set_major_formatter("{x:g}")  # by default a formula, which parse_math=False shows as it is
        panel.spines[["top", "right"]].set_visible(False)

        def draw(values: Array, label: str, **look: Any) -> None:
            panel.plot(u, np.maximum(values, _LOWEST / 10), label=label, **look)

        # The student against every stand-in, and the other students against the one that decides.
        others = [f for f in result.found if f is not decided and (f.student == decided.student or f.by == decided.by)]
        for f, colour in zip(others, _LINES * len(others), strict=False):
            style: Any = "-" if f.by == decided.by else (0, (4, 2))
            draw(f.mean.relative.curve, f"{f.student} in place of {_IN_WORDS[f.by]}", color=colour, lw=1.1, ls=style)
        panel.fill_between(u, *(np.maximum(b, _LOWEST / 10) for b in relative.band()), color=_MAIN, alpha=0.25, lw=0)
        draw(relative.curve, f"{decided.student} in place of {_IN_WORDS[decided.by]}, 95 % band", color=_MAIN, lw=2.2)
        if floors := [c.relative() for c in result.measured.of("floor") if c.student in (decided.student, PROXY)]:
            draw(np.concatenate(floors).mean(0), "another seed of the same (floor)", color=_SOFT, lw=1.2, ls=":")
        if result.settings["method"] == "tolerance":
            tolerance = result.settings["tolerance"]
            panel.axhline(tolerance, color="#333", lw=0.9, ls="--", label=f"tolerance {100 * tolerance:g} %")
        for e in (result.cleaning, result.coarse):
            if e.log_sigma is not None:
                panel.axvline(e.log_sigma, color=_MARK, lw=1.4)
                if e.low is not None:
                    panel.axvspan(e.low, e.high, color=_MARK, alpha=0.12, lw=0)
                place = {"xycoords": ("data", "axes fraction"), "ha": "right" if e.side == "cleaning" else "left"}
                panel.annotate(f"τ_{e.side} = {e.log_sigma:.2f}", (e.log_sigma, 1.02), color=_MARK, **place)
        panel.set_ylim(_LOWEST, None)
        panel.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
        # Without the version of matplotlib: equal results give equal files.
        how: dict[str, Any] = {"dpi": 130, "bbox_inches": "tight", "metadata": {"Software": None}}
        write_atomically(path, lambda p: figure.savefig(p, format="png", **how))
