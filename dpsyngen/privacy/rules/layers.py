"""Rules for linear layers, convolutions and their transposes, normalisation, embedding and multi-head attention, and
for parameters that are used without a layer: learned constants, scales, class tokens, weight normalisation.

A function of parameters alone (a view, ``exp``, ``p.t()``) gives a *derived* parameter.  Its per-example gradients are
collected like any other's and go back through the function after the pass, example by example.  Where a parameter meets
the rows of the batch (a sum, a product, a concatenation), it is expanded to one copy a row, each with its gradient.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsyngen.privacy.contributions import Dense, Outer, Rows, at_least_fp32
from dpsyngen.privacy.kernels import Convolution, ConvolutionCall, each_axis
from dpsyngen.privacy.rules.registry import (
    RULES,
    Rule,
    Tape,
    UnsupportedLayer,
    group_norm_backward,
    low_precision,
    per_example,
    refuse_argument,
    rule,
    tensors_in,
)

_Forward = Callable[[], tuple[Tensor, tuple[Tensor | None, ...]]]
_Backward = Callable[..., Tensor | None]


class _Layer(torch.autograd.Function):
    """A call of a layer: `forward()` gives its output and what to save; `backward(g, wanted, *saved)` writes the
    gradients of weight and bias on the tape, and returns that of x if it is `wanted`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, forward: _Forward, backward: _Backward
    ) -> Tensor:
        out, saved = forward()
        ctx.save_for_backward(*saved)
        ctx.layer, ctx.input_dtype = backward, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        gx = ctx.layer(g, ctx.needs_input_grad[0], *ctx.saved_tensors)
        return None if gx is None else gx.to(ctx.input_dtype), None, None, None, None


