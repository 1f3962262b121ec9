"""Group and layer normalisation, which see one row at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsyngen.privacy.contributions import Dense
from dpsyngen.privacy.rules.registry import Tape, full_precision, per_example, rule

_group_norm_backward = torch.ops.aten.native_group_norm_backward


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, tape: Tape
    ) -> Tensor:
        x_used = full_precision(x).contiguous()
        rows, channels = x_used.shape[:2]
        positions = x_used[0, 0].numel()  # 1 for inputs [N, C]
        out, mean, rstd = torch.native_group_norm(x_used, weight, bias, rows, channels, positions, groups, eps)
        ctx.save_for_backward(x_used, weight, mean, rstd)
        ctx.tape, ctx.weight, ctx.bias, ctx.groups, ctx.input_dtype = tape, weight, bias, groups, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        tape: Tape = ctx.tape
        rows, channels = x.shape[:2]
        positions = x[0, 0].numel()
        own = [p is not None and tape.tracks(p) for p in (ctx.weight, ctx.bias)]
        # Taken as one row of rows*channels channels, the same call gives the gradients of weight and bias for each row
        # instead of their sum.
        gx, g_weight, g_bias = _group_norm_backward(
            g.contiguous(),
            x,
            mean,
            rstd,
            None if weight is None else weight.repeat(rows),
            1,
            rows * channels,
            positions,
            rows * ctx.groups,
            [ctx.needs_input_grad[0], *own],
        )
        if own[0]:
            tape.add(ctx.weight, Dense(per_example(g_weight.view(rows, channels), tape)))
        if own[1]:
            tape.add(ctx.bias, Dense(per_example(g_bias.view(rows, channels), tape)))
        return None if gx is None else gx.view_as(x).to(ctx.input_dtype), None, None, None, None, None


@rule(F.group_norm, "input", "num_groups", "weight", "bias", "eps")
def _group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    tape.check_rows("group_norm", input)
    out: Tensor = _GroupNorm.apply(input, num_groups, weight, bias, eps, tape)
    return out


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tape: Tape,
    ) -> Tensor:
        x_used = full_precision(x)
        out, mean, rstd = torch.native_layer_norm(x_used, shape, weight, bias, eps)
        ctx.save_for_backward(x_used, weight, mean, rstd)
        ctx.tape, ctx.weight, ctx.bias, ctx.shape, ctx.input_dtype = tape, weight, bias, shape, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        tape: Tape = ctx.tape
        g = g.contiguous()

        def summed(t: Tensor) -> Tensor:
            return t.reshape(tape.examples, -1, *ctx.shape).sum(1)

        if ctx.weight is not None and tape.tracks(ctx.weight):
            tape.add(ctx.weight, Dense(summed(g * (x - mean) * rstd)))
        if ctx.bias is not None and tape.tracks(ctx.bias):
            tape.add(ctx.bias, Dense(summed(g)))
        gx = None
        if ctx.needs_input_grad[0]:
            gx = torch.ops.aten.native_layer_norm_backward(
                g, x, ctx.shape, mean, rstd, weight, ctx.bias, [True, False, False]
            )[0].to(ctx.input_dtype)
        return gx, None, None, None, None, None


@rule(F.layer_norm, "input", "normalized_shape", "weight", "bias", "eps")
def _layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    tape.check_rows("layer_norm", input)
    out: Tensor = _LayerNorm.apply(input, list(normalized_shape), weight, bias, eps, tape)
    return out
