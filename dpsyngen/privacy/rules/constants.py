"""Rules for parameters that are used without a layer: learned constants, scales, class tokens, weight normalisation.

A function of parameters alone (a view, ``exp``, ``p.t()``) gives a *derived* parameter.  Its per-example gradients are
collected like any other's and go back through the function after the pass, example by example.  Where a parameter meets
the rows of the batch (a sum, a product, a concatenation), it is expanded to one copy a row, each with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpsyngen.privacy.contributions import Dense
from dpsyngen.privacy.rules.layers import linear
from dpsyngen.privacy.rules.registry import RULES, Rule, Tape, UnsupportedLayer, per_example, tensors_in


class _ForEachRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dims: int, tape: Tape) -> Tensor:
        ctx.tape, ctx.parameter = tape, parameter
        shape = parameter.shape[1:] if parameter.dim() == dims else parameter.shape
        rows = tape.examples * tape.copies
        padded = parameter.reshape(1, *[1] * (dims - 1 - len(shape)), *shape)
        return padded.expand(rows, *padded.shape[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        tape: Tape = ctx.tape
        parameter: Tensor = ctx.parameter
        tape.add(parameter, Dense(per_example(g, tape).reshape(tape.examples, *parameter.shape)))
        return None, None, None


def _for_each_row(tape: Tape, parameter: Tensor, dims: int, function: str) -> Tensor:
    """Expand the parameter to one copy a row, in `dims` axes that broadcast with the batch."""
    if parameter.dim() == dims and parameter.shape[0] != 1:
        base = tape.expanded_from(parameter)
        if base is None or parameter.shape[0] != tape.examples * tape.copies:
            raise UnsupportedLayer(
                f"{function} uses a parameter of shape {tuple(parameter.shape)} with one entry for each row of the "
                "batch, or along its first axis: a parameter cannot depend on the place of an example in the batch.  "
                "Give it a first dimension of 1, or expand it to the batch."
            )
        if base.dim() == dims and base.shape[0] != 1:
            raise UnsupportedLayer(f"{function}: a parameter of shape {tuple(base.shape)} spans the batch axis.")
        out: Tensor = _ForEachRow.apply(base, dims, tape)
        return out.expand(parameter.shape)
    if parameter.dim() > dims:
        raise UnsupportedLayer(
            f"{function} combines a parameter of shape {tuple(parameter.shape)} with rows that have {dims} axes, so "
            "the first axis of the result is no longer the batch.  Keep the batch first."
        )
    rows: Tensor = _ForEachRow.apply(parameter, dims, tape)
    return rows


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
        raise UnsupportedLayer(
            f"{func.__name__} joins a parameter to the batch axis, where it would pass for another example."
        )
    for part in parts:
        tape.check_rows(func.__name__, part)
    return func([_for_each_row(tape, p, dims, func.__name__) if tape.tracks(p) else p for p in parts], axis)


def _matrix_product(tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply rows by a matrix of parameters: a linear layer without a bias."""
    x, matrix = (*args, *kwargs.values())[:2]
    if tape.tracks(x) or matrix.dim() != 2 or x.dim() < 2:
        raise UnsupportedLayer(
            f"{func.__name__} takes a parameter only as its second factor, of shape [in, out], and the rows of the "
            f"batch as its first; given were {tuple(x.shape)} and {tuple(matrix.shape)}."
        )
    return linear(tape, x, tape.derive(torch.t, (matrix,), {}), None)


def _expand_as(tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Expand a parameter to the shape of the batch, of which nothing else is used."""
    parameter, like = (*args, *kwargs.values())[:2]
    return tape.derive(Tensor.expand, (parameter, like.shape), {})


def _table() -> dict[Callable[..., Any], Rule]:
    names: dict[str, Any] = {}
    for word in ("add", "sub", "mul", "truediv", "pow"):
        names |= {f"__{p}{word}__": _elementwise for p in ("", "r", "i")}
    for word in ("add", "sub", "rsub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow"):
        names |= {word: _elementwise, word + "_": _elementwise}
    names |= dict.fromkeys(("addcmul", "addcmul_", "lerp", "lerp_", "where", "maximum", "minimum"), _elementwise)
    names |= dict.fromkeys(("cat", "concat", "concatenate"), _concatenate)
    names["expand_as"] = _expand_as
    names |= dict.fromkeys(("matmul", "__matmul__", "mm"), _matrix_product)
    out: dict[Callable[..., Any], Rule] = {}
    for name, body in names.items():
        for owner in (torch, Tensor):
            if hasattr(owner, name):
                out[getattr(owner, name)] = body
    return out


RULES |= _table()
