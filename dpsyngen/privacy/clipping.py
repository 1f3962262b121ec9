"""Clipping each example's gradient, and the sum that carries its own sensitivity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dpsyngen.privacy.contributions import Contribution, Dense

ClippingStyle = Literal["flat", "per-layer", "automatic"]
STYLES: tuple[ClippingStyle, ...] = get_args(ClippingStyle)

AUTOMATIC_GAMMA = 0.01
"""γ of automatic clipping (Bu et al., arXiv 2206.07136, their default)."""

_SMALL_SQUARE = 1e-24  # below it squares in fp32 lose digits
_SMALL_TENSOR = 4096  # numbers an example; smaller ones are handled together


@dataclass(frozen=True)
class ClippedGradient:
    """The sum over examples of their clipped gradients, with the L2 sensitivity of that sum.

    Formal guarantee: for every choice of the other examples, adding or removing one example (or replacing it by
    nothing) changes the concatenation of ``sums`` by at most ``l2_sensitivity`` in L2 norm, up to the rounding of
    floating-point sums (``dpsyngen.privacy.exact`` has none).

    Attributes:
        sums: one tensor for each trainable parameter, in the order of the parameters.
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

    def __add__(self, other: ClippedGradient) -> ClippedGradient:
        """The clipped gradient of both sets of examples, which must be disjoint; the sensitivity stays."""
        return ClippedGradient(
            [a + b for a, b in zip(self.sums, other.sums, strict=True)],
            max(self.l2_sensitivity, other.l2_sensitivity),
            self.examples + other.examples,
            torch.cat([self.norms, other.norms.to(self.norms.dtype)]),
            self.not_finite + other.not_finite,
        )


def check_clipping(clipping_norm: float, style: str) -> None:
    """Raise ValueError unless both are allowed."""
    if not (clipping_norm > 0 and math.isfinite(clipping_norm)):
        raise ValueError(f"clipping_norm is {clipping_norm}, but must be positive and finite.")
    if style not in STYLES:
        raise ValueError(f"clipping style is {style!r}, but must be one of {', '.join(STYLES)}.")


def clip_and_sum(gradients: list[Tensor], clipping_norm: float) -> ClippedGradient:
    """Clip each example's gradient (over all tensors together) to `clipping_norm` and sum over examples.

    Args:
        gradients: tensors [examples, ...] in fp32 or fp64; rows that are not finite may be set to zero in
            place.
        clipping_norm: C > 0.
    """
    return clip([Dense(g) for g in gradients], [0] * len(gradients), clipping_norm, "flat")


def clip(
    contributions: list[Contribution], layers: list[int], clipping_norm: float, style: ClippingStyle
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
        contributions: one for each parameter, of the same examples.
        layers: for each parameter the number of its layer, from 0.
        clipping_norm: C > 0.
        style: see the table.
    """
    with torch.no_grad():
        parts = _Parts(contributions, layers, together=style != "per-layer")
        squares = parts.squared_norms()  # [layers, B]
        norms = squares.sum(0).sqrt()
        bounded = squares if style == "per-layer" else squares.sum(0, keepdim=True)
        # The products round to nearest; shrink C by a few units in the last place to stay within it.
        slack = 1.0 - 4.0 * torch.finfo(parts.dtype).eps
        limit = clipping_norm * slack / math.sqrt(len(bounded))
        if style == "automatic":
            factors = limit / (bounded.sqrt() + AUTOMATIC_GAMMA)
        else:
            tiny = torch.finfo(bounded.dtype).tiny  # a norm of zero stays unclipped
            factors = (limit / bounded.sqrt().clamp_min(tiny)).clamp_max(1.0)
        # Below the smallest normal number a factor has few digits and may round up by far more than the slack; an
        # example that large contributes nothing.
        kept = (torch.isfinite(squares) & (factors >= torch.finfo(parts.dtype).tiny)).all(0)
        dropped = int((~kept).sum())
        factors = torch.where(kept, factors, torch.zeros_like(factors)).to(parts.dtype)
        sums = parts.weighted_sums(factors, kept if dropped else None)
    return ClippedGradient(sums, clipping_norm, len(norms), norms, dropped)


class _Parts:
    """The contributions, the small ones of them laid side by side so that they cost one operation and not many."""

    def __init__(self, contributions: list[Contribution], layers: list[int], together: bool) -> None:
        self.contributions = contributions
        self.layers = [0] * len(layers) if together else layers
        self.dtype, self.device = contributions[0].dtype, contributions[0].device
        small = {i: c for i, c in enumerate(contributions) if type(c) is Dense and c.size <= _SMALL_TENSOR}
        self.small: dict[int, Dense] = small if together and len(small) > 1 else {}
        self.large = [i for i in range(len(contributions)) if i not in self.small]
        self.joined = Dense(torch.cat([c.flat for c in self.small.values()], 1)) if self.small else None

    def squared_norms(self) -> Tensor:
        """[layers, B]."""
        total = self._squared_norms(wide=False)
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

    def weighted_sums(self, factors: Tensor, kept: Tensor | None) -> list[Tensor]:
        """One tensor a parameter; `factors` is [layers, B]."""
        sums: dict[int, Tensor] = {}
        for i in self.large:
            sums[i] = self.contributions[i].weighted_sum(factors[self.layers[i]], kept)
        if self.joined is not None:
            flat = self.joined.weighted_sum(factors[0], kept).split([c.size for c in self.small.values()])
            for (i, c), part in zip(self.small.items(), flat, strict=True):
                sums[i] = part.view(c.gradients.shape[1:])
        return [sums[i] for i in range(len(self.contributions))]
