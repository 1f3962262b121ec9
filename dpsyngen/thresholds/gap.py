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
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import trapezoid
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser
from dpsyngen.workers import Workers

Array = NDArray[np.float64]
Pair = tuple[str, str]

LOWEST, HIGHEST = math.log(0.002), math.log(80)
"""log σ at the ends of EDM's sampling."""

_TOGETHER = 8  # parts between two reports of progress


def log_sigma_grid(spacing: float = 0.5, low: float = LOWEST, high: float = HIGHEST) -> tuple[float, ...]:
    """Evenly spaced log σ from `low` to `high`, both included, about `spacing` apart; at least 3."""
    if not (low < high and spacing > 0):
        raise ValueError(f"low={low} must be below high={high}, and spacing={spacing} above 0.")
    count = max(3, round((high - low) / spacing) + 1)
    return tuple(float(u) for u in np.linspace(low, high, count))


def seeded_noise(shape: tuple[int, ...], seed: int) -> Callable[[slice], Tensor]:
    """Standard normal noise of each image from a public seed: the same for image i in whatever slice it is asked for.

    Args:
        shape: of one image, [C, H, W].
        seed: 0 to 2^40; there are 2^22 images at most.
    """

    def noise(part: slice) -> Tensor:
        generators = (torch.Generator().manual_seed((seed << 22) + i) for i in range(part.start, part.stop))
        return torch.stack([torch.randn(shape, generator=g) for g in generators])

    return noise


