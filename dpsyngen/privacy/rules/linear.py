"""Linear layers, with any number of axes between batch and features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsyngen.privacy.contributions import Dense, Outer
from dpsyngen.privacy.rules.registry import Tape, low_precision, refuse_argument, rule


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tape: Tape) -> Tensor:
        x_used, weight_used, bias_used = low_precision(x, weight, bias)
        assert x_used is not None
        assert weight_used is not None
        ctx.save_for_backward(x_used, weight_used)
        ctx.tape, ctx.weight, ctx.bias, ctx.input_dtype = tape, weight, bias, x.dtype
        return F.linear(x_used, weight_used, bias_used)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        tape: Tape = ctx.tape
        # The copies and any sequence axes of an example fold into one "time" axis: [examples, time, features].
        g_time = g.reshape(tape.examples, -1, g.shape[-1])
        x_time = x.reshape(tape.examples, -1, x.shape[-1])
        if tape.tracks(ctx.weight):
            pair = Outer(g_time, x_time)
            small = Outer.pays(g_time.shape[1], g.shape[-1], x.shape[-1])
            tape.add(ctx.weight, pair if small else Dense(pair.dense()))
        if ctx.bias is not None and tape.tracks(ctx.bias):
            tape.add(ctx.bias, Dense(g_time.sum(1)))
        return ((g @ weight).to(ctx.input_dtype) if ctx.needs_input_grad[0] else None), None, None, None


def linear(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, recorded."""
    if tape.tracks(x):
        refuse_argument("linear", "input")
    tape.check_rows("linear", x)
    out: Tensor = _Linear.apply(x, weight, bias, tape)
    return out


@rule(F.linear, "input", "weight", "bias")
def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(tape, input, weight, bias)
