"""Rules that say what is wrong with a training, from its losses, its private figures and the images that it draws.

A finding says what was seen, in numbers, why it matters and what to do.  Thresholds are justified where they stand.

Losses, norms and counts of examples come from private images.  Weights and generated images do not: they are
post-processing of the mechanism's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dpsyngen.training.private import DpSgd

Severity = Literal["error", "warning"]
Basis = Literal["private", "released"]


@dataclass(frozen=True)
class Finding:
    """One thing to know about a run.

    Attributes:
        code: a fixed name, for programs and for the documentation.
        severity: "error": the generator is no use, or will not be; "warning": it could be better, or part of it is
            broken.
        seen, why, change: what was seen, in numbers, why it matters, and what to change.
        basis: "private" if it rests on figures of private images: then neither it nor a setting that was chosen by it
            is covered by ε.  "released": it follows from released weights, settings and files.
    """

    code: str
    severity: Severity
    seen: str
    why: str
    change: str
    basis: Basis = "private"

    def to_dict(self) -> dict[str, str]:
        """JSON-able."""
        return asdict(self)


_CHOOSE_C = (
    "Choose C on public images, such as a named set or what `dpsyngen programs save` draws: a C that is chosen by this "
    "private norm is tuned on private images, which ε does not cover"
)
_LOWER = "lower the learning rate, {lower}, by a factor of 10 to begin with"

# Why each matters, and what to change.
_TEXTS = {
    "weights-not-finite": (
        "such a network draws nothing; training on would spend the rest of the budget for nothing",
        "start a new run with a much lower learning rate, {lower}: resuming repeats the same steps and ends here",
    ),
    "loss-not-finite": ("the network computed something that is no number", _LOWER + "; or begin with a warm-up"),
    "diverged": ("the steps led away from a denoiser: the generator is worse than an untrained one", _LOWER),
    "loss-exploded": (
        "the first steps threw the network far off; parts of it may never come back",
        _LOWER + ", or begin with a warm-up",
    ),
    "loss-rose": ("the last steps did harm: they were too large, or noise had taken over", _LOWER),
    "nothing-learned": (
        "the private images taught the network nothing that shows above the noise of the loss",
        "raise --lr (the presets use 3e-4 to 5e-3), take more --steps, and see whether noise or clipping is in the way",
    ),
    "few-steps": (
        "Adam needs tens of steps to begin with",
        "raise --steps (see `dpsyngen plan` for what that costs in noise)",
    ),
    "steps-vanish": (
        "Adam then divides by its ε, and the steps shrink to nothing",
        "raise --clip to between 0.1 and 1: noise grows with it, and Adam takes the scale out",
    ),
    "few-examples": (
        "the noise is for the expected batch, so the images drown in it",
        "declare a number of --records near the true one; raise --batch if it is small",
    ),
    "gradients-not-finite": (
        "those images taught nothing; where they are many, what is left is mostly noise",
        "lower --lr; if only a few images do it, they may be damaged",
    ),
    "nothing-clipped": ("the noise is made for C, many times what these gradients need", "lower --clip.  " + _CHOOSE_C),
    "noise-dominates": (
        "even if all images pulled in one direction in all steps, noise would pull as hard: a walk at random",
        "raise --batch first, then --epsilon; use a smaller --network; or {instead}.  More images help most",
    ),
    "blank-images": (
        "the network diverged, or never learned what the images look like",
        "lower --lr by a factor of 10; if the loss fell as it should, draw with lower guidance",
    ),
    "collapsed": (
        "the generator knows one image, or few, and repeats them",
        "lower --lr, draw with lower guidance, and see whether another finding says that the loss rose",
    ),
    "noise-images": (
        "the images are noise: the network removes too little of it (unless yours are meant to look like this)",
        "take more --steps, raise --lr if the loss is still falling, and see whether noise dominates",
    ),
    "classes-collapsed": (
        "such a class has one image, not a distribution",
        "draw with lower guidance (`dpsyngen sample --guidance 1`); lower --lr",
    ),
    "label-ignored": (
        "the generator does not use the class: labelled images from it teach a classifier nothing",
        "draw with guidance (--set sampling.guidance=2, which needs a network.label_dropout above 0 in training), take "
        "more --steps, or train --unconditional if classes do not matter",
    ),
}


def finding(
    code: str, severity: Severity, seen: str, basis: Basis = "private", also: str = "", **words: str
) -> Finding:
    """A finding with the text of its code, in which `words` are filled in; `also` is added to what to change."""
    why, change = _TEXTS[code]
    return Finding(code, severity, seen, why, change.format(**words) + also, basis)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first; within a severity the order stays."""
    return sorted(findings, key=lambda f: f.severity != "error")


# ------------------------------------------------------------------------------------------------ losses

