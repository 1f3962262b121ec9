"""One pass of a model: what watches the functions that it calls, their rules, and the tape that rules write on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dpsyngen.errors import DpsyngenError
from dpsyngen.privacy.contributions import Contribution, Dense, merged
from dpsyngen.privacy.kernels import KernelChoices


class UnsupportedLayer(DpsyngenError, RuntimeError):
    """The model uses a parameter in a way whose per-example gradient is not known, or mixes examples.

    Not a TypeError: Python's arithmetic operators swallow those.
    """


def tensors_in(values: Iterable[Any]) -> Iterator[Any]:
    """Everything in nested lists, tuples and dictionaries."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
        else:
            yield value


class Tape:
    """Records what each layer contributes to the gradients of one pass of B examples with K copies each.

    `parameters` are those whose gradients are wanted, `constants` the ids of buffers and frozen parameters.
    """

    def __init__(
        self, parameters: dict[str, Tensor], constants: set[int], kernels: KernelChoices, examples: int, copies: int
    ) -> None:
        self.examples, self.copies, self.kernels = examples, copies, kernels
        self._names = list(parameters)
        self._constants = constants
        self._position = {id(p): i for i, p in enumerate(parameters.values())}
        self.recorded: dict[int, Contribution] = {}
        # Derived parameters: (leaf that the model goes on with, the same value with its graph, what it came from).
        self._derived: list[tuple[Tensor, Tensor, list[Tensor], Callable[..., Any]]] = []

    def tracks(self, value: object) -> TypeGuard[Tensor]:
        """Whether `value` is a parameter whose per-example gradient is wanted, or derived from such alone."""
        return id(value) in self._position

    def any_tracked(self, values: Iterable[Any]) -> bool:
        """Whether one of the values is tracked, or something in a list or tuple among them."""
        for value in values:  # on the path of every function call
            if self.tracks(value) or (isinstance(value, (list, tuple)) and self.any_tracked(value)):
                return True
        return False

    def is_constant(self, value: Tensor) -> bool:
        """Whether `value` is a parameter, derived from some, or a buffer or frozen parameter of the module."""
        return self.tracks(value) or id(value) in self._constants

    def name_of(self, value: object) -> str:
        """The name of a parameter, or of the one that it is derived from."""
        position = self._position[id(value)]
        while position >= len(self._names):
            position = self._position[id(self._derived[position - len(self._names)][2][0])]
        return self._names[position]

    def add(self, parameter: Tensor, contribution: Contribution) -> None:
        """Add a layer call's contribution to what was recorded for `parameter`."""
        position = self._position[id(parameter)]
        before = self.recorded.get(position)
        self.recorded[position] = contribution if before is None else merged(before, contribution)

    def check_rows(self, layer: str, value: Tensor) -> None:
        """Raise unless the leading dimension of `value` is examples * copies."""
        rows = self.examples * self.copies
        if value.dim() == 0 or value.shape[0] != rows:
            raise UnsupportedLayer(
                f"{layer} got an input of shape {tuple(value.shape)}, but the first dimension must be the {rows} rows "
                f"of the batch ({self.examples} examples x {self.copies} copies): keep it first in all layers."
            )

    # ------------------------------------------------------------------------------- derived parameters

    def derive(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of parameters alone and make its result a derived parameter of this pass."""
        origins = [v for v in tensors_in((args, kwargs)) if self.tracks(v)]

        def follow(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(follow(v) for v in value)
            if not isinstance(value, Tensor) or not value.requires_grad or self.tracks(value):
                return value
            leaf = value.detach().requires_grad_()
            self._position[id(leaf)] = len(self._names) + len(self._derived)
            self._derived.append((leaf, value, origins, func))
            return leaf

        return follow(func(*args, **kwargs))

    def expanded_from(self, value: Tensor) -> Tensor | None:
        """The parameter that `value` repeats along new or single axes, or None if it is not such a repetition."""
        position = self._position[id(value)]
        if position < len(self._names):
            return None
        _, _, origins, func = self._derived[position - len(self._names)]
        if getattr(func, "__name__", "") not in ("expand", "expand_as", "broadcast_to", "repeat"):
            return None
        base = origins[0]
        # `repeat` also tiles axes that have entries of their own; only those of length one repeat like `expand`.
        aligned = (1,) * (value.dim() - base.dim()) + tuple(base.shape)
        return base if all(a in (1, v) for a, v in zip(aligned, value.shape, strict=True)) else None

    def send_back(self) -> None:
        """Turn gradients of derived parameters into those of the parameters they came from, last derived first."""
        for i in reversed(range(len(self._derived))):
            contribution = self.recorded.pop(len(self._names) + i, None)
            if contribution is None:
                continue
            _, value, origins, _ = self._derived[i]
            gradients = torch.autograd.grad(
                value, origins, contribution.dense(), retain_graph=True, allow_unused=True, is_grads_batched=True
            )
            for origin, gradient in zip(origins, gradients, strict=True):
                if gradient is not None:
                    self.add(origin, Dense(gradient))


Rule = Callable[[Tape, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[Callable[..., Any], Rule] = {}
LAYERS: set[Callable[..., Any]] = set()
"""Functions whose rule says what is allowed, even where the input is a constant of the module."""


def rule(function: Callable[..., Any], *parameters: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated rule for `function`, whose arguments have the names `parameters` (else as the rule's)."""

    def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(body).parameters
        defaults = {name: p.default for name, p in signature.items() if p.default is not p.empty}
        names = parameters or tuple(signature)[1:]  # the first is the tape

        def apply(tape: Tape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound = dict(zip(names, args, strict=False)) | kwargs
            for name, value in bound.items():
                # Rules give weights and biases a gradient only through the tape, and all else only through autograd.
                own = name in ("weight", "bias")
                if isinstance(value, Tensor) and value.requires_grad and tape.tracks(value) != own:
                    refuse_argument(function.__name__, name)
            return body(tape, **(defaults | bound))

        RULES[function] = apply
        LAYERS.add(function)
        return body

    return decorate


class Recorder(TorchFunctionMode):
    """Sends each function call with a trainable parameter to its rule.

    Functions of parameters alone make derived parameters; anything else with a parameter in it is refused.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # 1. Layers that mix examples are refused, with parameters or without.
        if func in _MIXING:
            _MIXING[func](args, kwargs)
        # 2. A call without a tracked parameter runs as it is.
        tape = self._tape
        if not tape.any_tracked(args) and not (kwargs and tape.any_tracked(kwargs.values())):
            return func(*args, **kwargs)
        if func in LAYERS:
            return RULES[func](tape, func, args, kwargs)
        # 3. A function of parameters and constants alone makes a derived parameter.
        values = [v for v in tensors_in((args, kwargs)) if isinstance(v, Tensor)]
        if all(tape.is_constant(v) for v in values):
            return tape.derive(func, args, kwargs)
        # 4. Where a parameter meets the batch there must be a rule.
        if func in RULES:
            return RULES[func](tape, func, args, kwargs)
        out = func(*args, **kwargs)
        # Looking at a parameter (its shape, its dtype) is fine; computing with it is not.
        if any(isinstance(o, Tensor) and o.requires_grad and not tape.tracks(o) for o in tensors_in((out,))):
            name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
            first = next(v for v in values if tape.tracks(v))
            raise UnsupportedLayer(
                f"parameter {tape.name_of(first)!r} is used by {name} together with the batch, which has no "
                f"per-example rule.  Known: {', '.join(sorted({f.__name__ for f in RULES}))}.  Freeze the parameter "
                "(requires_grad=False), replace the layer, or add a rule in dpsyngen.privacy.rules."
            )
        return out


def _refuse_batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("training", args[5] if len(args) > 5 else False):
        raise UnsupportedLayer(
            "batch normalisation mixes the examples of a batch, so one example's gradient cannot be bounded.  "
            "Use GroupNorm instead, or put the layer in eval mode with fixed public statistics."
        )


def _refuse_running_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    running = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
    if running is not None and kwargs.get("use_input_stats", args[5] if len(args) > 5 else True):
        raise UnsupportedLayer(
            "instance normalisation with track_running_stats=True would release statistics of the private examples "
            "without noise: turn track_running_stats off, or use GroupNorm."
        )


_MIXING: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], None]] = {
    F.batch_norm: _refuse_batch_norm,
    torch.batch_norm: _refuse_batch_norm,
    torch.native_batch_norm: _refuse_batch_norm,
    F.instance_norm: _refuse_running_statistics,
}


def refuse_argument(function: str, argument: str) -> NoReturn:
    """Raise UnsupportedLayer for a tensor in a place where its gradient would not be clipped."""
    raise UnsupportedLayer(
        f"{function} got as its {argument} a tensor whose gradient would be lost or left unclipped: weights and biases "
        "must be trainable parameters of the module (or frozen), and its input must not be one."
    )


def per_example(per_row: Tensor, tape: Tape) -> Tensor:
    """[rows, ...] -> [examples, ...], summing the copies of each example."""
    if tape.copies == 1:
        return per_row
    return per_row.unflatten(0, (tape.examples, tape.copies)).sum(1)


def low_precision(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast as autocast casts the inputs of matrix products and convolutions; leave them alone outside of autocast.

    Rules bypass autocast's own casts, and their backward passes need the tensors that the forward pass used.
    """
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


_GRID = 65_535  # PyTorch's kernel counts groups along the second axis of CUDA's grid, which has no more


def group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int, wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, and for each row of weight and bias [rows, channels], those that are `wanted`."""
    rows, channels = x.shape[:2]
    most = max(_GRID // groups, 1)
    if rows > most:
        pieces = zip(*(t.split(most) for t in (g, x, mean, rstd)), strict=True)
        parts = [group_norm_backward(gs, xs, ms, rs, weight, groups, wanted) for gs, xs, ms, rs in pieces]
        return [torch.cat(of) if w else None for of, w in zip(zip(*parts, strict=True), wanted, strict=True)]
    # Taken as one row of rows*channels channels, the same call gives the gradients of weight and bias for each row
    # instead of their sum.
    repeated, sizes = None if weight is None else weight.repeat(rows), (1, rows * channels, x[0, 0].numel())
    found = torch.ops.aten.native_group_norm_backward(g, x, mean, rstd, repeated, *sizes, rows * groups, wanted)
    shapes = (x.shape, (rows, channels), (rows, channels))
    return [t.view(shape) if w else None for t, shape, w in zip(found, shapes, wanted, strict=True)]
