"""Clipping each example's gradient, and the sum that carries its own sensitivity.

Symbols are those of Abadi et al. ("Deep learning with differential privacy", CCS 2016): g is the gradient of one
example over all parameters, C the clipping norm, and g · min(1, C/‖g‖) what the example adds to the sum.

=============================================  ============================================================
an example                                     adds
=============================================  ============================================================
of padding (``valid`` is False)                exactly zero; neither counted nor in ``norms``
with a NaN or an infinity in its gradient      exactly zero; counted in ``examples`` and ``not_finite``
whose C/‖g‖ is below the smallest normal fp32  exactly zero; counted in ``examples`` and ``not_finite``
with a gradient of zero                        zero
none at all: an empty Poisson batch            the sum is zero and has sensitivity C all the same: a legal step
=============================================  ============================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.errors import ConfigError, require
from dpsyngen.full_precision import full_precision
from dpsyngen.privacy.contributions import Contribution, Dense

ClippingStyle = Literal["flat", "per-layer", "automatic"]
STYLES: tuple[ClippingStyle, ...] = get_args(ClippingStyle)

AUTOMATIC_GAMMA = 0.01
"""γ of automatic clipping (Bu et al., arXiv 2206.07136, their default)."""

LARGEST_STEPS = 1 << 31
"""One example's norm on a grid stays below it, in steps of the grid, so that squares fit into 64 bits."""

_SMALL_SQUARE = 1e-24  # below it squares in fp32 lose digits
_SMALL_TENSOR = 4096  # numbers an example; smaller tensors are handled together


Draw = Callable[[int, Iterable[tuple[int, int]]], Iterator[NDArray[np.float32]]]
"""Of one vector of so many standard normal numbers draws the parts (start, length), one after the other."""


@dataclass(frozen=True)
class ClippedGradient:
    """The sum over examples of their clipped gradients, with the L2 sensitivity of that sum.

    Formal guarantee: for every choice of the other examples, adding or removing one example (or replacing it by
    nothing) changes the concatenation of ``sums`` by at most ``l2_sensitivity`` in L2 norm, up to the rounding of
    floating-point sums (``dpsyngen.privacy.exact`` has none).

    Attributes:
        sums: one tensor for each trainable parameter.
        l2_sensitivity: the clipping norm C (after the rounding slack, never more than C).
        examples: how many examples went in.  Data-dependent under Poisson sampling: never release it.
        norms: [examples], L2 norms before clipping; NaN or inf where the gradient was not finite.  Private.
        not_finite: how many examples had a NaN or infinite gradient, or one so large that C / ‖g‖ is no
            normal number; they contribute exactly zero.  Private.
    """

    sums: list[Tensor]
    l2_sensitivity: float
    examples: int
    norms: Tensor
    not_finite: int

    @property
    def gradient(self) -> list[Tensor]:
        """The sums in units of the gradient.  Private."""
        return self.sums

    def noisy(self, scale: float, divisor: float, draw: Draw) -> list[Tensor]:
        """(sum + scale · noise) / divisor, one tensor a parameter: coordinate i gets entry i of one noise vector."""
        sizes = [s.numel() for s in self.sums]
        starts = np.cumsum([0, *sizes])
        noise = draw(int(starts[-1]), zip(starts[:-1].tolist(), sizes, strict=True))
        return [
            (total + scale * torch.from_numpy(n).view(total.shape).to(total.device, total.dtype)) / divisor
            for total, n in zip(self.sums, noise, strict=True)
        ]

    def __add__(self, other: ClippedGradient) -> Self:
        """The clipped gradient of both sets of examples, which must be disjoint; the sensitivity stays."""
        return replace(
            self,
            sums=[a + b for a, b in zip(self.sums, other.sums, strict=True)],
            l2_sensitivity=max(self.l2_sensitivity, other.l2_sensitivity),
            examples=self.examples + other.examples,
            norms=torch.cat([self.norms, other.norms.to(self.norms.dtype)]),
            not_finite=self.not_finite + other.not_finite,
        )


@dataclass(frozen=True)
class GridGradient(ClippedGradient):
    """A sum of clipped gradients in whole steps of a grid (int64), for the discrete Gaussian mechanism.

    Formal guarantee: adding or removing one example changes ``sums`` by a vector of integers whose L2 norm is at most
    ``l2_sensitivity`` = floor(C / grid), in steps of the grid.  Both facts are statements about integers that were
    checked as such.

    Attributes:
        grid: what 1 stands for; a power of two.
    """

    grid: float

    @property
    def gradient(self) -> list[Tensor]:
        return [s.double() * self.grid for s in self.sums]

    def noisy(self, scale: float, divisor: float, draw: Draw) -> list[Tensor]:
        raise ValueError("a sum on a grid needs noise in whole numbers: use DiscreteGaussian.")

    def __add__(self, other: ClippedGradient) -> Self:
        if not isinstance(other, GridGradient) or other.grid != self.grid:
            raise ValueError("sums on different grids cannot be added.")
        return super().__add__(other)


