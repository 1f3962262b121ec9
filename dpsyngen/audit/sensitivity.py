"""Does one record change the clipped sum by at most C?  And is it the right gradient that is clipped?

Asked of the real engine on a real network, with examples of the auditor's own: small, huge, equal to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpsyngen.audit.findings import Finding, exact
from dpsyngen.privacy.clipping import AUTOMATIC_GAMMA, ClippingStyle

SLACK = 1e-4
"""Of C, for the rounding of sums in fp32."""

Summed = Callable[[Sequence[int]], list[Tensor]]
"""The clipped sum over some of the examples, which may be named more than once; one tensor a parameter."""


def check_sensitivity(summed: Summed, examples: int, clipping_norm: float, already_clipped: float = 0.5) -> Finding:
    """Take each example away from all, add it a second time, and look at it alone: the sum may move by C at most.

    Args:
        summed: the sum over given examples, as training computes it, in units of the gradient.
        examples: B >= 2; a good part of them with gradients far above C, or the check has nothing to find.
        clipping_norm: C as claimed.
        already_clipped: share of C that the largest step must reach, or the examples were too tame to show anything.
    """
    everyone = list(range(examples))
    whole = _flat(summed(everyone))
    worst, where = 0.0, ""
    for i in everyone:
        rest = [j for j in everyone if j != i]
        moves = {
            "taken away": whole - _flat(summed(rest)),
            "added a second time": _flat(summed([*everyone, i])) - whole,
            "alone": _flat(summed([i])),
        }
        for how, move in moves.items():
            norm = _finite(float(move.norm()) / clipping_norm)
            if norm > worst:
                worst, where = norm, f"example {i} {how}"
    enough = worst >= already_clipped
    return exact(
        "one record moves the clipped sum by at most C",
        enough and worst <= 1 + SLACK,
        f"at most {worst:.6g} C, over {examples} examples in three ways",
        f"at most 1 C (and {SLACK:g} C for rounding)",
        where if enough else f"{where}; no example comes near C, so nothing was shown",
    )


def check_gradients(
    summed: Summed,
    reference: Callable[[int], list[list[Tensor]]],
    layers: Sequence[int],
    examples: int,
    clipping_norm: float,
    style: ClippingStyle,
    tolerance: float = 5e-3,
) -> Finding:
    """What the engine adds for an example is clip(mean over its K copies of their gradients), by plain autograd.

    Args:
        summed: see :func:`check_sensitivity`.
        reference: for an example, the gradient of the loss of each of its K copies: K lists, one tensor a parameter.
        layers: for each parameter, the number of its layer, for clipping layer by layer.
        examples: B.
        clipping_norm: C.
        style: how gradients are clipped.
        tolerance: of C, for rounding (of a network in fp32, and of a grid).
    """
    worst, where = 0.0, 0
    for i in range(examples):
        copies = reference(i)
        mean = [torch.stack([c[p].double() for c in copies]).mean(0) for p in range(len(copies[0]))]
        wanted = _flat(clip_by_hand(mean, layers, clipping_norm, style))
        error = _finite(float((_flat(summed([i])) - wanted).norm()) / clipping_norm)
        if error > worst:
            worst, where = error, i
    return exact(
        "an example's gradient is averaged over its copies, then clipped",
        worst <= tolerance,
        f"differs by at most {worst:.3g} C from a plain autograd loop, over {examples} examples",
        f"at most {tolerance:g} C, for rounding",
        f"example {where}",
    )


def clip_by_hand(
    gradient: list[Tensor], layers: Sequence[int], clipping_norm: float, style: ClippingStyle
) -> list[Tensor]:
    """One gradient, clipped as :func:`dpsyngen.privacy.clipping.clip` describes, written a second time."""
    if style == "per-layer":
        count = len(set(layers))
        squares: dict[int, float] = {}
        for layer, g in zip(layers, gradient, strict=True):
            squares[layer] = squares.get(layer, 0.0) + float(g.square().sum())
        bound = clipping_norm / math.sqrt(count)
        return [g * min(1.0, bound / max(math.sqrt(squares[i]), 1e-300)) for i, g in zip(layers, gradient, strict=True)]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    if style == "automatic":
        return [g * (clipping_norm / (norm + AUTOMATIC_GAMMA)) for g in gradient]
    return [g * min(1.0, clipping_norm / max(norm, 1e-300)) for g in gradient]


def layers_of(names: Sequence[str]) -> list[int]:
    """Numbers of the layers that parameters belong to: those of one module are one layer.

    >>> layers_of(["a.weight", "a.bias", "b.weight"])
    [0, 0, 1]
    """
    modules = [n.rpartition(".")[0] for n in names]
    numbers: dict[str, int] = {}
    for m in modules:
        numbers.setdefault(m, len(numbers))
    return [numbers[m] for m in modules]


def _finite(value: float) -> float:
    """What is not a number is worse than any number."""
    return math.inf if math.isnan(value) else value


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten().cpu() for t in tensors])
