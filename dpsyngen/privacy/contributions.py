"""What one layer call contributes to the gradients of a batch: norms of each example, and weighted sums.

A contribution knows the gradient of one parameter for each of B examples, in whatever form is cheapest to keep.
Clipping needs just two things of it: the squared norm of each example's gradient, and the sum of the gradients
with one factor each.  ``Dense`` keeps the gradients themselves; the others keep the two tensors whose product they
are (the "ghost norm" of Goodfellow 2015 and Li et al. 2022), which costs less where an example has few positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

_PIECE = 4096  # values that fp32 adds up before fp64 takes over


class Contribution(ABC):
    """Gradients of one parameter, for each of B examples; `reference` has the dtype and device of their sum."""

    def __init__(self, reference: Tensor) -> None:
        self.dtype, self.device = reference.dtype, reference.device

    @abstractmethod
    def squared_norms(self, wide: bool = False) -> Tensor:
        """[B], fp64, never negative; NaN or inf where a gradient is not finite.

        With `wide` squares are fp64 too, for gradients whose squares leave the range of fp32.
        """

    @abstractmethod
    def weighted_sum(self, factors: Tensor, kept: Tensor | None = None) -> Tensor:
        """Sum over examples of factor [B] times gradient, in the parameter's shape, at least fp32.

        Examples that are not `kept` ([B] booleans) contribute exactly zero, NaN or not.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients themselves, [B, *parameter.shape]."""


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor without its graph, in fp32 if it has half precision: norms and sums are never taken in less.

    Without its graph, because that leads back to the tape that holds the contribution: a cycle that no collector sees.
    """
    tensor = tensor.detach()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def squared_row_norms(gradients: Tensor, wide: bool = False) -> Tensor:
    """[B] squared norms of tensors [B, *shape], added up in fp64.

    fp32 sums at most a few thousand squares at a time, so its rounding stays near 1e-7 however large the tensors are;
    only with `wide` are the squares fp64 too, which is several times slower.
    """
    dtype, rows = torch.float64, len(gradients)
    if gradients.numel() == 0:  # of no example
        return torch.zeros(rows, dtype=dtype, device=gradients.device)
    if gradients.dtype == torch.float64 or wide:
        return torch.linalg.vector_norm(gradients.reshape(rows, -1), dim=1, dtype=dtype).square()
    if gradients.dim() > 2 and gradients[0, 0].numel() <= _PIECE:  # a weight: one piece for each output
        return torch.linalg.vector_norm(gradients.flatten(2), dim=2).to(dtype).square().sum(1)
    flat = gradients.reshape(rows, -1)
    count = flat.shape[1] // _PIECE
    pieces, rest = flat[:, : count * _PIECE].unflatten(1, (count, _PIECE)), flat[:, count * _PIECE :]
    total = torch.linalg.vector_norm(pieces, dim=2).to(dtype).square().sum(1)
    return total + torch.linalg.vector_norm(rest, dim=1).to(dtype).square()


def blanked(tensor: Tensor, kept: Tensor | None) -> Tensor:
    """Zeros in the rows (examples) that are not kept; 0 * NaN would still be NaN."""
    if kept is None:
        return tensor
    return torch.where(kept.view(-1, *[1] * (tensor.dim() - 1)), tensor, torch.zeros_like(tensor))


class Dense(Contribution):
    """Gradients that are kept as they are, [B, *shape]."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = at_least_fp32(gradients)
        super().__init__(self.gradients)

    @property
    def flat(self) -> Tensor:
        """[B, size]."""
        return self.gradients.reshape(len(self.gradients), -1)

    def squared_norms(self, wide: bool = False) -> Tensor:
        return squared_row_norms(self.gradients, wide)

    def weighted_sum(self, factors: Tensor, kept: Tensor | None = None) -> Tensor:
        flat = self.flat
        if kept is not None:
            flat[~kept] = 0.0
        return torch.mv(flat.t(), factors.to(flat.dtype)).view(self.gradients.shape[1:])

    def dense(self) -> Tensor:
        return self.gradients


class Pieces(Contribution):
    """Gradients of a few examples at a time, [b, *shape], never copied together; norms are taken while in the cache."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self._squares: list[Tensor] = []

    def append(self, piece: Tensor) -> None:
        """The gradients of the next examples."""
        piece = at_least_fp32(piece).contiguous()
        if not self.pieces:
            super().__init__(piece)
        self.pieces.append(piece)
        self._squares.append(squared_row_norms(piece))

    def squared_norms(self, wide: bool = False) -> Tensor:
        return torch.cat([squared_row_norms(p, True) for p in self.pieces] if wide else self._squares)

    def weighted_sum(self, factors: Tensor, kept: Tensor | None = None) -> Tensor:
        factors = factors.to(self.dtype)
        out = torch.zeros_like(self.pieces[0][0]).view(-1)
        start = 0
        for piece in self.pieces:
            flat = piece.view(len(piece), -1)
            span = slice(start, start + len(piece))
            if kept is not None:
                flat[~kept[span]] = 0.0
            out.addmv_(flat.t(), factors[span])
            start = span.stop
        return out.view(self.pieces[0].shape[1:])

    def dense(self) -> Tensor:
        return torch.cat(self.pieces)


