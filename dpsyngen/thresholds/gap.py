"""The gap between denoisers: how far apart their answers to the same noisy images are, at each noise level.

    g(log σ) = E‖D_a(x; σ) - D_b(x; σ)‖² / E‖D_a(x; σ) - x₀‖²,   x = x₀ + σ·n, x₀ from one source of images.

D_a, the *teacher*, was trained on that source; D_b, the *student*, on another.  The denominator is the teacher's own
loss on the same noisy images (unweighted; EDM's weight λ(σ) would cancel).  For an optimal teacher the gap is what the
student loses more than the teacher: E‖D_b - x₀‖² = E‖D_a - x₀‖² + E‖D_a - D_b‖².  For trained networks, which are not
optimal, the *excess*, E‖D_b - x₀‖²/E‖D_a - x₀‖² - 1, is another figure: below 0 where the student is the better
denoiser even of the teacher's images.

Everything is kept image by image, so that images can be drawn again for the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser
from dpsyngen.thresholds.theory import price_density

Array = NDArray[np.float64]
Pair = tuple[str, str]
Map = Callable[[Callable[[slice], Any], Sequence[slice]], list[Any]]
"""Runs a function over parts of the images, such as :meth:`dpsyngen.workers.Workers.map`."""

LOWEST, HIGHEST = math.log(0.002), math.log(80)
"""log σ at the ends of EDM's sampling."""

_TOGETHER = 8  # parts that are handed to `run` at a time


def log_sigma_grid(spacing: float = 0.5, low: float = LOWEST, high: float = HIGHEST) -> tuple[float, ...]:
    """Evenly spaced log σ from `low` to `high`, both included, about `spacing` apart; at least 3."""
    if not (low < high and spacing > 0):
        raise ValueError(f"low={low} must be below high={high}, and spacing={spacing} above 0.")
    count = max(3, round((high - low) / spacing) + 1)
    return tuple(float(u) for u in np.linspace(low, high, count))


def seeded_noise(shape: tuple[int, ...], seed: int) -> Callable[[slice], Tensor]:
    """Standard normal noise of each image from a public seed: the same for image i whatever part it is asked for in.

    Args:
        shape: of one image, [C, H, W].
        seed: 0 to 2^40; there are 2^22 images at most.
    """

    def noise(part: slice) -> Tensor:
        rows = []
        for index in range(part.start, part.stop):
            generator = torch.Generator().manual_seed((seed << 22) + index)
            rows.append(torch.randn(shape, generator=generator))
        return torch.stack(rows)

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
    run: Map | None = None,
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
        run: see ``Map``; None: one part after the other.
        on_progress: called now and then with the number of images that are done.
    """
    pairs = list(dict.fromkeys(pairs))
    wanted = dict.fromkeys(name for pair in pairs for name in pair)
    missing = [name for name in wanted if name not in denoisers]
    if missing:
        raise ValueError(f"no denoiser is called {', '.join(missing)}; given: {', '.join(denoisers) or 'none'}.")

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
        done += [one(part) for part in some] if run is None else run(one, some)
        if on_progress is not None:
            on_progress(some[-1].stop)
    empty = np.empty((0, len(log_sigma)))
    losses = {name: np.concatenate([empty, *(d[0][k] for d in done)]) for k, name in enumerate(denoisers)}
    gaps = {pair: np.concatenate([empty, *(d[1][k] for d in done)]) for k, pair in enumerate(pairs)}
    return Answers(np.asarray(log_sigma, dtype=np.float64), losses, gaps)


def _mean_square(difference: Tensor) -> Array:
    return difference.square().flatten(1).mean(1).double().cpu().numpy()


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

    @property
    def seeds(self) -> int:
        """S."""
        return len(self.gap)

    @property
    def name(self) -> str:
        """In words."""
        if self.teacher == self.student:
            return f"{self.student}, another seed, on {self.images}"
        return f"{self.student} in place of {self.teacher} on {self.images}"

    def relative(self) -> Array:
        """The relative gap g of each seed, [S, M]: the ratio of the means over the images."""
        return np.asarray(self.gap.mean(1) / self.teacher_loss.mean(1))

    def excess(self) -> Array:
        """The student's loss over the teacher's, less 1, of each seed, [S, M]."""
        return np.asarray(self.student_loss.mean(1) / self.teacher_loss.mean(1) - 1)

    def nats(self, pixels: int) -> Array:
        """G(σ)/σ² of each seed, [S, M], in nats for each unit of log σ; see :func:`theory.price`."""
        return price_density(np.exp(self.log_sigma), pixels * self.gap.mean(1))


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
    pairs = [np.stack([c.gap[s], c.student_loss[s], c.teacher_loss[s]]) for c in curves for s in range(c.seeds)]
    drawn = np.zeros((2, replicates, pairs[0].shape[2]))
    for b in range(replicates):
        for p in rng.integers(len(pairs), size=len(pairs)):
            images = pairs[p].shape[1]
            weights = rng.multinomial(images, np.full(images, 1 / images))
            gap, student, teacher = weights @ pairs[p]
            drawn[:, b] += np.stack([gap, student]) / teacher / len(pairs)
    relative = np.concatenate([c.relative() for c in curves]).mean(0)
    excess = np.concatenate([c.excess() for c in curves]).mean(0)
    return MeanCurve(relative, excess, drawn[0], drawn[1] - 1)
