"""One rule per layer function: how its parameters' per-example gradients come out of the one backward pass.

A rule replaces a call such as ``F.conv2d(x, weight, ...)`` by an :class:`torch.autograd.Function` whose forward is
the same call and whose backward computes (a) the gradient of the input, as ever, and (b) the weight gradient *of
each example* instead of the sum over the batch, which it hands to a tape.  The summed weight gradient is never
computed, which is where the time goes that other methods spend twice.

Rows and examples: a layer sees ``rows = examples * copies`` rows, the copies of one example next to each other
(noise multiplicity K = copies).  The gradient of an example is the sum over its rows.

Adding a layer type is adding one rule: a function ``(tape, func, args, kwargs) -> output`` under ``@rule(function)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_convolution_backward = torch.ops.aten.convolution_backward


class Tape(Protocol):
    """What a rule needs of the engine that records."""

    examples: int
    copies: int

    def tracks(self, value: object) -> bool:
        """Whether `value` is a parameter whose per-example gradient is wanted."""
        ...

    def add(self, parameter: Tensor, per_example: Tensor) -> None:
        """Add ``per_example`` of shape [examples, *parameter.shape] to what was recorded for `parameter`."""
        ...

    def check_rows(self, layer: str, value: Tensor) -> None:
        """Raise unless the leading dimension of `value` is examples * copies."""
        ...


Rule = Callable[[Tape, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[Callable[..., Any], Rule] = {}


def rule(function: Callable[..., Any], *parameters: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the rule of `function`, whose arguments are named `parameters` in order."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        defaults = {
            name: p.default
            for name, p in inspect.signature(body).parameters.items()
            if p.default is not inspect.Parameter.empty
        }

        def apply(tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = dict(zip(parameters, args, strict=False)) | kwargs
            for name, value in bound.items():
                # Rules give weights and biases a gradient only through the tape, and all else only through autograd.
                own = name in ("weight", "bias")
                if isinstance(value, Tensor) and value.requires_grad and tape.tracks(value) != own:
                    _refuse_argument(function.__name__, name)
            return body(tape, **(defaults | bound))

        RULES[function] = apply
        return body

    return decorate


def _refuse_argument(function: str, argument: str) -> None:
    from dpsyngen.privacy.per_example import UnsupportedLayer

    raise UnsupportedLayer(
        f"{function} got as its {argument} a tensor whose gradient would be lost or left unclipped: weights and biases "
        "must be trainable parameters of the module (or frozen), and its input must not be one."
    )


def _pair(value: int | tuple[int, ...] | list[int], dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims if len(value) == 1 else 1)


def _sum_copies(per_row: Tensor, tape: Tape) -> Tensor:
    """[rows, ...] -> [examples, ...], summing the copies of each example."""
    if tape.copies == 1:
        return per_row
    return per_row.view(tape.examples, tape.copies, *per_row.shape[1:]).sum(1)


# ------------------------------------------------------------------------------------------------ linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tape: Tape) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.bias = tape, bias
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        tape: Tape = ctx.tape
        examples = tape.examples
        # The copies and any sequence axes of an example fold into one "time" axis: [examples, time, features].
        g_time = g.reshape(examples, -1, g.shape[-1])
        if tape.tracks(weight):
            tape.add(weight, torch.bmm(g_time.transpose(1, 2), x.reshape(examples, -1, x.shape[-1])))
        if ctx.bias is not None and tape.tracks(ctx.bias):
            tape.add(ctx.bias, g_time.sum(1))
        return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None


@rule(F.linear, "input", "weight", "bias")
def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    tape.check_rows("linear", input)
    return _Linear.apply(input, weight, bias, tape)


# ------------------------------------------------------------------------------------------- convolution


class _ConvSettings:
    """The arguments of a convolution besides its tensors, as ATen wants them."""

    __slots__ = ("dilation", "groups", "output_padding", "padding", "stride", "transposed")

    def __init__(
        self,
        dims: int,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        *,
        transposed: bool = False,
        output_padding: Any = 0,
    ) -> None:
        self.stride, self.padding, self.dilation = (_pair(v, dims) for v in (stride, padding, dilation))
        self.output_padding, self.groups, self.transposed = _pair(output_padding, dims), groups, transposed

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, groups: int, mask: list[bool]) -> Any:
        return _convolution_backward(
            g,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            groups,
            mask,
        )


# Positions per example (copies x output height x width) from which one library call per example beats a single
# grouped call.  A constant, not a measurement at start-up, so that a resumed run adds in the same order.
_LOOP_FROM_POSITIONS = 512


def conv_weight_per_example(
    g: Tensor, x: Tensor, weight: Tensor, settings: _ConvSettings, examples: int, copies: int
) -> Tensor:
    """Weight gradients of a convolution for each example.

    Args:
        g: gradient of the output, [examples*copies, C_out, *spatial_out].
        x: input of the layer, [examples*copies, C_in, *spatial_in].
        weight: the layer's weight (its values are not used).
        settings: stride, padding, dilation, groups.
        examples: number of examples.
        copies: rows of each example.

    Returns:
        [examples, *weight.shape].
    """
    spatial = weight.shape[2:]
    pointwise = (
        all(s == 1 for s in spatial)
        and settings.groups == 1
        and not settings.transposed
        and all(s == 1 for s in settings.stride)
        and all(p == 0 for p in settings.padding)
    )
    if pointwise:
        per_row = torch.bmm(g.flatten(2), x.flatten(2).transpose(1, 2))
        summed = per_row.view(examples, copies, *per_row.shape[1:]).sum(1) if copies > 1 else per_row
        return summed.view(examples, *weight.shape)
    positions = copies * g[0, 0].numel()
    only_weight = [False, True, False]
    if positions >= _LOOP_FROM_POSITIONS:
        out = torch.empty((examples, *weight.shape), dtype=g.dtype, device=g.device)
        for b in range(examples):
            rows = slice(b * copies, (b + 1) * copies)
            out[b] = settings.backward(g[rows], x[rows], weight, settings.groups, only_weight)[1]
        return out

    # One call: the examples become groups of channels, the copies become the batch.
    def examples_to_channels(t: Tensor) -> Tensor:
        if copies == 1:
            return t.reshape(1, examples * t.shape[1], *t.shape[2:])
        split = t.reshape(examples, copies, *t.shape[1:])
        return split.transpose(0, 1).reshape(copies, examples * t.shape[1], *t.shape[2:])

    # Only the shape of the repeated weight matters here, so no memory is spent on its values.
    repeated = weight.new_empty(()).expand(examples * weight.shape[0], *weight.shape[1:])
    grouped = settings.backward(
        examples_to_channels(g), examples_to_channels(x), repeated, settings.groups * examples, only_weight
    )[1]
    return grouped.view(examples, *weight.shape)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: _ConvSettings, tape: Tape
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.bias, ctx.settings = tape, bias, settings
        return settings.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        tape: Tape = ctx.tape
        settings: _ConvSettings = ctx.settings
        g = g.contiguous()
        if tape.tracks(weight):
            tape.add(weight, conv_weight_per_example(g, x, weight, settings, tape.examples, tape.copies))
        if ctx.bias is not None and tape.tracks(ctx.bias):
            tape.add(ctx.bias, _sum_copies(g.flatten(2).sum(2), tape))
        gx = None
        if ctx.needs_input_grad[0]:
            gx = settings.backward(g, x, weight, settings.groups, [True, False, False])[0]
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
) -> Tensor:
    tape.check_rows(name, x)
    if isinstance(padding, str):
        if padding == "valid":
            padding = 0
        else:
            # "same": the library pads the end by one more where the total is odd; do that part beforehand.
            reach = [d * (k - 1) for d, k in zip(_pair(dilation, dims), weight.shape[2:], strict=True)]
            if any(r % 2 for r in reach):
                ends = [side for r in reversed(reach) for side in (0, r % 2)]
                x = F.pad(x, ends)
            padding = [r // 2 for r in reach]
    settings = _ConvSettings(dims, stride, padding, dilation, groups)
    return _Conv.apply(x, weight, bias, settings, tape)


_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@rule(F.conv1d, *_CONV_ARGUMENTS)
def _conv1d(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    return _conv(tape, "conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


@rule(F.conv2d, *_CONV_ARGUMENTS)
def _conv2d(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    return _conv(tape, "conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


# ---------------------------------------------------------------------------------------- normalisation


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, tape: Tape
    ) -> Tensor:
        x = x.contiguous()
        rows, channels = x.shape[:2]
        positions = x[0, 0].numel()  # 1 for inputs [N, C]
        out, mean, rstd = torch.native_group_norm(x, weight, bias, rows, channels, positions, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.tape, ctx.bias, ctx.groups = tape, bias, groups
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        tape: Tape = ctx.tape
        rows, channels = x.shape[:2]
        positions = x[0, 0].numel()
        g = g.contiguous()
        sum_g = g.reshape(rows, channels, -1).sum(2)
        if weight is not None and tape.tracks(weight):
            # d out / d weight = (x - mean) rstd, with one mean and rstd for each group of channels.
            sum_gx = (g * x).reshape(rows, channels, -1).sum(2)
            each = channels // ctx.groups
            centred = sum_gx - sum_g * mean.repeat_interleave(each, 1)
            tape.add(weight, _sum_copies(centred * rstd.repeat_interleave(each, 1), tape))
        if ctx.bias is not None and tape.tracks(ctx.bias):
            tape.add(ctx.bias, _sum_copies(sum_g, tape))
        gx = None
        if ctx.needs_input_grad[0]:
            gx = torch.ops.aten.native_group_norm_backward(
                g, x, mean, rstd, weight, rows, channels, positions, ctx.groups, [True, False, False]
            )[0]
        return gx, None, None, None, None, None


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
    return _GroupNorm.apply(input, num_groups, weight, bias, eps, tape)


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
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.tape, ctx.bias, ctx.shape = tape, bias, shape
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        tape: Tape = ctx.tape
        g = g.contiguous()

        def per_example(t: Tensor) -> Tensor:
            return t.reshape(tape.examples, -1, *ctx.shape).sum(1)

        if weight is not None and tape.tracks(weight):
            tape.add(weight, per_example(g * (x - mean) * rstd))
        if ctx.bias is not None and tape.tracks(ctx.bias):
            tape.add(ctx.bias, per_example(g))
        gx = None
        if ctx.needs_input_grad[0]:
            gx = torch.ops.aten.native_layer_norm_backward(
                g, x, ctx.shape, mean, rstd, weight, ctx.bias, [True, False, False]
            )[0]
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
    return _LayerNorm.apply(input, list(normalized_shape), weight, bias, eps, tape)


# -------------------------------------------------------------------------------------------- embedding


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, padding_idx: int | None, tape: Tape) -> Tensor:
        ctx.save_for_backward(indices, weight)
        ctx.tape, ctx.padding_idx = tape, padding_idx
        return F.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        indices, weight = ctx.saved_tensors
        tape: Tape = ctx.tape
        vocabulary, width = weight.shape
        flat = indices.reshape(tape.examples, -1)
        g_flat = g.reshape(tape.examples, flat.shape[1], width)
        if ctx.padding_idx is not None:
            g_flat = g_flat.masked_fill((flat == ctx.padding_idx)[..., None], 0.0)
        out = g.new_zeros(tape.examples, vocabulary, width)
        out.scatter_add_(1, flat[..., None].expand(-1, -1, width), g_flat)
        tape.add(weight, out)
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
        from dpsyngen.privacy.per_example import UnsupportedLayer

        raise UnsupportedLayer(
            "an Embedding with max_norm or scale_grad_by_freq cannot be trained privately: turn both options off."
        )
    tape.check_rows("embedding", input)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _Embedding.apply(input, weight, padding_idx, tape)
