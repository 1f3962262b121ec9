"""What a rule is, and the table of rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from dpsyngen.errors import DpsyngenError
from dpsyngen.privacy.contributions import Contribution
from dpsyngen.privacy.kernels import KernelChoices


class UnsupportedLayer(DpsyngenError, RuntimeError):
    """The model uses a parameter in a way whose per-example gradient is not known, or mixes examples.

    Not a TypeError: Python's arithmetic operators swallow those.
    """


class Tape(Protocol):
    """What a rule needs of the engine that records.

    Attributes:
        examples: B.
        copies: K.
        kernels: how convolutions compute.
    """

    examples: int
    copies: int
    kernels: KernelChoices

    def tracks(self, value: object) -> bool:
        """Whether `value` is a parameter whose per-example gradient is wanted, or computed from such alone."""
        ...

    def add(self, parameter: Tensor, contribution: Contribution) -> None:
        """Add a layer call's contribution to what was recorded for `parameter`."""
        ...

    def check_rows(self, layer: str, value: Tensor) -> None:
        """Raise unless the leading dimension of `value` is examples * copies."""
        ...

    def derive(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function's value as a derived parameter, or as several."""
        ...

    def expanded_from(self, value: Tensor) -> Tensor | None:
        """The parameter that `value` repeats along new or single axes, or None if it is not such a repetition."""
        ...

    def is_constant(self, value: Tensor) -> bool:
        """Whether `value` is a parameter, derived from some, or a buffer or frozen parameter of the module."""
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
                    refuse_argument(function.__name__, name)
            return body(tape, **(defaults | bound))

        RULES[function] = apply
        return body

    return decorate


def refuse_argument(function: str, argument: str) -> NoReturn:
    """Raise for a tensor in a place where its gradient would escape."""
    raise UnsupportedLayer(
        f"{function} got as its {argument} a tensor whose gradient would be lost or left unclipped: weights and biases "
        "must be trainable parameters of the module (or frozen), and its input must not be one."
    )


def per_example(per_row: Tensor, tape: Tape) -> Tensor:
    """[rows, ...] -> [examples, ...], summing the copies of each example."""
    if tape.copies == 1:
        return per_row
    return per_row.unflatten(0, (tape.examples, tape.copies)).sum(1)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast asks for now, or None outside of it."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def low_precision(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as autocast casts the inputs of matrix products and convolutions; unchanged outside of autocast.

    The functions of this package bypass autocast's own casts, and their backward passes must see the tensors that the
    forward pass used.
    """
    device = next(t for t in tensors if t is not None).device.type
    dtype = autocast_dtype(device)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def full_precision(x: Tensor) -> Tensor:
    """fp32 for the input of a normalisation, which autocast never runs in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
