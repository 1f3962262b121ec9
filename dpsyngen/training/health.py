"""What is wrong with a run, and what to change: findings, finite weights, and loss curves.

A finding says what was seen, in numbers, why it matters and what to do.  Thresholds are justified where they stand.
Rules for the private phase are in :mod:`dpsyngen.training.health_private`, for generated images in
:mod:`dpsyngen.training.health_images`.

Losses, norms and counts of examples come from private images.  Weights and generated images do not: they are
post-processing of the mechanism's output, so a run may stop because of them (:func:`weights_finite`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Severity = Literal["error", "warning", "note"]
Basis = Literal["private", "released"]

UNTRAINED = 3.0
"""No untrained network has a larger loss.  With F = 0 the weighted loss at σ is (x₀²σ²/σ_d² + σ_d²)/(σ² + σ_d²), which
for pixels in [-1, 1] and σ_d² = 1/3 is at most 3 (black images at large σ).  A residual network has no such bound: with
F = 0 its loss is 1 if the images have the DP moments, and the larger the less they have."""


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


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first; within a severity the order stays."""
    order = get_args(Severity)
    return sorted(findings, key=lambda f: order.index(f.severity))


# ---------------------------------------------------------------------------------------------- weights


def weights_finite(module: nn.Module) -> bool:
    """Whether the network can still compute: no weight is NaN or infinite, or so large that its square is.

    Weights are the mechanism's output, so stopping by them costs no privacy.  Two small operations for each tensor.
    """
    return tensors_finite(module.state_dict().values())


def tensors_finite(tensors: Iterable[Tensor]) -> bool:
    """The same for tensors."""
    with torch.no_grad():
        sums = [t.detach().float().square().sum() for t in tensors if t.is_floating_point()]
        return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def not_finite_weights(phase: str, step: int, learning_rate: float, option: str) -> Finding:
    """The finding for a phase that had to be stopped at `step`."""
    return Finding(
        "weights-not-finite",
        "error",
        f"after step {step:,} of the phase {phase!r} some weights are NaN, infinite or too large to compute with "
        f"(learning rate {learning_rate:g})",
        "such a network draws nothing; training on would spend the rest of the budget for nothing",
        f"start a new run with a much lower learning rate, {option} (the presets use 3e-4 to 1e-2).  Resuming repeats "
        "the same steps and ends in the same place",
        "released",
    )


# ------------------------------------------------------------------------------------------------ losses


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


def of_losses(
    log: Sequence[dict[str, Any]], phase: str, lower: str, basis: Basis, residual: bool = False
) -> list[Finding]:
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
    out: list[Finding] = []
    bad, last = int((~finite).sum()), losses[-max(3, len(losses) // 10) :]
    if bad:
        broken = not np.isfinite(last).any() or bad > 0.05 * len(losses)
        out.append(
            Finding(
                "loss-not-finite",
                "error" if broken else "warning",
                f"phase {phase!r}: the loss was NaN or infinite in {bad:,} of {len(losses):,} steps, the first of them "
                f"step {int(np.argmin(finite)) + 1:,}",
                "the network computed something that is no number" + (", to the end" if broken else ", and recovered"),
                f"lower the learning rate, {lower}, by a factor of 10 to begin with; or begin with a warm-up",
                basis,
            )
        )
    if finite.sum() < 3:
        return out
    t = Trend.of(losses[finite])
    untrained = t.start if residual else UNTRAINED
    known = f"an untrained network has {'' if residual else 'at most '}{untrained:.3g}"
    if t.end > 1.5 * untrained or (t.end > 1.5 * t.start and t.rose):
        out.append(
            Finding(
                "diverged",
                "error",
                f"phase {phase!r}: the loss began at {t.start:.3g} and ended at {t.end:.3g} (best: {t.best:.3g}); "
                f"{known}",
                "the steps led away from a denoiser: the generator is worse than an untrained one",
                f"lower the learning rate, {lower}, by a factor of 10 to begin with"
                + (".  Too much noise does the same: raise --batch or --epsilon" if basis == "private" else ""),
                basis,
            )
        )
    elif t.worst > 1.5 * untrained:
        out.append(
            Finding(
                "loss-exploded",
                "warning",
                f"phase {phase!r}: on the way the loss rose to {t.worst:.3g}, where {known}, and ended at {t.end:.3g}",
                "the first steps threw the network far off; parts of it may never come back",
                f"lower the learning rate, {lower}, by a factor of 10 to begin with, or begin with a warm-up",
                basis,
            )
        )
    elif len(losses) >= 20 and t.rose:
        out.append(
            Finding(
                "loss-rose",
                "warning",
                f"phase {phase!r}: the loss fell to {t.best:.3g} and rose again to {t.end:.3g}",
                "the last steps did harm: they were too large, or noise had taken over",
                f"lower the learning rate, {lower}"
                + (", use --set private.schedule=cosine, or fewer --steps" if basis == "private" else ""),
                basis,
            )
        )
    return out