UNTRAINED = 3.0
"""No untrained network has a larger loss.  With F = 0 the weighted loss at σ is (x₀²σ²/σ_d² + σ_d²)/(σ² + σ_d²), which
for pixels in [-1, 1] and σ_d² = 1/3 is at most 3 (black images at large σ).  A residual network has no such bound: with
F = 0 its loss is 1 if the images have the DP moments, and the larger the less they have."""


class Trend:
    """A loss curve, of three or more finite `losses`, in a few robust numbers; medians, as single steps are noisy."""

    def __init__(self, losses: NDArray[np.float64]) -> None:
        self.window = max(3, len(losses) // 10)  # steps, a tenth of the run
        windows = np.median(np.lib.stride_tricks.sliding_window_view(losses, self.window), axis=1)
        self.start = float(np.median(losses[:3]))
        self.early, self.end = float(windows[0]), float(windows[-1])
        self.best, self.worst = float(windows.min()), float(windows.max())
        # A normal distribution has standard deviation 1.4826 × median absolute deviation; a difference has √2 of it.
        step = 1.4826 * float(np.median(np.abs(np.diff(losses)))) / math.sqrt(2)
        self.error = 1.25 * step / math.sqrt(self.window)  # of `end`; 1.25: a median is less exact than a mean

    @property
    def learned(self) -> bool:
        """Whether the loss fell, by 2 % and by more than its noise."""
        first = self.error * math.sqrt(self.window / 3)  # of `start`
        return self.end < self.start - max(0.02 * self.start, 2 * math.hypot(first, self.error)) or (
            self.end < self.early - max(0.02 * self.early, 3 * self.error)
        )

    @property
    def rose(self) -> bool:
        """Whether it rose again, by 30 % of its best and by more than its noise: `best` is picked, hence 6 errors."""
        return self.end > self.best + max(0.3 * abs(self.best), 6 * self.error)


def of_losses(
    log: Sequence[dict[str, Any]], phase: str, lower: str, basis: Basis, residual: bool = False
) -> Iterator[Finding]:
    """Losses that are not finite, diverged or rose again, in the lines of a `log`; `lower` is the option to turn down.

    Of a `residual` on DP moments its own start takes the place of the bound for untrained networks.
    """
    at, losses = f"phase {phase!r}:", np.array([float(v["loss"]) for v in log])
    finite = np.isfinite(losses)
    bad, last = int((~finite).sum()), losses[-max(3, len(losses) // 10) :]
    if bad:
        broken = not np.isfinite(last).any() or bad > 0.05 * len(losses)
        seen = f"{at} the loss was NaN or infinite in {bad:,} of {len(losses):,} steps, from {np.argmin(finite) + 1:,}"
        yield finding("loss-not-finite", "error" if broken else "warning", seen, basis, lower=lower)
    if finite.sum() < 3:
        return
    t = Trend(losses[finite])
    untrained = t.start if residual else UNTRAINED
    known = f"an untrained network has {'' if residual else 'at most '}{untrained:.3g}"
    if t.end > 1.5 * untrained or (t.end > 1.5 * t.start and t.rose):
        seen = f"{at} the loss began at {t.start:.3g} and ended at {t.end:.3g} (best: {t.best:.3g}); {known}"
        also = ".  Too much noise does the same: raise --batch or --epsilon" if basis == "private" else ""
        yield finding("diverged", "error", seen, basis, also, lower=lower)
    elif t.worst > 1.5 * untrained:
        seen = f"{at} on the way the loss rose to {t.worst:.3g}, where {known}, and ended at {t.end:.3g}"
        yield finding("loss-exploded", "warning", seen, basis, lower=lower)
    elif len(losses) >= 20 and t.rose:
        seen = f"{at} the loss fell to {t.best:.3g} and rose again to {t.end:.3g}"
        also = ", use --set private.schedule=cosine, or fewer --steps" if basis == "private" else ""
        yield finding("loss-rose", "warning", seen, basis, also, lower=lower)


# -------------------------------------------------------------------------------------- private phase

_ADAM_EPS = 1e-8


@dataclass(frozen=True)
class Facts:
    """What the rules have to know of a run."""

    dp: DpSgd
    parameters: int  # d, trainable numbers; 0 if unknown
    pretrained: bool  # whether the private network started from programmatic images, or from the prior
    complete: bool  # whether all steps were taken
    residual: bool = False  # whether it is a residual on DP moments, which draw images without it


def of_private_training(log: Sequence[dict[str, Any]], facts: Facts) -> Iterator[Finding]:
    """Everything that the log of the private phase (``private/training.jsonl``) and its settings say."""
    yield from _of_settings(facts)
    if not log:
        return
    of_loss = list(of_losses(log, str(log[0]["phase"]), "--lr", "private", facts.residual))
    yield from of_loss
    losses = np.array([float(v["loss"]) for v in log])
    settled = losses[np.isfinite(losses)]
    if len(settled) >= 20 and not any(f.code in ("diverged", "loss-not-finite") for f in of_loss):
        t = Trend(settled)
        if not t.learned:
            begun = facts.pretrained or facts.residual  # then it may have been as good before
            yield finding(
                "nothing-learned",
                "error" if t.end > 0.98 * t.start and facts.complete and not begun else "warning",
                f"the loss began at {t.start:.3g} and was {t.end:.3g} at the end (standard error {t.error:.2g})",
                also="; variant gaussian spends all of ε on the moments" if facts.residual else "",
            )
    yield from _of_examples(log, facts.dp)
    if facts.dp.noise_multiplier:
        yield from _of_clipping(log, facts)


def _of_settings(f: Facts) -> Iterator[Finding]:
    """What is plain before any image is seen."""
    z, c, steps = f.dp.noise_multiplier, f.dp.clipping_norm, f.dp.config.steps
    if steps < (20 if f.pretrained else 50):
        yield finding("few-steps", "warning", f"the private phase has {steps:,} steps", "released")
    # Root mean square of a coordinate of the averaged gradient, at most: noise, and gradients that all have norm C.
    coordinate = c * math.hypot(z / f.dp.config.batch, 1 / math.sqrt(max(f.parameters, 1)))
    if z and coordinate < 10 * _ADAM_EPS:
        seen = f"a coordinate of the noisy gradient is {coordinate:.1e} at most, and Adam's ε is {_ADAM_EPS:g}"
        yield finding("steps-vanish", "error", f"with C = {c:g} {seen}", "released")


def _of_examples(log: Sequence[dict[str, Any]], dp: DpSgd) -> Iterator[Finding]:
    counts, batch = [int(v["examples"]) for v in log], dp.config.batch
    mean = sum(counts) / len(counts)
    if mean < 1 or (batch * len(counts) >= 50 and mean < 0.5 * batch):
        yield finding(
            "few-examples",
            "error" if mean < max(1.0, 0.05 * batch) else "warning",
            f"a step saw {mean:.3g} images on average, where {batch:,} were to be expected of {dp.records:,} records",
        )
    total, bad = sum(counts), sum(int(v["not_finite"]) for v in log)
    if bad:
        yield finding(
            "gradients-not-finite",
            "error" if bad > 0.1 * max(total, 1) else "warning",
            f"{bad:,} of {total:,} gradients of single images were NaN or infinite and counted as zero",
        )


def _of_clipping(log: Sequence[dict[str, Any]], f: Facts) -> Iterator[Finding]:
    """Clipping and noise, of a run with noise."""
    norm = float(np.median([float(v["median_norm"]) for v in log]))
    clipped = float(np.mean([float(v["clipped"]) for v in log]))
    z, c, steps = f.dp.noise_multiplier, f.dp.clipping_norm, f.dp.config.steps
    if f.dp.config.clipping == "automatic":
        shrink = norm / (norm + 0.01)  # γ of automatic clipping
    else:
        shrink = min(1.0, norm / c)
        if clipped < 0.01 and 0 < norm < c / 10:
            seen = f"{100 * clipped:.1f} % of the gradients were clipped at C = {c:g}; the median norm is {norm:.2g}"
            yield finding("nothing-clipped", "error" if norm < c / 1000 else "warning", seen)
    if f.parameters:
        mean = sum(int(v["examples"]) for v in log) / len(log)
        whole = mean * shrink / (z * math.sqrt(f.parameters)) * math.sqrt(steps)
        # At ε = 0.2 the published MNIST setting, which still learns, has 3.  Real gradients are far from parallel.
        if whole < 1:
            moments, programs = "spend all of ε on DP moments (--variant gaussian)", "start from programs (--pretrain)"
            yield finding(
                "noise-dominates",
                "error" if whole < 0.3 else "warning",
                f"a step adds noise of norm z·C·√d = {z * c * math.sqrt(f.parameters):.3g} to a sum of clipped "
                f"gradients of {mean * shrink * c:.3g} at most; over all {steps:,} steps the ratio of signal to noise "
                f"is {whole:.2g} at best",
                instead=moments if f.residual else programs,
            )


# --------------------------------------------------------------------------------------------- images

SAME = 0.02
"""Root mean square difference of pixels in [0, 1] below which two images are one: 5 of 255 grey levels, which the eye
does not tell apart.  Different digits or dead leaves are 0.1 to 0.6 apart."""

FLAT = 0.02
"""Standard deviation of the pixels of a blank image, by the same reasoning; digits and dead leaves have 0.2 to 0.4."""

SMOOTH = 0.15
"""Correlation of neighbouring pixels, median over images, below which they are noise.  White noise has 0; digits of 8×8
pixels have 0.6 (none below 0.4), dead leaves of 28×28 pixels 0.5."""

_PERMUTATIONS = 999


def of_images(
    images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None, class_names: Sequence[str] = ()
) -> list[Finding]:
    """What is wrong with generated images, uint8 [N, C, H, W], N ≥ 2 and not selected, as far as a few dozen show it.

    `labels` [N] has several images of each class; None: unconditional.
    """
    from scipy.spatial.distance import pdist, squareform

    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    apart = squareform(pdist(flat)) / math.sqrt(flat.shape[1])  # root mean square differences, [N, N]
    out = list(_of_pictures(images, flat, apart))
    if labels is not None and not any(f.severity == "error" for f in out):
        out += _of_classes(apart, labels, class_names)
    return out


def _of_pictures(images: NDArray[np.uint8], flat: NDArray[np.float64], apart: NDArray[np.float64]) -> Iterator[Finding]:
    blank = flat.std(1) < FLAT
    if blank.mean() > 0.1:
        level = float(flat[blank].mean())
        colour = "black" if level < 0.05 else "white" if level > 0.95 else "of one grey or colour"
        seen = f"{int(blank.sum())} of {len(images)} generated images are {colour} all over"
        yield finding("blank-images", "error" if blank.mean() > 0.5 else "warning", seen, "released")
    count = distinct(apart)
    typical = float(np.median(apart[np.triu_indices(len(images), 1)]))
    if count <= len(images) / 2 and blank.mean() <= 0.5:
        yield finding(
            "collapsed",
            "error" if typical < SAME or count <= len(images) / 10 else "warning",
            f"{len(images)} generated images show {count} different ones; half of the pairs differ by less than "
            f"{typical:.2g} (two images count as one below {SAME:g})",
            "released",
        )
    if not blank.all() and (correlation := neighbour_correlation(images[~blank])) < SMOOTH:
        seen = f"neighbouring pixels of generated images correlate by {correlation:.2f} (pictures: 0.4 and more)"
        yield finding("noise-images", "error", seen, "released")


def _of_classes(apart: NDArray[np.float64], labels: NDArray[np.int64], class_names: Sequence[str]) -> Iterator[Finding]:
    single, classes = [], np.unique(labels)
    for number in classes:
        rows = np.flatnonzero(labels == number)
        within = apart[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)]
        if len(within) and np.median(within) < SAME:
            single.append(class_names[number] if number < len(class_names) else str(number))
    if single:
        seen = f"the images of a class look all alike in {len(single)} of {len(classes)} classes: "
        severity: Severity = "error" if 2 * len(single) > len(classes) else "warning"
        yield finding("classes-collapsed", severity, seen + ", ".join(single[:10]), "released")
    ratio, p = label_effect(apart, labels)
    if p > 0.01:
        seen = f"images of different classes differ no more than images of one (pseudo-F = {ratio:.2f}, p = {p:.2g})"
        yield finding("label-ignored", "warning", seen, "released")


def distinct(apart: NDArray[np.float64]) -> int:
    """Images that are left if each one that is the same as an earlier one is taken away."""
    kept: list[int] = []
    for i in range(len(apart)):
        if (apart[i, kept] >= SAME).all():
            kept.append(i)
    return len(kept)


def neighbour_correlation(images: NDArray[np.uint8]) -> float:
    """Correlation of horizontal and vertical neighbours within an image, median over one or more images."""
    x = images.astype(np.float64)
    x = x - x.mean((2, 3), keepdims=True)
    variance = (x**2).mean((1, 2, 3))
    across = ((x[..., 1:] * x[..., :-1]).mean((1, 2, 3)) + (x[:, :, 1:] * x[:, :, :-1]).mean((1, 2, 3))) / 2
    return float(np.median(across / np.maximum(variance, 1e-12)))


def label_effect(apart: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Pseudo-F of distances between and within classes, and its permutation p (PERMANOVA, Anderson 2001)."""
    squares = apart**2
    n, classes = len(labels), len(np.unique(labels))
    if classes < 2 or n <= classes:
        return 1.0, 0.0  # nothing to compare, so nothing to report
    total = squares.sum() / (2 * n)

    def ratio(of: NDArray[np.int64]) -> float:
        same = of[:, None] == of[None]
        within = (squares * same / same.sum(1)[:, None]).sum() / 2
        return float(((total - within) / (classes - 1)) / max(within / (n - classes), 1e-300))

    seen = ratio(labels)
    rng = np.random.default_rng(0)  # of the permutations: the same run gives the same finding
    larger = sum(ratio(rng.permutation(labels)) >= seen for _ in range(_PERMUTATIONS))
    return seen, (1 + larger) / (1 + _PERMUTATIONS)
