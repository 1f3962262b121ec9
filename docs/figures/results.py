"""The pictures of docs/results.md and docs/quality.md, from finished experiments.

``python -m docs.figures.results runs/paper`` makes those of ``compare paper-small``; of ``compare fashion-mnist``,
or of half an hour (``preset: cpu``), where that is the experiment given.  Losses are from
`benchmarks/results/paper-small-losses.csv`, which `benchmarks/stage_losses.py` printed.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from dpsyngen.data import load_images
from dpsyngen.experiments.experiment import Experiment

DOCS = Path(__file__).parents[1]
LOSSES = DOCS.parent / "benchmarks/results/paper-small-losses.csv"
LINES = {
    "cleaning": ("#0b6e63", "-", "Cleaning"),
    "cleaning published-leaves": ("#0b6e63", "--", "Cleaning, published leaves"),
    "cleaning matched": ("#3b6fb5", "-", "Cleaning, matched"),
    "finetune": ("#8a5bb0", "-", "FineTune"),
    "coarse": ("#c4572b", "-", "Coarse"),
    "programs alone": ("#888888", "--", "programs alone"),
    "residual": ("#222222", "-", "Residual"),
}
ROWS = {
    **{"DPDM": "dpdm", "Gaussian": "gaussian"},
    **{"FineTune": "finetune", "Cleaning": "cleaning", "Cleaning, matched": "cleaning matched"},
    **{"Coarse": "coarse", "Both": "both", "Instant": "instant", "Residual": "residual"},
}


def losses() -> None:
    """Squared error over that of DPDM against log σ, a panel for each ε; bands are one standard deviation."""
    with open(LOSSES, encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    levels = [float(cell) for cell in head[3:]]
    epsilons = sorted({row[0] for row in rows}, key=float)
    figure, axes = plt.subplots(1, len(epsilons), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, epsilon in zip(axes, epsilons, strict=True):
        for name, (colour, style, label) in LINES.items():
            cells = next(row[3:] for row in rows if row[:2] == [epsilon, name])
            mean, spread = np.array([[float(part) for part in cell.split("±")] for cell in cells]).T
            axis.plot(levels, mean, color=colour, ls=style, label=label, lw=1.5)
            axis.fill_between(levels, mean - spread, mean + spread, color=colour, alpha=0.12, lw=0)
        axis.axhline(1, color="grey", lw=0.8)
        for tau in (-3, 2):
            axis.axvline(tau, color="grey", lw=0.8, ls=":")
        axis.set(yscale="log", ylim=(0.3, 4), title=f"ε = {epsilon}", xlabel="log σ")
        axis.set_yticks([0.4, 0.6, 0.8, 1, 1.5, 2, 3], ["0.4", "0.6", "0.8", "1", "1.5", "2", "3"])
        axis.minorticks_off()
    axes[0].set_ylabel("squared error over that of DPDM")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=7.5, frameon=False
    )
    figure.savefig(DOCS / "results-losses.png", dpi=110)


def samples(experiment: Experiment, epsilons: tuple[float, ...], file: str) -> None:
    """The first image of each class of the first seed, a row for each variant, and real test images above."""
    spec = experiment.spec
    real = load_images(spec.data.test or spec.data.train, resolution=spec.data.resolution)
    kept: dict[str, dict[float, Path]] = {}
    for title, row in ROWS.items():
        for job in experiment.jobs:
            if job.kind == "run" and job.seed == spec.grid.seeds[0] and f"{job.variant} {job.label}".strip() == row:
                kept.setdefault(title, {})[job.epsilon] = experiment.work_path(job) / "samples.npz"
    real_ones = real.batch(np.arange(len(real))), np.asarray(real.labels)
    figure, axes = plt.subplots(
        len(kept) + 1,
        len(epsilons),
        figsize=(4.6 * len(epsilons), 0.48 * (len(kept) + 1)),
        gridspec_kw={"wspace": 0.03, "hspace": 0.05},
    )
    for column, epsilon in enumerate(epsilons):
        for axis, title in zip(axes[:, column], ("real", *kept), strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if column == 0:
                axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
            images, labels = real_ones if title == "real" else drawn(kept[title][epsilon])
            first = [int(np.argmax(labels == k)) for k in range(len(real.class_names))]
            axis.imshow(np.concatenate(list(images[first, 0]), axis=1), cmap="gray", vmin=0, vmax=255)
        axes[0, column].set_title(f"ε = {epsilon:g}", fontsize=10)
    figure.savefig(DOCS / file, dpi=110, bbox_inches="tight")


def drawn(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, C, H, W] and their labels [N] that a run of an experiment drew."""
    with np.load(file) as kept:
        return kept["images"], kept["labels"]


if __name__ == "__main__":
    given = Experiment(Path(sys.argv[1]))
    if given.spec.preset == "cpu":
        samples(given, (0.2, 1.0, 10.0), "quality-half-hour.png")
    elif given.spec.baseline == "dpdm":
        losses()
        samples(given, (0.2, 10.0), "results-samples.png")
    else:
        samples(given, (0.2, 1.0, 10.0), "quality-samples.png")