@dataclass(frozen=True)
class Answers:
    """What several denoisers made of the same noisy images; squares are means over the pixels of an image.

    Attributes:
        log_sigma: [M].
        losses: of each denoiser, (D - x₀)², [N, M].
        gaps: of each pair asked for, (D_a - D_b)², [N, M].
    """

    log_sigma: Array
    losses: Mapping[str, Array]
    gaps: Mapping[Pair, Array]


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
        denoisers: by name; asked without labels.
        images: x₀, [N, C, H, W] in [-1, 1], on the device of the denoisers.
        log_sigma: M levels.
        pairs: of names, whose answers are compared.
        noise: n of a slice of the images, on the CPU.
        block: images at a time.
        workers: threads that share the images.
        on_progress: called now and then with the number of images that are done.
    """
    pairs = list(dict.fromkeys(pairs))
    missing = {name for pair in pairs for name in pair} - denoisers.keys()
    if missing:
        raise ValueError(
            f"no denoiser is called {', '.join(sorted(missing))}; given: {', '.join(denoisers) or 'none'}."
        )

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
    # An empty part first: without images the arrays still have their shapes.
    empty = np.empty((len(denoisers), 0, len(log_sigma))), np.empty((len(pairs), 0, len(log_sigma)))
    done = [empty]
    for start in range(0, len(parts), _TOGETHER):
        some = parts[start : start + _TOGETHER]
        done += (workers or Workers(1)).map(one, some)
        if on_progress is not None:
            on_progress(some[-1].stop)
    losses, gaps = (np.concatenate(arrays, axis=1) for arrays in zip(*done, strict=True))
    return Answers(
        np.asarray(log_sigma, dtype=np.float64),
        dict(zip(denoisers, losses, strict=True)),
        dict(zip(pairs, gaps, strict=True)),
    )


def _mean_square(difference: Tensor) -> Array:
    return difference.square().flatten(1).mean(1).double().cpu().numpy()


# ----------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class GapCurve:
    """One student against one teacher on the teacher's kind of images, with some seeds of both.

    Attributes:
        images: name of the source of the images.
        teacher, student: names; for a floor both are the same, with other seeds.
        log_sigma: [M], ascending.
        gap: (D_teacher - D_student)², mean over the pixels, [S, N, M]: seeds, images, levels.
        teacher_loss, student_loss: (D - x₀)², as `gap`.
    """

    images: str
    teacher: str
    student: str
    log_sigma: Array
    gap: Array
    teacher_loss: Array
    student_loss: Array

    def relative(self) -> Array:
        """The relative gap g of each seed, [S, M]: the ratio of the means over the images."""
        return np.asarray(self.gap.mean(1) / self.teacher_loss.mean(1))

    def excess(self) -> Array:
        """The student's loss over the teacher's, less 1, of each seed, [S, M]."""
        return np.asarray(self.student_loss.mean(1) / self.teacher_loss.mean(1) - 1)


@dataclass(frozen=True)
class MeanCurve:
    """The relative gap and the excess, averaged over networks, and as they could have come out.

    Attributes:
        relative, excess: [M].
        relative_drawn, excess_drawn: [B, M], of samples drawn with replacement.
    """

    relative: Array
    excess: Array
    relative_drawn: Array
    excess_drawn: Array

    def band(self, excess: bool = False) -> tuple[Array, Array]:
        """95 % interval of the relative gap, or of the excess, at each level: [M] and [M]."""
        curve, drawn = (self.excess, self.excess_drawn) if excess else (self.relative, self.relative_drawn)
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0) if len(drawn) else (curve, curve)
        return low, high


def mean_curve(curves: Sequence[GapCurve], replicates: int, seed: int = 0) -> MeanCurve:
    """Average all seeds of all curves, each counting the same, with the bootstrap (Efron & Tibshirani 1993).

    Pairs of networks (all seeds of all curves) are drawn first, then, for each that was drawn, its images.  With one
    pair only the images vary, so the spread between networks is not in the result.

    Args:
        curves: at least one, all with the same log σ.
        replicates: B.
        seed: of the drawing; public.
    """
    rng = np.random.default_rng(seed)
    pairs = [np.stack(parts) for c in curves for parts in zip(c.gap, c.student_loss, c.teacher_loss, strict=True)]
    drawn = np.zeros((2, replicates, pairs[0].shape[2]))
    for b in range(replicates):
        for p in rng.integers(len(pairs), size=len(pairs)):
            images = pairs[p].shape[1]
            # Drawing N images with replacement = multinomial counts as weights.
            gap, student, teacher = rng.multinomial(images, np.full(images, 1 / images)) @ pairs[p]
            drawn[:, b] += np.stack([gap, student]) / teacher / len(pairs)
    relative = np.concatenate([c.relative() for c in curves]).mean(0)
    excess = np.concatenate([c.excess() for c in curves]).mean(0)
    return MeanCurve(relative, excess, drawn[0], drawn[1] - 1)


# ------------------------------------------------------------------------------- what theory says of gaps
# G(σ) = E|D_p(x; σ) - D_q(x; σ)|² of optimal denoisers, summed over the d pixels.  docs/stages.md has the proofs.


def data_radius(pixels: int) -> float:
    """R = √d: the ball about 0 that holds [-1, 1]^d; its diameter, 2√d, bounds every W₂ distance there."""
    return math.sqrt(pixels)


def kl_bound(w2: float, sigma: float) -> float:
    """KL(p_σ ‖ q_σ) <= W₂(p, q)²/(2σ²), in nats: the joint convexity of KL along the optimal coupling.

    Args:
        w2: W₂(p, q), or any bound on it, such as twice :func:`data_radius`.
        sigma: σ > 0.
    """
    return w2**2 / (2 * sigma**2)


def price_density(log_sigma: Array, gap: Array) -> Array:
    """G(σ)/σ²: nats for each unit of log σ in which q's denoiser answers in place of p's (see :func:`price`)."""
    return np.asarray(gap * np.exp(-2 * log_sigma))


def price(log_sigma: Sequence[float] | Array, gap: Array) -> float:
    """∫ G(σ)/σ² d log σ in nats, by the trapezoidal rule: what it costs to let q's denoiser own these noise levels.

    Over log σ > τ the exact integral is KL(p_τ ‖ q_τ) (de Bruijn's identity), and over log σ < τ it bounds what q's
    denoiser adds to the KL divergence of the samples from p (Girsanov's theorem, reverse diffusion); over the whole
    axis it is KL(p ‖ q).

    Args:
        log_sigma: [M], ascending; one point alone costs nothing.
        gap: [M], summed over the pixels.
    """
    u = np.asarray(log_sigma, dtype=np.float64)
    return float(trapezoid(price_density(u, np.asarray(gap)), u))


Side = Literal["cleaning", "coarse"]
Method = Literal["tolerance", "loss", "kneedle"]
METHODS: tuple[Method, ...] = ("tolerance", "loss", "kneedle")
SIDES: tuple[Side, ...] = ("cleaning", "coarse")
_SMALLEST = 1e-12  # noise may make an estimate of a gap negative


@dataclass(frozen=True)
class Elbow:
    """A threshold.

    Attributes:
        side: "cleaning" (the stage is below it) or "coarse" (above it).
        method: see the module.
        log_sigma: τ; None if there is none.
        low, high: 95 % interval of τ: percentiles of the bootstrap's elbows; None if it has none.
        found: share of the bootstrap's curves that have an elbow at this side.
        value: the curve at τ: the relative gap, or with method "loss" the excess; the tolerance if there is one.
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
    log_sigma: Sequence[float] | Array,
    curve: Array,
    replicates: Array,
    side: Side,
    method: Method = "tolerance",
    tolerance: float = 0.05,
) -> Elbow:
    """The elbow of a curve at one side.

    Args:
        log_sigma: [M], ascending.
        curve: relative gap, or with method "loss" the excess, [M].
        replicates: the curve as it could have come out, [B, M], as :func:`dpsyngen.thresholds.gap.mean_curve` gives it;
            B = 0 is allowed.
        side: which end of the axis.
        method: see the module.
        tolerance: of the methods that have one.
    """
    u = np.asarray(log_sigma, dtype=np.float64)
    value, reason = _locate(u, curve, side, method, tolerance)
    found = [v for v in (_locate(u, c, side, method, tolerance)[0] for c in replicates) if v is not None]
    low, high = (float(v) for v in np.percentile(found, [2.5, 97.5])) if found else (None, None)
    share = len(found) / len(replicates) if len(replicates) else float(value is not None)
    at = None if value is None else float(np.interp(value, u, curve)) if method == "kneedle" else tolerance
    return Elbow(side, method, value, low, high, share, at, reason)


def _locate(u: Array, curve: Array, side: Side, method: Method, tolerance: float) -> tuple[float | None, str]:
    """τ, or None and why there is none."""
    if side == "coarse":
        value, reason = _locate(-u[::-1], curve[::-1], "cleaning", method, tolerance)
        return None if value is None else -value, reason
    # From here on the end that is looked from is the first point.
    peak = int(np.argmax(curve))
    return _kneedle(u, curve, peak) if method == "kneedle" else _tolerance(u, curve, peak, method, tolerance)


def _tolerance(u: Array, curve: Array, peak: int, method: Method, tolerance: float) -> tuple[float | None, str]:
    what = "gap" if method == "tolerance" else "excess of the loss"
    if curve[peak] <= tolerance:
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


def _kneedle(u: Array, curve: Array, peak: int) -> tuple[float | None, str]:
    if peak < 2:
        return None, "the gap is largest at this end"
    x = (u[: peak + 1] - u[0]) / (u[peak] - u[0])
    lowest = curve[: peak + 1].min()
    y = (curve[: peak + 1] - lowest) / max(float(curve[peak] - lowest), _SMALLEST)
    depth = x - y
    i = int(np.argmax(depth))
    if depth[i] <= 0 or i in (0, peak):
        return None, "the curve bends nowhere at this end"
    # The vertex of the parabola through the deepest point and its neighbours: the grid is coarser than what is sought.
    a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], depth[i - 1 : i + 2], 2)
    shift = 0.0 if a >= 0 else float(np.clip(-b / (2 * a), (x[i - 1] - x[i]) / 2, (x[i + 1] - x[i]) / 2))
    return float(u[0] + (x[i] + shift) * (u[peak] - u[0])), ""