def valid_mask(valid: int | Tensor | None, examples: int, device: torch.device) -> Tensor | None:
    """[examples] booleans: which are more than padding; None: all.  `valid` may say how many of the first ones are."""
    if valid is None:
        return None
    if isinstance(valid, Tensor):
        ok = valid.shape == (examples,) and valid.dtype == torch.bool
        require(ok, "valid", f"{valid.dtype} {tuple(valid.shape)}", f"boolean of shape ({examples},)")
        return valid.to(device)
    require(0 <= valid <= examples, "valid", valid, f"from 0 to the number of examples, {examples}")
    return torch.arange(examples, device=device) < valid


def clip_and_sum(gradients: list[Tensor], clipping_norm: float) -> ClippedGradient:
    """Clip each example's gradient (over all tensors together) to `clipping_norm` and sum over examples.

    `gradients` are tensors [examples, ...] in fp32 or fp64; rows that are not finite may be set to zero in place.
    """
    return clip([Dense(g) for g in gradients], [0] * len(gradients), clipping_norm, "flat")


def clip(
    contributions: list[Contribution],
    layers: list[int],
    clipping_norm: float,
    style: ClippingStyle,
    *,
    valid: Tensor | None = None,
    collect: Callable[[Iterator[Tensor]], list[Tensor]] = list,
) -> ClippedGradient:
    """Clip each example's gradient and sum over examples.

    ========== ============================================================= ===========
    style      an example's gradient g becomes                               sensitivity
    ========== ============================================================= ===========
    flat       g · min(1, C / ‖g‖)                                           C
    per-layer  g_l · min(1, (C/√L) / ‖g_l‖) for each of the L layers         C
    automatic  g · C / (‖g‖ + γ), γ = 0.01 (arXiv 2206.07136)                C
    ========== ============================================================= ===========

    Args:
        contributions, layers: for each parameter its gradients, and the number of its layer, from 0.
        valid: [B] booleans; where it is False there is no example but padding, which adds exactly zero and is not
            counted.  None: all are examples.
        collect: makes the result's sums of those of each parameter, in their order; of a model that is split over
            processes it adds up those of all.
    """
    # Factors come from norms in fp32 or more, so what they are multiplied with must not be rounded further: in TF32 an
    # example's part of the sum would exceed C by up to a thousandth, in bf16 by up to a hundredth.
    with torch.no_grad(), full_precision(contributions[0].device.type):
        parts = _Parts(contributions, layers, style != "per-layer")
        squares = parts.squared_norms()  # ‖g_l‖², [layers, B]
        norms = squares.sum(0).sqrt()  # ‖g‖, [B]
        bounded = squares if style == "per-layer" else squares.sum(0, keepdim=True)
        # Products round to nearest, so C shrinks by a few units in the last place: the clipped norm stays within C.
        slack = 1.0 - 4.0 * torch.finfo(parts.dtype).eps
        limit = clipping_norm * slack / math.sqrt(len(bounded))  # C, or C/√L for each of L layers
        # One factor an example, min(1, C/‖g‖).
        if style == "automatic":
            factors = limit / (bounded.sqrt() + AUTOMATIC_GAMMA)
        else:
            tiny = torch.finfo(bounded.dtype).tiny  # a norm of zero stays unclipped
            factors = (limit / bounded.sqrt().clamp_min(tiny)).clamp_max(1.0)
        # Below the smallest normal number a factor has few digits and may round up by far more than the slack; an
        # example that large contributes nothing.
        kept = (torch.isfinite(squares) & (factors >= torch.finfo(parts.dtype).tiny)).all(0)
        if valid is not None:  # padding is left out, too, but not counted
            norms, kept = norms[valid], kept & valid
        count = int(kept.sum())
        factors = torch.where(kept, factors, torch.zeros_like(factors)).to(parts.dtype)
        # The sum of factor times gradient.  0 · NaN is NaN, so where something is left out it is set to zero by `kept`.
        sums = collect(parts.weighted_sums(factors, None if count == len(kept) else kept))
    return ClippedGradient(sums, clipping_norm, len(norms), norms, len(norms) - count)


def default_grid(clipping_norm: float, parameters: int) -> float:
    """A power of two so fine that rounding towards zero takes at most a thousandth of C off a gradient (in L2)."""
    return 2.0 ** math.floor(math.log2(1e-3 * clipping_norm / math.sqrt(parameters)))


