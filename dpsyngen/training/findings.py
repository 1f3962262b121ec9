"""Rules that say what is wrong with a training, from its losses and its private figures.

A finding says what was seen, in numbers, why it matters and what to do.  Thresholds are justified where they stand.

Losses, norms and counts of examples come from private images.  Weights and generated images do not: they are
post-processing of the mechanism's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial, wraps
from typing import Any, Literal, ParamSpec, get_args

import numpy as np
from numpy.typing import NDArray

_P = ParamSpec("_P")
Severity = Literal["error", "warning", "note"]
Basis = Literal["private", "released"]


@dataclass(frozen=True)
class Finding:
    """One thing to know about a run.

    Attributes:
        code: a fixed name, for programs and for the documentation.
        severity: "error": the generator is no use, or will not be; "warning": it could be better, or part of it is
            broken; "note": nothing to do.
        seen: what was seen, in numbers.
        why: why it matters.
        change: what to change.
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


released = partial(Finding, basis="released")


def listed(rule: Callable[_P, Iterator[Finding]]) -> Callable[_P, list[Finding]]:
    """A rule that yields findings, as a function that returns all of them."""

    @wraps(rule)
    def found(*arguments: _P.args, **options: _P.kwargs) -> list[Finding]:
        return list(rule(*arguments, **options))

    return found


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first; within a severity the order stays."""
    order = get_args(Severity)
    return sorted(findings, key=lambda f: order.index(f.severity))


# ------------------------------------------------------------------------------------------------ losses

UNTRAINED = 3.0
"""No untrained network has a larger loss.  With F = 0 the weighted loss at σ is (x₀²σ²/σ_d² + σ_d²)/(σ² + σ_d²), which
for pixels in [-1, 1] and σ_d² = 1/3 is at most 3 (black images at large σ).  A residual network has no such bound: with
F = 0 its loss is 1 if the images have the DP moments, and the larger the less they have."""


@dataclass(frozen=True)
class Trend:
    """A loss curve in a few robust numbers; medians, as single steps are noisy.

    Attributes:
        start: of the first three steps.
        early: of the first window.
        best, worst: lowest and highest of any window of `window` steps.
        end: of the last window.
        error: standard error of `end`, from the differences of neighbouring steps.
        window: steps, a tenth of the run.
    """

    start: float
    early: float
    best: float
    worst: float
    end: float
    error: float
    window: int

    @classmethod
    def of(cls, losses: NDArray[np.float64]) -> Trend:
        """Of at least three finite losses."""
        window = max(3, len(losses) // 10)
        windows = np.median(np.lib.stride_tricks.sliding_window_view(losses, window), axis=1)
        # A normal distribution has standard deviation 1.4826 × median absolute deviation; a difference has √2 of it.
        step = 1.4826 * float(np.median(np.abs(np.diff(losses)))) / math.sqrt(2)
        return cls(
            float(np.median(losses[:3])),
            float(windows[0]),
            float(windows.min()),
            float(windows.max()),
            float(windows[-1]),
            1.25 * step / math.sqrt(window),  # 1.25: a median is that much less exact than a mean
            window,
        )

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


@listed
def of_losses(
    log: Sequence[dict[str, Any]], phase: str, lower: str, basis: Basis, residual: bool = False
) -> Iterator[Finding]:
    """Losses that are not finite, diverged or rose again.

    Args:
        log: lines with "loss", in order.
        phase: its name, for the text.
        lower: the option that sets the learning rate.
        basis: what the losses are of.
        residual: whether the network is a residual on DP moments: what it had at the start takes the place of the bound
            for untrained networks.
    """
    losses = np.array([float(v["loss"]) for v in log])
    finite = np.isfinite(losses)
    bad, last = int((~finite).sum()), losses[-max(3, len(losses) // 10) :]
    if bad:
        broken = not np.isfinite(last).any() or bad > 0.05 * len(losses)
        yield Finding(
            "loss-not-finite",
            "error" if broken else "warning",
            f"phase {phase!r}: the loss was NaN or infinite in {bad:,} of {len(losses):,} steps, the first of them "
            f"step {int(np.argmin(finite)) + 1:,}",
            "the network computed something that is no number" + (", to the end" if broken else ", and recovered"),
            f"lower the learning rate, {lower}, by a factor of 10 to begin with; or begin with a warm-up",
            basis,
        )
    if finite.sum() < 3:
        return
    t = Trend.of(losses[finite])
    untrained = t.start if residual else UNTRAINED
    known = f"an untrained network has {'' if residual else 'at most '}{untrained:.3g}"
    if t.end > 1.5 * untrained or (t.end > 1.5 * t.start and t.rose):
        yield Finding(
            "diverged",
            "error",
            f"phase {phase!r}: the loss began at {t.start:.3g} and ended at {t.end:.3g} (best: {t.best:.3g}); {known}",
            "the steps led away from a denoiser: the generator is worse than an untrained one",
            f"lower the learning rate, {lower}, by a factor of 10 to begin with"
            + (".  Too much noise does the same: raise --batch or --epsilon" if basis == "private" else ""),
            basis,
        )
    elif t.worst > 1.5 * untrained:
        yield Finding(
            "loss-exploded",
            "warning",
            f"phase {phase!r}: on the way the loss rose to {t.worst:.3g}, where {known}, and ended at {t.end:.3g}",
            "the first steps threw the network far off; parts of it may never come back",
            f"lower the learning rate, {lower}, by a factor of 10 to begin with, or begin with a warm-up",
            basis,
        )
    elif len(losses) >= 20 and t.rose:
        yield Finding(
            "loss-rose",
            "warning",
            f"phase {phase!r}: the loss fell to {t.best:.3g} and rose again to {t.end:.3g}",
            "the last steps did harm: they were too large, or noise had taken over",
            f"lower the learning rate, {lower}"
            + (", use --set private.schedule=cosine, or fewer --steps" if basis == "private" else ""),
            basis,
        )


# -------------------------------------------------------------------------------------- private phase

_ADAM_EPS = 1e-8

_CHOOSE_C = (
    "Choose C on public images, such as a named set or what `dpsyngen programs save` draws: a C that is chosen by this "
    "private norm is tuned on private images, which ε does not cover"
)


@dataclass(frozen=True)
class Facts:
    """What the rules have to know of the settings.

    Attributes:
        steps, batch, records: planned steps, expected batch, declared number of records.
        noise_multiplier: z; 0 without privacy.
        clipping_norm, clipping: C and the style.
        ema: decay of the moving average of the private phase.
        parameters: d, trainable numbers; 0 if unknown.
        pretrained: whether the private network started from programmatic images.
        residual: whether it is a residual on DP moments, which draw images without it.
        complete: whether all steps were taken.
    """

    steps: int
    batch: int
    records: int
    noise_multiplier: float
    clipping_norm: float
    clipping: str
    ema: float
    parameters: int
    pretrained: bool
    complete: bool
    residual: bool = False


@listed
def of_private_training(log: Sequence[dict[str, Any]], facts: Facts) -> Iterator[Finding]:
    """Everything that the log of the private phase and its settings say.

    Args:
        log: lines of ``private/training.jsonl``.
        facts: the settings.
    """
    yield from of_settings(facts)
    if not log:
        return
    of_loss = of_losses(log, str(log[0]["phase"]), "--lr", "private", facts.residual)
    yield from of_loss
    losses = np.array([float(v["loss"]) for v in log])
    settled = losses[np.isfinite(losses)]
    if len(settled) >= 20 and not any(f.code in ("diverged", "loss-not-finite") for f in of_loss):
        t = Trend.of(settled)
        if not t.learned:
            begun = facts.pretrained or facts.residual
            beside = "; after pre-training that may be so" if facts.pretrained else ""
            if facts.residual:
                beside = ", beyond what the DP moments say: the generator is little more than these"
            yield Finding(
                "nothing-learned",
                "error" if t.end > 0.98 * t.start and facts.complete and not begun else "warning",
                f"the loss began at {t.start:.3g} and was {t.end:.3g} at the end (standard error {t.error:.2g})",
                f"the private images taught the network nothing that shows above the noise of the loss{beside}",
                "raise --lr (the presets use 1e-3 to 1e-2), take more --steps, and see whether another finding "
                "says that noise or clipping is in the way"
                + ("; variant gaussian spends all of ε on the moments" if facts.residual else ""),
            )
    yield from _of_examples(log, facts)
    if facts.noise_multiplier:
        yield from _of_clipping(log, facts)


@listed
def of_settings(f: Facts) -> Iterator[Finding]:
    """What is plain before any image is seen."""
    if f.steps < 50:
        yield released(
            "few-steps",
            "warning",
            f"the private phase has {f.steps:,} steps",
            "Adam needs tens of steps to begin with; the presets take 200 and more",
            "raise --steps (see `dpsyngen plan` for what that costs in noise)",
        )
    epochs = f.steps * f.batch / f.records
    if epochs < 1:
        yield released(
            "few-epochs",
            "warning",
            f"{f.steps:,} steps of {f.batch:,} images see an image {epochs:.2g} times on average; "
            f"{100 * (1 - f.batch / f.records) ** f.steps:.0f} % of the images are never used",
            "most of the images add nothing",
            "raise --batch first (less noise an image), then --steps",
        )
    # Root mean square of a coordinate of the averaged gradient, at most: noise, and gradients that all have norm C.
    coordinate = f.clipping_norm * math.hypot(f.noise_multiplier / f.batch, 1 / math.sqrt(max(f.parameters, 1)))
    if f.noise_multiplier and coordinate < 10 * _ADAM_EPS:
        yield released(
            "steps-vanish",
            "error",
            f"with C = {f.clipping_norm:g} a coordinate of the noisy gradient is {coordinate:.1e} at most, and "
            f"Adam's ε is {_ADAM_EPS:g}",
            "Adam then divides by its ε, and the steps shrink to nothing",
            "raise --clip to between 0.1 and 1: noise grows with it, and Adam takes the scale out",
        )
    if f.ema and 1 / (1 - f.ema) > f.steps:
        yield released(
            "ema-longer-than-run",
            "note",
            f"the moving average spans {1 / (1 - f.ema):,.0f} steps (ema {f.ema:g}), the run {f.steps:,}",
            f"its warm-up shortens it to about {max(1.0, (10 + f.steps) / 9):,.0f} steps at the end, so the random "
            "start does not linger",
            "nothing",
        )


def _of_examples(log: Sequence[dict[str, Any]], f: Facts) -> Iterator[Finding]:
    counts = [int(v["examples"]) for v in log]
    mean = sum(counts) / len(counts)
    if mean < 1 or (f.batch * len(counts) >= 50 and mean < 0.5 * f.batch):
        yield Finding(
            "few-examples",
            "error" if mean < max(1.0, 0.05 * f.batch) else "warning",
            f"a step saw {mean:.3g} images on average, where {f.batch:,} were to be expected of {f.records:,} records",
            "the noise is for the expected batch, so the images drown in it",
            "if --records declares far more images than there are, declare a number near the true one; raise "
            "--batch if it is small",
        )
    total, bad = sum(counts), sum(int(v["not_finite"]) for v in log)
    if bad:
        share = bad / max(total, 1)
        yield Finding(
            "gradients-not-finite",
            "error" if share > 0.1 else "warning",
            f"{bad:,} of {total:,} gradients of single images were NaN or infinite and counted as zero",
            "those images taught nothing" + (", and what is left is mostly noise" if share > 0.1 else ""),
            "lower --lr; if only a few images do it, they may be damaged",
        )


def _of_clipping(log: Sequence[dict[str, Any]], f: Facts) -> Iterator[Finding]:
    """Clipping and noise, of a run with noise."""
    norm = float(np.median([float(v["median_norm"]) for v in log]))
    clipped = float(np.mean([float(v["clipped"]) for v in log]))
    c = f.clipping_norm
    if f.clipping == "automatic":
        shrink = norm / (norm + 0.01)  # γ of automatic clipping
        if 0 < norm < 0.01:
            yield Finding(
                "gradients-below-gamma",
                "warning",
                f"the median gradient has norm {norm:.2g}, below γ = 0.01 of automatic clipping",
                f"gradients use only {100 * shrink:.0f} % of the sensitivity that the noise is made for",
                "--set private.clipping=flat with a smaller --clip.  " + _CHOOSE_C,
            )
    else:
        shrink = min(1.0, norm / c)
        if clipped < 0.01 and 0 < norm < c / 10:
            yield Finding(
                "nothing-clipped",
                "error" if norm < c / 1000 else "warning",
                f"{100 * clipped:.1f} % of the gradients were clipped at C = {c:g}; the median norm is {norm:.2g}",
                f"the noise is made for C: it is about {c / norm:,.0f} times as large as these gradients need",
                "lower --clip.  " + _CHOOSE_C,
            )
        elif clipped > 0.95:
            yield Finding(
                "everything-clipped",
                "note",
                f"{100 * clipped:.1f} % of the gradients were clipped at C = {c:g}; the median norm is {norm:.2g}",
                "every image has the same weight, whatever its gradient.  That is common and works well: noise "
                "shrinks with C, and Adam does not mind the scale",
                "nothing, unless another finding says that steps vanish",
            )
    if f.parameters:
        mean = sum(int(v["examples"]) for v in log) / len(log)
        one = mean * shrink / (f.noise_multiplier * math.sqrt(f.parameters))
        whole = one * math.sqrt(f.steps)
        # At ε = 0.2 the published MNIST setting, which still learns, has 3.  Real gradients are far from parallel.
        if whole < 1:
            yield Finding(
                "noise-dominates",
                "error" if whole < 0.3 else "warning",
                f"a step adds noise of norm z·C·√d = {f.noise_multiplier * c * math.sqrt(f.parameters):.3g} to a "
                f"sum of clipped gradients of {mean * shrink * c:.3g} at most; over all {f.steps:,} steps the "
                f"ratio of signal to noise is {whole:.2g} at best",
                "even if all images pulled in one direction in all steps, noise would pull as hard: the network "
                "walks at random",
                "raise --batch first, then --epsilon; use a smaller --network; or "
                + (
                    "spend all of ε on DP moments (--variant gaussian)"
                    if f.residual
                    else "start from programs (--pretrain)"
                )
                + ".  More images help most",
            )
