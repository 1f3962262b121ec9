"""Watching one pass of a model: which functions use which parameters, and what each contributes.

A ``TorchFunctionMode`` sees every function the model calls.  Calls that involve a trainable parameter go to its rule;
functions of parameters alone make derived parameters; anything else with a parameter in it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dpsyngen.privacy.contributions import Contribution, Dense, merged
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.rules import RULES, UnsupportedLayer
from dpsyngen.privacy.rules.constants import tensors_in


class Tape:
    """What one pass records: contributions to the gradient of each parameter, example by example.

    Args:
        parameters: those whose gradients are wanted, by name.
        constants: ids of the module's buffers and frozen parameters.
        kernels: how convolutions compute.
        examples: B.
        copies: K.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        constants: set[int],
        kernels: KernelChoices,
        examples: int,
        copies: int,
    ) -> None:
        self.examples, self.copies, self.kernels = examples, copies, kernels
        self._names = list(parameters)
        self._constants = constants
        self._position = {id(p): i for i, p in enumerate(parameters.values())}
        self.recorded: dict[int, Contribution] = {}
        # Derived parameters: (leaf that the model goes on with, the same value with its graph, what it came from).
        self._derived: list[tuple[Tensor, Tensor, list[Tensor], Callable[..., Any]]] = []

    def tracks(self, value: object) -> bool:
        return id(value) in self._position

    def any_tracked(self, values: Iterable[Any]) -> bool:
        """Whether one of them, or of what lists among them hold, is tracked.  On the path of every function call."""
        position = self._position
        for value in values:
            if id(value) in position:
                return True
            if isinstance(value, (list, tuple)) and self.any_tracked(value):
                return True
        return False

    def is_constant(self, value: Tensor) -> bool:
        return self.tracks(value) or id(value) in self._constants

    def name_of(self, value: object) -> str:
        """The name of a parameter, or of the one that it is derived from."""
        position = self._position[id(value)]
        while position >= len(self._names):
            position = self._position[id(self._derived[position - len(self._names)][2][0])]
        return self._names[position]

    def add(self, parameter: Tensor, contribution: Contribution) -> None:
        position = self._position[id(parameter)]
        before = self.recorded.get(position)
        self.recorded[position] = contribution if before is None else merged(before, contribution)

    def check_rows(self, layer: str, value: Tensor) -> None:
        rows = self.examples * self.copies
        if value.dim() == 0 or value.shape[0] != rows:
            raise UnsupportedLayer(
                f"{layer} got an input of shape {tuple(value.shape)}, but the first dimension must be the "
                f"{rows} rows of the batch ({self.examples} examples x {self.copies} copies), so that each "
                "example's gradient can be told apart.  Keep the batch first in every layer with parameters."
            )

    # ------------------------------------------------------------------------------- derived parameters

    def derive(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of parameters alone: its value becomes a parameter of this pass."""
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
        """See :class:`rules.Tape`."""
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
        """Gradients of derived parameters become gradients of what they came from, the last ones first."""
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


class Recorder(TorchFunctionMode):
    """Sends each function call that involves a tracked parameter through its rule; refuses the rest."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MIXING:
            _MIXING[func](args, kwargs)
        tape = self._tape
        if not tape.any_tracked(args) and not (kwargs and tape.any_tracked(kwargs.values())):
            return func(*args, **kwargs)
        if func in _LAYERS:
            return RULES[func](tape, func, args, kwargs)
        values = [v for v in tensors_in((args, kwargs)) if isinstance(v, Tensor)]
        tracked = [v for v in values if tape.tracks(v)]
        if all(tape.is_constant(v) for v in values):
            return tape.derive(func, args, kwargs)
        known = RULES.get(func)
        if known is not None:
            return known(tape, func, args, kwargs)
        out = func(*args, **kwargs)
        # Looking at a parameter (its shape, its dtype) is fine; computing with it is not.
        if any(isinstance(o, Tensor) and o.requires_grad and not tape.tracks(o) for o in tensors_in((out,))):
            name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
            raise UnsupportedLayer(
                f"parameter {tape.name_of(tracked[0])!r} is used by {name} together with the batch, which has no "
                f"per-example rule.  Known: {', '.join(sorted({f.__name__ for f in RULES}))}.  Freeze the parameter "
                "(requires_grad=False), replace the layer, or add a rule in dpsyngen.privacy.rules."
            )
        return out


# Straight to their rules, which say what is allowed even where the input is a constant of the module.
_LAYERS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.group_norm,
    F.layer_norm,
    F.embedding,
}


def _refuse_batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if training:
        raise UnsupportedLayer(
            "batch normalisation mixes the examples of a batch, so one example's gradient cannot be bounded.  "
            "Use GroupNorm instead, or put the layer in eval mode with fixed public statistics."
        )


def _refuse_running_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    running = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
    if running is not None and kwargs.get("use_input_stats", args[5] if len(args) > 5 else True):
        raise UnsupportedLayer(
            "instance normalisation with track_running_stats=True keeps statistics of the private examples, which "
            "would be released with the weights and without noise.  Turn track_running_stats off, or use GroupNorm."
        )


_MIXING: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], None]] = {
    F.batch_norm: _refuse_batch_norm,
    torch.batch_norm: _refuse_batch_norm,
    torch.native_batch_norm: _refuse_batch_norm,
    F.instance_norm: _refuse_running_statistics,
}