def _sensitivity(clipping_norm: float, grid: float) -> int:
    if not grid > 0 or math.frexp(grid)[0] != 0.5:
        raise ConfigError(f"the grid is {grid}, but must be a power of two, so that multiples of it are exact.")
    bound = math.floor(clipping_norm / grid)
    if not 1 <= bound < LARGEST_STEPS:  # strictly, so that a number clamped to it is seen to be too large
        raise ConfigError(
            f"clipping norm {clipping_norm} is {clipping_norm / grid:.3g} steps of the grid {grid}, but must be "
            f"at least 1 and below {LARGEST_STEPS}: choose a {'finer' if bound < 1 else 'coarser'} grid (see "
            "default_grid)."
        )
    return bound


def clip_to_grid(gradients: list[Tensor], clipping_norm: float, grid: float) -> GridGradient:
    """Clip each example's gradient to `clipping_norm`, round it towards zero to the grid, and sum.

    Args:
        gradients: per-example tensors [B, ...], B >= 0; examples with a NaN or an infinity contribute zero.
        clipping_norm, grid: C, from 1 to 2^31 steps of the grid, which is a power of two; else ConfigError.
    """
    bound = _sensitivity(clipping_norm, grid)
    sums = [torch.zeros(g.shape[1:], dtype=torch.int64, device=g.device) for g in gradients]
    norms, bad = [torch.zeros(0, dtype=torch.float64)], 0
    for b in range(len(gradients[0])):
        # Alone and in fp64: the clipped gradient is the clipped sum of one example.  To whole steps of the grid: a
        # gradient of few coordinates loses almost nothing to truncation, and would else exceed the bound.
        one = clip([Dense(g[b : b + 1].double()) for g in gradients], [0] * len(gradients), bound * grid, "flat")
        norms.append(one.norms.double().cpu())
        bad += one.not_finite
        # Dividing by a power of two is exact; truncation never makes a number larger.
        steps = [(s / grid).trunc().to(torch.int64) for s in one.sums]
        if _squared_norm(steps) <= bound * bound:
            for whole, part in zip(sums, steps, strict=True):
                whole += part
        else:  # rounding in fp64 went the wrong way by a hair; the bound is what counts
            bad += 1
    return GridGradient(sums, bound, len(gradients[0]), torch.cat(norms), bad, grid)


def _squared_norm(steps: list[Tensor]) -> int:
    """Exactly: squares below 2^62 are added in two halves that cannot overflow."""
    total = 0
    for s in steps:
        squares = s.abs().clamp_max(LARGEST_STEPS).square()
        total += (int((squares >> 31).sum()) << 31) + int((squares & ((1 << 31) - 1)).sum())
    return total


class _Parts:
    """The contributions, the small ones of them laid side by side so that they cost one operation and not many."""

    def __init__(self, contributions: list[Contribution], layers: list[int], together: bool) -> None:
        self.contributions, self.layers = contributions, [0] * len(layers) if together else layers
        self.dtype = contributions[0].dtype
        small = {i: c for i, c in enumerate(contributions) if type(c) is Dense and c.flat.shape[1] <= _SMALL_TENSOR}
        self.small: dict[int, Dense] = small if together and len(small) > 1 else {}
        self.large = [i for i in range(len(contributions)) if i not in self.small]
        self.joined = Dense(torch.cat([c.flat for c in self.small.values()], 1)) if self.small else None

    def squared_norms(self) -> Tensor:
        """[layers, B]."""
        total = self._squared_norms(wide=False)
        # A second round in fp64 for squares that leave the range of fp32.
        doubtful = ~torch.isfinite(total) | (total < _SMALL_SQUARE)
        if self.dtype == torch.float32 and bool(doubtful.any()):
            total = torch.where(doubtful, self._squared_norms(wide=True), total)
        return total

    def _squared_norms(self, wide: bool) -> Tensor:
        totals: dict[int, Tensor] = {}
        if self.joined is not None:
            totals[0] = self.joined.squared_norms(wide)
        for i in self.large:
            squares, layer = self.contributions[i].squared_norms(wide), self.layers[i]
            totals[layer] = totals[layer] + squares if layer in totals else squares
        return torch.stack([totals[layer] for layer in range(len(totals))])

    def weighted_sums(self, factors: Tensor, kept: Tensor | None) -> Iterator[Tensor]:
        """One tensor a parameter, in their order; `factors` is [layers, B]."""
        small: dict[int, Tensor] = {}
        if self.joined is not None:
            flat = self.joined.weighted_sum(factors[0], kept).split([c.flat.shape[1] for c in self.small.values()])
            for (i, c), part in zip(self.small.items(), flat, strict=True):
                small[i] = part.view(c.gradients.shape[1:])
        for i, contribution in enumerate(self.contributions):
            yield small[i] if i in small else contribution.weighted_sum(factors[self.layers[i]], kept)