def ghost_norms(product: Tensor, bound: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared norms [B] out of Gram matrices, in fp64, made safe; `bound` is what they would be if no terms cancelled.

    Rounding may have made `product` negative.  The error of the gradient itself, computed in `dtype`, is of the order
    eps * sqrt(bound), which can exceed its norm if almost all of it cancels: the norm is never taken to be less than a
    multiple of that error.
    """
    floor = (1e3 * torch.finfo(dtype).eps) ** 2 * bound
    return torch.maximum(product.clamp_min(0.0), floor)


class Outer(Contribution):
    """Gradients of a matrix that are sums over time of outer products, g_bᵀ x_b: g is [B, T, out], x is [B, T, in]."""

    def __init__(self, g: Tensor, x: Tensor) -> None:
        self.g, self.x = at_least_fp32(g), at_least_fp32(x)
        super().__init__(self.g)

    @staticmethod
    def pays(time: int, outputs: int, inputs: int) -> bool:
        """Whether the two Gram matrices cost less than the gradients themselves would."""
        return 2 * time * (outputs + inputs) < outputs * inputs

    def squared_norms(self, wide: bool = False) -> Tensor:
        g, x = self.g.double(), self.x.double()
        bound = g.square().sum((1, 2)) * x.square().sum((1, 2))
        if g.shape[1] == 1:
            return bound
        # ‖Σ_t g_t x_tᵀ‖² = Σ_{t,s} <g_t, g_s> <x_t, x_s>: two [T, T] Gram matrices in place of an [out, in] gradient.
        product = (torch.bmm(g, g.transpose(1, 2)) * torch.bmm(x, x.transpose(1, 2))).sum((1, 2))
        return ghost_norms(product, bound, self.g.dtype)

    def weighted_sum(self, factors: Tensor, kept: Tensor | None = None) -> Tensor:
        g, x = blanked(self.g, kept), blanked(self.x, kept)
        # One product for the whole batch, in which each example has its factor.
        weighted = g * factors.to(g.dtype)[:, None, None]
        return weighted.flatten(0, 1).t() @ x.flatten(0, 1)

    def dense(self) -> Tensor:
        return torch.bmm(self.g.transpose(1, 2), self.x)


class Rows(Contribution):
    """Gradients of a table with `rows` rows (an embedding), of which each example read `indices` [B, T].

    g, [B, T, width], are the gradients of the values read; zero where none is wanted.
    """

    def __init__(self, indices: Tensor, g: Tensor, rows: int) -> None:
        self.indices, self.g, self.rows = indices, at_least_fp32(g), rows
        super().__init__(self.g)

    @staticmethod
    def pays(time: int, rows: int) -> bool:
        """Whether keeping the rows that were read is cheaper than whole tables."""
        return time * time <= 16 * rows

    def squared_norms(self, wide: bool = False) -> Tensor:
        g = self.g.double()
        bound = g.square().sum((1, 2))
        if g.shape[1] == 1:
            return bound
        same = self.indices[:, :, None] == self.indices[:, None, :]
        gram = torch.bmm(g, g.transpose(1, 2))
        # Not `gram * same`: infinity times zero would spoil what is unrelated.
        product = torch.where(same, gram, torch.zeros_like(gram)).sum((1, 2))
        return ghost_norms(product, bound, self.g.dtype)

    def weighted_sum(self, factors: Tensor, kept: Tensor | None = None) -> Tensor:
        g = blanked(self.g, kept) * factors.to(self.g.dtype)[:, None, None]
        out = g.new_zeros(self.rows, g.shape[2])
        return out.index_add_(0, self.indices.flatten(), g.flatten(0, 1))

    def dense(self) -> Tensor:
        out = self.g.new_zeros(len(self.g), self.rows, self.g.shape[2])
        return out.scatter_add_(1, self.indices[..., None].expand_as(self.g), self.g)


def merged(a: Contribution, b: Contribution) -> Contribution:
    """The contribution of a parameter that was used twice: gradients add up *before* their norm is taken."""
    if isinstance(a, Outer) and isinstance(b, Outer):
        time = a.g.shape[1] + b.g.shape[1]
        if a.g.dtype == b.g.dtype and Outer.pays(time, a.g.shape[2], a.x.shape[2]):
            return Outer(torch.cat([a.g, b.g], 1), torch.cat([a.x, b.x], 1))
    return Dense(a.dense() + b.dense())
