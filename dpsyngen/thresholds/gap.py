"""The gap between denoisers: how far apart their answers to the same noisy images are, at each noise level.

    g(log σ) = E‖D_a(x; σ) - D_b(x; σ)‖² / E‖D_a(x; σ) - x₀‖²,   x = x₀ + σ·n, x₀ from one source of images.

D_a, the *teacher*, was trained on that source; D_b, the *student*, on another.  The denominator is the teacher's own
loss on the same noisy images (unweighted; EDM's weight λ(σ) would cancel).  For an optimal teacher the gap is what the
student loses more: E‖D_b - x₀‖² = E‖D_a - x₀‖² + E‖D_a - D_b‖².  Trained networks are not optimal, so the *excess*,
E‖D_b - x₀‖²/E‖D_a - x₀‖² - 1, stands beside it: below 0 the student is the better denoiser of the teacher's images.

Everything is kept image by image, so that images can be drawn again for the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser
from dpsyngen.workers import Workers

Array = NDArray[np.float64]
Pair = tuple[str, str]

LOWEST, HIGHEST = math.log(0.002), math.log(80)
"""log σ at the ends of EDM's sampling."""

_TOGETHER = 8  # parts between two reports of progress


def log_sigma_grid(spacing: float = 0.5) -> tuple[float, ...]:
    """Evenly spaced log σ over the whole axis, both ends included, about `spacing` apart; at least 3."""
    count = max(3, round((HIGHEST - LOWEST) / spacing) + 1)
    return tuple(float(u) for u in np.linspace(LOWEST, HIGHEST, count))


def seeded_noise(shape: tuple[int, ...], seed: int) -> Callable[[slice], Tensor]:
    """Standard normal noise of each image, of shape [C, H, W], from a public seed (0 to 2^40): the same for image i
    (below 2^22) in whatever slice it is asked for.
    """

    def noise(part: slice) -> Tensor:
        generators = (torch.Generator().manual_seed((seed << 22) + i) for i in range(part.start, part.stop))
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    return noise


class Answers(NamedTuple):
    """What several denoisers made of the same noisy images; squares are means over the pixels of an image."""

    losses: Mapping[str, Array]  # of each denoiser, (D - x₀)², [N, M]
    gaps: Mapping[Pair, Array]  # of each pair asked for, (D_a - D_b)², [N, M]


