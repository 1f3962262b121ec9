"""Embeddings: tables whose rows are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsyngen.privacy.contributions import Dense, Rows
from dpsyngen.privacy.rules.registry import Tape, UnsupportedLayer, rule


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, padding_idx: int | None, tape: Tape) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.tape, ctx.weight, ctx.padding_idx = tape, weight, padding_idx
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        tape: Tape = ctx.tape
        vocabulary, width = ctx.weight.shape
        flat = indices.reshape(tape.examples, -1)
        g_flat = g.reshape(tape.examples, flat.shape[1], width)
        if ctx.padding_idx is not None:
            g_flat = g_flat.masked_fill((flat == ctx.padding_idx)[..., None], 0.0)
        read = Rows(flat, g_flat, vocabulary)
        tape.add(ctx.weight, read if Rows.pays(flat.shape[1], vocabulary) else Dense(read.dense()))
        return None, None, None, None


@rule(F.embedding, "input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
def _embedding(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq:
        # Both make one example's gradient depend on, or change the weights by, the others.
        raise UnsupportedLayer(
            "an Embedding with max_norm or scale_grad_by_freq cannot be trained privately: turn both options off."
        )
    tape.check_rows("embedding", input)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    out: Tensor = _Embedding.apply(input, weight, padding_idx, tape)
    return out
