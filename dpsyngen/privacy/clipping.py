"""Clipping each example's gradient, and the sum that carries its own sensitivity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from dpsyngen.errors import ConfigError
from dpsyngen.full_precision import full_precision
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
        return replace(
            self,
            sums=[a + b for a, b in zip(self.sums, other.sums, strict=True)],
            l2_sensitivity=max(self.l2_sensitivity, other.l2_sensitivity),
            examples=self.examples + other.examples,
            norms=torch.cat([self.norms, other.norms.to(self.norms.dtype)]),
            not_finite=self.not_finite + other.not_finite,
        )


class Shards(Protocol):
    """How the processes that a model is split over clip together; see :mod:`dpsyngen.privacy.sharding.sharded`.

    Attributes:
        layers: how many layers the whole model has.
    """

    layers: int

    def total(self, squares: Tensor) -> Tensor:
        """[layers, B] squared norms of whole gradients, from those of this process's part; the same numbers, to the
        last bit, in all processes that see the same examples, so that they decide alike.
        """
        ...

    def collect(self, sums: Iterator[Tensor]) -> list[Tensor]:
        """This process's part of the sums over all processes, from its own sums in the order of the parameters."""
        ...


def check_clipping(clipping_norm: float, style: str) -> None:
    """Raise ValueError unless both are allowed."""
    if not (clipping_norm > 0 and math.isfinite(clipping_norm)):
        raise ValueError(f"clipping_norm is {clipping_norm}, but must be positive and finite.")
    if style not in STYLES:
        raise ValueError(f"clipping style is {style!r}, but must be one of {', '.join(STYLES)}.")


def valid_mask(valid: int | Tensor | None, examples: int, device: torch.device) -> Tensor | None:
    """[examples] booleans: which are more than padding; None: all.

    Args:
        valid: such a tensor, or how many of the first ones are.
        examples: B.
        device: of the result.
    """
    if valid is None:
        return None
    if isinstance(valid, Tensor):
        if valid.shape != (examples,) or valid.dtype != torch.bool:
            raise ConfigError(
                f"valid is {valid.dtype} of shape {tuple(valid.shape)}, but must be boolean of shape ({examples},)."
            )
        return valid.to(device)
    if not 0 <= valid <= examples:
        raise ConfigError(f"valid is {valid}, but must be from 0 to the number of examples, {examples}.")
    return torch.arange(examples, device=device) < valid


def clip_and_sum(gradients: list[Tensor], clipping_norm: float) -> ClippedGradient:
    """Clip each example's gradient (over all tensors together) to `clipping_norm` and sum over examples.

    Args:
        gradients: tensors [examples, ...] in fp32 or fp64; rows that are not finite may be set to zero in
            place.
        clipping_norm: C > 0.
    """
    return clip([Dense(g) for g in gradients], [0] * len(gradients), clipping_norm, "flat")


def clip(
    contributions: list[Contribution],
    layers: list[int],
    clipping_norm: float,
    style: ClippingStyle,
    *,
    valid: Tensor | None = None,
    shards: Shards | None = None,
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
        valid: [B] booleans; where it is False there is no example but padding, which adds exactly zero and is not
            counted.  None: all are examples.
        shards: the processes that hold the rest of the model; None: there are none.
    """
    # Factors come from norms in fp32 or more, so what they are multiplied with must not be rounded further: in TF32 an
    # example's part of the sum would exceed C by up to a thousandth, in bf16 by up to a hundredth.
    with torch.no_grad(), full_precision(contributions[0].device.type):
        parts = _Parts(contributions, layers, style != "per-layer", shards)
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
        if valid is not None:
            left_out = ~kept & valid
            norms, kept = norms[valid], kept & valid
        else:
            left_out = ~kept
        dropped = int(left_out.sum())
        factors = torch.where(kept, factors, torch.zeros_like(factors)).to(parts.dtype)
        weighted = parts.weighted_sums(factors, None if dropped == 0 and valid is None else kept)
        sums = list(weighted) if shards is None else shards.collect(weighted)
    return ClippedGradient(sums, clipping_norm, len(norms), norms, dropped)


class _Parts:
    """The contributions, the small ones of them laid side by side so that they cost one operation and not many."""

    def __init__(
        self, contributions: list[Contribution], layers: list[int], together: bool, shards: Shards | None
    ) -> None:
        self.contributions, self.shards = contributions, shards
        self.layers = [0] * len(layers) if together else layers
        self.layer_count = 1 if together else shards.layers if shards else max(layers) + 1
        self.dtype, self.device = contributions[0].dtype, contributions[0].device
        small = {i: c for i, c in enumerate(contributions) if type(c) is Dense and c.size <= _SMALL_TENSOR}
        self.small: dict[int, Dense] = small if together and len(small) > 1 else {}
        self.large = [i for i in range(len(contributions)) if i not in self.small]
        self.joined = Dense(torch.cat([c.flat for c in self.small.values()], 1)) if self.small else None

    def squared_norms(self) -> Tensor:
        """[layers, B]."""
        total = self._squared_norms(wide=False)
        # Of whole gradients, which all shards know, so that all of them or none go on to the second round.
        doubtful = ~torch.isfinite(total) | (total < _SMALL_SQUARE)
        if self.dtype == torch.float32 and bool(doubtful.any()):
            total = torch.where(doubtful, self._squared_norms(wide=True), total)
        return total

    def _squared_norms(self, wide: bool) -> Tensor:
        own = self._own_squared_norms(wide)
        return own if self.shards is None else self.shards.total(own)

    def _own_squared_norms(self, wide: bool) -> Tensor:
        totals: dict[int, Tensor] = {}
        if self.joined is not None:
            totals[0] = self.joined.squared_norms(wide)
        for i in self.large:
            squares, layer = self.contributions[i].squared_norms(wide), self.layers[i]
            totals[layer] = totals[layer] + squares if layer in totals else squares
        none = torch.zeros_like(next(iter(totals.values())))  # for layers that other shards have
        return torch.stack([totals.get(layer, none) for layer in range(self.layer_count)])

    def weighted_sums(self, factors: Tensor, kept: Tensor | None) -> Iterator[Tensor]:
        """One tensor a parameter, in their order; `factors` is [layers, B]."""
        small: dict[int, Tensor] = {}
        if self.joined is not None:
            flat = self.joined.weighted_sum(factors[0], kept).split([c.size for c in self.small.values()])
            for (i, c), part in zip(self.small.items(), flat, strict=True):
                small[i] = part.view(c.gradients.shape[1:])
        for i, contribution in enumerate(self.contributions):
            yield small[i] if i in small else contribution.weighted_sum(factors[self.layers[i]], kept)