def measure(
    denoisers: Mapping[str, Denoiser],
    images: Tensor,
    log_sigma: Sequence[float],
    pairs: Iterable[Pair],
    noise: Callable[[slice], Tensor],
    *,
    block: int = 32,
    workers: Workers | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Answers:
    """Ask all denoisers about the same noisy images.

    An image has one noise n, scaled to every σ: the curves over log σ come out smooth with few images.

    Args:
        denoisers: by name; asked without labels.  The answers of `pairs` of them are compared.
        images: x₀, [N, C, H, W] in [-1, 1], N > 0, on the device of the denoisers.
        noise: n of a slice of the images, on the CPU.
        block: images at a time; `workers` share the blocks.
    """
    pairs = list(dict.fromkeys(pairs))

    def one(part: slice) -> tuple[Array, Array]:
        x0 = images[part]
        n = noise(part).to(x0)
        losses = np.empty((len(denoisers), len(x0), len(log_sigma)))
        gaps = np.empty((len(pairs), len(x0), len(log_sigma)))
        with torch.no_grad():
            for m, level in enumerate(log_sigma):
                sigma = torch.full((len(x0),), math.exp(level), dtype=x0.dtype, device=x0.device)
                x = x0 + math.exp(level) * n
                answers = {name: denoiser(x, sigma, None) for name, denoiser in denoisers.items()}
                for k, answer in enumerate(answers.values()):
                    losses[k, :, m] = _mean_square(answer - x0)
                for k, (a, b) in enumerate(pairs):
                    gaps[k, :, m] = _mean_square(answers[a] - answers[b])
        return losses, gaps

    parts = [slice(i, min(i + block, len(images))) for i in range(0, len(images), block)]
    done: list[tuple[Array, Array]] = []
    for start in range(0, len(parts), _TOGETHER):
        some = parts[start : start + _TOGETHER]
        done += (workers or Workers(1)).map(one, some)
        if on_progress is not None:
            on_progress(some[-1].stop)
    losses, gaps = (np.concatenate(arrays, axis=1) for arrays in zip(*done, strict=True))
    return Answers(dict(zip(denoisers, losses, strict=True)), dict(zip(pairs, gaps, strict=True)))


def _mean_square(difference: Tensor) -> Array:
    return difference.square().flatten(1).mean(1).double().cpu().numpy()


# ----------------------------------------------------------------------------------------------- curves


def ratios(gap: Array, teacher: Array, student: Array, noise: Array | float) -> tuple[Array, Array]:
    """Relative gap and excess of squares that have noise of this standard deviation."""
    # Squares are not negative; a denominator within its noise of 0 counts as that noise.
    below = np.maximum(teacher, np.maximum(noise, 1e-300))
    return np.maximum(gap, 0) / below, np.maximum(student, 0) / below - 1


@dataclass(frozen=True)
class GapCurve:
    """One student against one teacher, with some seeds of both.

    Attributes:
        stand_in: what the comparison is for: see :class:`dpsyngen.thresholds.search.Measured`.
        teacher, student: names; for a floor both are the same, with other seeds.
        gap: (D_teacher - D_student)², mean over the pixels, [S, N, M]: seeds, images, levels.  An estimate on private
            images has means over the images, S = N = 1.
        teacher_loss, student_loss: (D - x₀)², as `gap`.
        noise: standard deviation of noise in the three, [M]; 0 on public images.
    """

    stand_in: str
    teacher: str
    student: str
    gap: Array
    teacher_loss: Array
    student_loss: Array
    noise: Array | float = 0.0

    def squares(self) -> tuple[Array, Array, Array]:
        """Gap, teacher's loss and student's loss of each seed: means over the images, [S, M]."""
        return self.gap.mean(1), self.teacher_loss.mean(1), self.student_loss.mean(1)

    def relative(self) -> Array:
        """The relative gap g of each seed, [S, M]: the ratio of the means over the images, at least 0."""
        return ratios(*self.squares(), self.noise)[0]

    def excess(self) -> Array:
        """The student's loss over the teacher's, less 1, of each seed, [S, M]."""
        return ratios(*self.squares(), self.noise)[1]


class Estimate(NamedTuple):
    """A curve, [M], and B curves as it could have come out, [B, M]."""

    curve: Array
    drawn: Array

    def band(self) -> tuple[Array, Array]:
        """95 % interval at each level: [M] and [M]."""
        low, high = np.percentile(self.drawn, [2.5, 97.5], axis=0) if len(self.drawn) else (self.curve, self.curve)
        return low, high


class MeanCurve(NamedTuple):
    """The relative gap and the excess, averaged over networks."""

    relative: Estimate
    excess: Estimate


def mean_curve(curves: Sequence[GapCurve], replicates: int, seed: int = 0) -> MeanCurve:
    """Average all seeds of all curves (one at least), with B = `replicates` of the bootstrap (Efron & Tibshirani 1993).

    Pairs of networks (all seeds of all curves) are drawn first, then, for each that was drawn, its images.  With one
    pair only the images vary, so the spread between networks is not in the result.  An estimate on private images is
    drawn again with other noise of the mechanism instead.
    """
    rng = np.random.default_rng(seed)
    relative = np.concatenate([c.relative() for c in curves]).mean(0)
    excess = np.concatenate([c.excess() for c in curves]).mean(0)
    drawn = np.zeros((2, replicates, len(relative)))
    if np.any(curves[0].noise):
        (c,) = curves
        gap, teacher, student = (v + c.noise * rng.standard_normal(drawn[0].shape) for v in c.squares())
        drawn[:] = ratios(gap, teacher, student, c.noise)
        return MeanCurve(Estimate(relative, drawn[0]), Estimate(excess, drawn[1]))
    pairs = [np.stack(parts) for c in curves for parts in zip(c.gap, c.student_loss, c.teacher_loss, strict=True)]
    for b in range(replicates):
        for p in rng.integers(len(pairs), size=len(pairs)):
            images = pairs[p].shape[1]
            # Drawing N images with replacement = multinomial counts as weights.
            gap, student, teacher = rng.multinomial(images, np.full(images, 1 / images)) @ pairs[p]
            drawn[:, b] += np.stack([gap, student]) / teacher / len(pairs)
    return MeanCurve(Estimate(relative, drawn[0]), Estimate(excess, drawn[1] - 1))


# ------------------------------------------------------------------------------------------------ thresholds

Side = Literal["cleaning", "coarse"]
Method = Literal["tolerance", "loss"]
METHODS: tuple[Method, ...] = ("tolerance", "loss")
SIDES: tuple[Side, ...] = ("cleaning", "coarse")
_SMALLEST = 1e-12  # noise may make an estimate of a gap negative


@dataclass(frozen=True)
class Elbow:
    """A threshold.

    Attributes:
        side: "cleaning" (the stage is below it) or "coarse" (above it).
        method: "tolerance" (the first level at which the relative gap exceeds a tolerance) or "loss" (the same of the
            excess).
        log_sigma: τ; None if there is none.
        low, high: 95 % interval of τ: percentiles of the bootstrap's elbows; None if it has none.
        found: share of the bootstrap's curves that have an elbow at this side.
        value: the curve at τ, which is the tolerance; None if there is no τ.
        reason: why there is none; "" if there is one.
    """

    side: Side
    method: Method
    log_sigma: float | None
    low: float | None
    high: float | None
    found: float
    value: float | None
    reason: str


def find_elbow(
    u: Array, curve: Array, replicates: Array, side: Side, method: Method = "tolerance", tolerance: float = 0.05
) -> Elbow:
    """The elbow of a curve at one side; see :class:`Elbow`.

    Args:
        u: log σ, [M], ascending.
        curve: relative gap, or with method "loss" the excess, [M].
        replicates: the curve as it could have come out, [B, M]; B = 0 is allowed.
    """
    value, reason = _locate(u, curve, side, method, tolerance)
    found = [v for v in (_locate(u, c, side, method, tolerance)[0] for c in replicates) if v is not None]
    low, high = (float(v) for v in np.percentile(found, [2.5, 97.5])) if found else (None, None)
    share = len(found) / len(replicates) if len(replicates) else float(value is not None)
    return Elbow(side, method, value, low, high, share, None if value is None else tolerance, reason)


def _locate(u: Array, curve: Array, side: Side, method: Method, tolerance: float) -> tuple[float | None, str]:
    """τ, or None and why there is none."""
    if side == "coarse":
        value, reason = _locate(-u[::-1], curve[::-1], "cleaning", method, tolerance)
        return None if value is None else -value, reason
    # From here on the end that is looked from is the first point.
    what = "gap" if method == "tolerance" else "excess of the loss"
    if curve.max() <= tolerance:
        # Networks that were hardly trained are all alike.
        return None, f"the {what} is within {100 * tolerance:g} % everywhere: train longer to tell the stages apart"
    first = int(np.argmax(curve > tolerance))
    if first == 0:
        return None, f"the {what} is {100 * curve[0]:.3g} % at this end already, above {100 * tolerance:g} %"
    below, above, limit = float(curve[first - 1]), float(curve[first]), tolerance
    if method == "tolerance":
        # Gaps grow by powers of σ, so the curve is nearly straight in log g against log σ.  An excess may be negative.
        below, above, limit = (float(np.log(max(v, _SMALLEST))) for v in (below, above, limit))
    return float(u[first - 1] + (limit - below) / (above - below) * (u[first] - u[first - 1])), ""