@rule(F.linear)
def linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Compute ``F.linear`` and record it; for rules of functions that are linear layers inside, too."""
    if tape.tracks(input):
        refuse_argument("linear", "input")
    tape.check_rows("linear", input)

    def forward() -> Any:
        x, w, b = low_precision(input, weight, bias)
        return F.linear(x, w, b), (x, w)

    def backward(g: Tensor, wanted: bool, x: Tensor, w: Tensor) -> Tensor | None:
        # The copies and any sequence axes of an example fold into one "time" axis: [examples, time, features].
        g_time = g.reshape(tape.examples, -1, g.shape[-1])
        x_time = x.reshape(tape.examples, -1, x.shape[-1])
        if tape.tracks(weight):
            pair = Outer(g_time, x_time)
            small = Outer.pays(g_time.shape[1], g.shape[-1], x.shape[-1])
            tape.add(weight, pair if small else Dense(pair.dense()))
        if tape.tracks(bias):
            tape.add(bias, Dense(g_time.sum(1)))
        return g @ w if wanted else None

    return _Layer.apply(input, weight, bias, forward, backward)


# -------------------------------------------------------------------------------------------------------- convolution


def _register_convolution(function: Any, dims: int, *names: str) -> None:
    @rule(function, "input", "weight", "bias", "stride", "padding", *names)
    def body(
        tape: Tape,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        output_padding: Any = 0,
    ) -> Any:
        tape.check_rows(function.__name__, input)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            # The library pads the end by one more where the total is odd; do that part beforehand.
            reach = [d * (k - 1) for d, k in zip(each_axis(dilation, dims), weight.shape[2:], strict=True)]
            if any(r % 2 for r in reach):
                input = F.pad(input, [side for r in reversed(reach) for side in (0, r % 2)])
            padding = [r // 2 for r in reach]
        settings = Convolution(
            stride=each_axis(stride, dims),
            padding=each_axis(padding, dims),
            dilation=each_axis(dilation, dims),
            groups=groups,
            transposed="output_padding" in names,
            output_padding=each_axis(output_padding, dims),
        )

        def forward() -> Any:
            x, w, b = low_precision(input, weight, bias)
            return settings.forward(x, w, b), (x, w)

        def backward(g: Tensor, wanted: bool, x: Tensor, w: Tensor) -> Tensor | None:
            if not g.is_contiguous(memory_format=torch.channels_last if g.dim() == 4 else torch.contiguous_format):
                g = g.contiguous()
            if tape.tracks(weight):
                tape.add(weight, tape.kernels.run(ConvolutionCall(g, x, w, settings, tape.examples, tape.copies)))
            if tape.tracks(bias):
                tape.add(bias, Dense(per_example(g.flatten(2).sum(2), tape)))
            gx: Tensor | None = settings.backward(g, x, w, groups, [True, False, False])[0] if wanted else None
            return gx

        return _Layer.apply(input, weight, bias, forward, backward)


_register_convolution(F.conv1d, 1, "dilation", "groups")
_register_convolution(F.conv2d, 2, "dilation", "groups")
_register_convolution(F.conv_transpose1d, 1, "output_padding", "groups", "dilation")
_register_convolution(F.conv_transpose2d, 2, "output_padding", "groups", "dilation")


# --------------------------------------------------------- group and layer normalisation, which see one row at a time


@rule(F.group_norm)
def _group_norm(
    tape: Tape, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    tape.check_rows("group_norm", input)

    def forward() -> Any:
        x = at_least_fp32(input).contiguous()
        rows, channels = x.shape[:2]
        positions = x[0, 0].numel()  # 1 for inputs [N, C]
        out, mean, rstd = torch.native_group_norm(x, weight, bias, rows, channels, positions, num_groups, eps)
        return out, (x, weight, mean, rstd)

    def backward(g: Tensor, wanted: bool, *saved: Any) -> Tensor | None:
        x, w, mean, rstd = saved
        of = [wanted, tape.tracks(weight), tape.tracks(bias)]
        gx, *own = group_norm_backward(g.contiguous(), x, mean, rstd, w, num_groups, of)
        for parameter, gradient in zip((weight, bias), own, strict=True):
            if gradient is not None:
                tape.add(parameter, Dense(per_example(gradient, tape)))
        return gx

    return _Layer.apply(input, weight, bias, forward, backward)


@rule(F.layer_norm)
def _layer_norm(
    tape: Tape, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    tape.check_rows("layer_norm", input)
    shape = list(normalized_shape)

    def forward() -> Any:
        x = at_least_fp32(input)
        out, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        return out, (x, weight, mean, rstd)

    def backward(g: Tensor, wanted: bool, *saved: Any) -> Tensor | None:
        x, w, mean, rstd = saved
        g = g.contiguous()
        if tape.tracks(weight):
            tape.add(weight, Dense((g * (x - mean) * rstd).reshape(tape.examples, -1, *shape).sum(1)))
        if tape.tracks(bias):
            tape.add(bias, Dense(g.reshape(tape.examples, -1, *shape).sum(1)))
        native, mask = torch.ops.aten.native_layer_norm_backward, [True, False, False]
        gx: Tensor | None = native(g, x, shape, mean, rstd, w, bias, mask)[0] if wanted else None
        return gx

    return _Layer.apply(input, weight, bias, forward, backward)


# ---------------------------------------------------------------------------------------------------------- embedding


@rule(F.embedding)
def _embedding(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq:
        # Both make one example's gradient depend on, or change the weights by, the others.
        raise UnsupportedLayer("an Embedding cannot be private with max_norm or scale_grad_by_freq: turn both off.")
    tape.check_rows("embedding", input)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]

    def backward(g: Tensor, wanted: bool, indices: Tensor) -> None:
        vocabulary, width = weight.shape
        flat = indices.reshape(tape.examples, -1)
        g_flat = g.reshape(tape.examples, flat.shape[1], width)
        if padding_idx is not None:
            g_flat = g_flat.masked_fill((flat == padding_idx)[..., None], 0.0)
        read = Rows(flat, g_flat, vocabulary)
        tape.add(weight, read if Rows.pays(flat.shape[1], vocabulary) else Dense(read.dense()))

    return _Layer.apply(input, weight, None, lambda: (F.embedding(input, weight), (input,)), backward)


# ------------------------------------- multi-head attention: projections in one parameter, and the batch comes second


_ATTENTION = inspect.signature(F.multi_head_attention_forward)


def _multi_head_attention(
    tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    bound = _ATTENTION.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    for name in ("bias_k", "bias_v", "static_k", "static_v", "add_zero_attn"):
        if given[name] is not None and given[name] is not False:
            raise UnsupportedLayer(f"multi-head attention with {name} has no per-example rule: leave it out.")
    for name in ("query", "key", "value", "attn_mask", "key_padding_mask"):
        if tape.tracks(given[name]):
            refuse_argument("multi-head attention", name)
    query, key, value = (given[n] for n in ("query", "key", "value"))
    if query.dim() != 3:
        shape = tuple(query.shape)
        raise UnsupportedLayer(
            f"multi-head attention got a query of shape {shape}, but needs batch_first=True and 3 axes."
        )
    bias = given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        weights = tuple(given[f"{n}_proj_weight"] for n in "qkv")
    else:
        weights = _thirds(tape, given["in_proj_weight"])
    biases = (None, None, None) if bias is None else _thirds(tape, bias)
    heads = given["num_heads"]
    q, k, v = (
        linear(tape, x.transpose(0, 1), w, b).unflatten(2, (heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    mask = _mask(given, q)
    dropout = given["dropout_p"] if given["training"] else 0.0
    attention: Tensor | None = None
    if given["need_weights"]:
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        attention = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        mixed = F.dropout(attention, dropout) @ v
        if given["average_attn_weights"]:
            attention = attention.mean(1)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = linear(tape, mixed.transpose(1, 2).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
    return out.transpose(0, 1), attention


def _thirds(tape: Tape, value: Tensor) -> Any:
    return tape.derive(torch.chunk, (value, 3), {}) if tape.tracks(value) else value.chunk(3)


def _mask(given: dict[str, Any], q: Tensor) -> Tensor | None:
    """Join all masks into one that is added to the scores, [rows or 1, heads or 1, queries, keys]."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -math.inf)

    out = None
    if given["attn_mask"] is not None:
        out = additive(given["attn_mask"])
        out = out[None, None] if out.dim() == 2 else out.view(len(q), q.shape[1], *out.shape[1:])
    if given["key_padding_mask"] is not None:
        padding = additive(given["key_padding_mask"])[:, None, None, :]
        out = padding if out is None else out + padding
    return out


