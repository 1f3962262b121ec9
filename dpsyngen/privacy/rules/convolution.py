"""Convolutions in one and two dimensions, and their transposes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsyngen.privacy.contributions import Dense
from dpsyngen.privacy.kernels import Convolution, ConvolutionCall, each_axis
from dpsyngen.privacy.rules.registry import Tape, low_precision, per_example, rule


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Convolution, tape: Tape) -> Tensor:
        x_used, weight_used, bias_used = low_precision(x, weight, bias)
        assert x_used is not None
        assert weight_used is not None
        ctx.save_for_backward(x_used, weight_used)
        ctx.tape, ctx.weight, ctx.bias, ctx.settings, ctx.input_dtype = tape, weight, bias, settings, x.dtype
        return settings.forward(x_used, weight_used, bias_used)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        tape: Tape = ctx.tape
        settings: Convolution = ctx.settings
        if not g.is_contiguous(memory_format=torch.channels_last if g.dim() == 4 else torch.contiguous_format):
            g = g.contiguous()
        if tape.tracks(ctx.weight):
            call = ConvolutionCall(g, x, weight, settings, tape.examples, tape.copies)
            tape.add(ctx.weight, tape.kernels.run(call))
        if ctx.bias is not None and tape.tracks(ctx.bias):
            tape.add(ctx.bias, Dense(per_example(g.flatten(2).sum(2), tape)))
        gx = None
        if ctx.needs_input_grad[0]:
            gx = settings.backward(g, x, weight, settings.groups, [True, False, False])[0].to(ctx.input_dtype)
        return gx, None, None, None, None


def _conv(
    tape: Tape,
    name: str,
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any = 0,
    transposed: bool = False,
) -> Tensor:
    tape.check_rows(name, x)
    if isinstance(padding, str):
        if padding == "valid":
            padding = 0
        else:
            # "same": the library pads the end by one more where the total is odd; do that part beforehand.
            reach = [d * (k - 1) for d, k in zip(each_axis(dilation, dims), weight.shape[2:], strict=True)]
            if any(r % 2 for r in reach):
                ends = [side for r in reversed(reach) for side in (0, r % 2)]
                x = F.pad(x, ends)
            padding = [r // 2 for r in reach]
    settings = Convolution(
        stride=each_axis(stride, dims),
        padding=each_axis(padding, dims),
        dilation=each_axis(dilation, dims),
        groups=groups,
        transposed=transposed,
        output_padding=each_axis(output_padding, dims),
    )
    out: Tensor = _Conv.apply(x, weight, bias, settings, tape)
    return out


_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def _register(function: Any, dims: int) -> None:
    @rule(function, *_CONV_ARGUMENTS)
    def body(
        tape: Tape,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        return _conv(tape, function.__name__, dims, input, weight, bias, stride, padding, dilation, groups)


def _register_transposed(function: Any, dims: int) -> None:
    @rule(function, *_TRANSPOSED_ARGUMENTS)
    def body(
        tape: Tape,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        return _conv(
            tape,
            function.__name__,
            dims,
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            output_padding,
            transposed=True,
        )


_register(F.conv1d, 1)
_register(F.conv2d, 2)
_register_transposed(F.conv_transpose1d, 1)
_register_transposed(F.conv_transpose2d, 2)