RULES[F.multi_head_attention_forward] = _multi_head_attention


# ------------------------------------------------------------------------------------------ parameters without a layer


def _copies(tape: Tape, parameter: Tensor, dims: int) -> Any:
    """Expand the parameter to one copy a row, in `dims` axes."""

    def forward() -> Any:
        shape = parameter.shape[1:] if parameter.dim() == dims else parameter.shape
        padded = parameter.reshape(1, *[1] * (dims - 1 - len(shape)), *shape)
        return padded.expand(tape.examples * tape.copies, *padded.shape[1:]), ()

    def backward(g: Tensor, wanted: bool) -> None:
        tape.add(parameter, Dense(per_example(g, tape).reshape(tape.examples, *parameter.shape)))

    return _Layer.apply(parameter, None, None, forward, backward)


def _for_each_row(tape: Tape, parameter: Tensor, dims: int, function: str) -> Tensor:
    """Expand the parameter to one copy a row, in `dims` axes that broadcast with the batch."""
    if parameter.dim() == dims and parameter.shape[0] != 1:
        base = tape.expanded_from(parameter)
        if base is None or parameter.shape[0] != tape.examples * tape.copies:
            raise UnsupportedLayer(
                f"{function} uses a parameter of shape {tuple(parameter.shape)} whose first axis is that of the batch: "
                "give it a first dimension of 1, or expand it to the batch."
            )
        if base.dim() == dims and base.shape[0] != 1:
            raise UnsupportedLayer(f"{function}: a parameter of shape {tuple(base.shape)} spans the batch axis.")
        return _copies(tape, base, dims).expand(parameter.shape)
    if parameter.dim() > dims:
        shape = tuple(parameter.shape)
        raise UnsupportedLayer(
            f"{function}: a parameter of shape {shape} beside {dims} axes of rows: keep the batch first."
        )
    return _copies(tape, parameter, dims)


def _elementwise(tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that pairs entries by broadcasting, so that rows stay apart."""
    name = getattr(func, "__name__", "a function")
    others = [v for v in tensors_in((args, kwargs)) if isinstance(v, Tensor) and not tape.is_constant(v)]
    lead = max(others, key=lambda v: v.dim())
    tape.check_rows(name, lead)

    def swap(value: Any) -> Any:
        return _for_each_row(tape, value, lead.dim(), name) if tape.tracks(value) else value

    out = func(*(swap(v) for v in args), **{k: swap(v) for k, v in kwargs.items()})
    tape.check_rows(name, out)
    return out


def _concatenate(tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Concatenate a parameter that was expanded to the batch with the batch, along another axis than the first."""
    parts = list(kwargs.get("tensors", args[0] if args else ()))
    axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    dims = parts[0].dim()
    if axis % dims == 0:
        raise UnsupportedLayer(f"{func.__name__} joins a parameter to the batch, where it would pass for an example.")
    for part in parts:
        tape.check_rows(func.__name__, part)
    return func([_for_each_row(tape, p, dims, func.__name__) if tape.tracks(p) else p for p in parts], axis)


def _matrix_product(tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply rows by a matrix of parameters: a linear layer without a bias."""
    x, matrix = (*args, *kwargs.values())[:2]
    if tape.tracks(x) or matrix.dim() != 2 or x.dim() < 2:
        shapes = f"{tuple(x.shape)} and {tuple(matrix.shape)}"
        raise UnsupportedLayer(f"{func.__name__} wants the rows first and a parameter [in, out] second, not {shapes}.")
    return linear(tape, x, tape.derive(torch.t, (matrix,), {}), None)


def _expand_as(tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Expand a parameter to the shape of the batch, of which nothing else is used."""
    parameter, like = (*args, *kwargs.values())[:2]
    return tape.derive(Tensor.expand, (parameter, like.shape), {})


def _register(body: Rule, *names: str) -> None:
    """Register a rule for the functions of these names in torch, and for the methods of tensors."""
    for name in names:
        for owner in (torch, Tensor):
            if hasattr(owner, name):
                RULES[getattr(owner, name)] = body


_ARITHMETIC = ("add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow")
_register(_elementwise, *(f"__{p}{word}__" for word in ("add", "sub", "mul", "truediv", "pow") for p in ("", "r", "i")))
_register(_elementwise, *_ARITHMETIC, *(f"{word}_" for word in _ARITHMETIC))
_register(_elementwise, "addcmul", "addcmul_", "lerp", "lerp_", "where", "maximum", "minimum")
_register(_concatenate, "cat", "concat", "concatenate")
_register(_expand_as, "expand_as")
_register(_matrix_product, "matmul", "__matmul__", "mm")
