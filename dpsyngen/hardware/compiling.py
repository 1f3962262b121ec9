"""Compiled networks that fall back to plain ones: compiling may neither stop a run nor change what it computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from dpsyngen.full_precision import tf32_allowed

_Target = TypeVar("_Target", bound=Callable[..., Any])

_TOLERANCE, _TOLERANCE_LOW = 1e-3, 0.05  # in fp32; in less, where compiled code rounds at other places


def compiled(target: _Target, after: int = 0) -> _Target:
    """`target`, compiled by torch.compile from its call number `after` (from 0) on.

    The first compiled call of each kind (shapes, with or without gradients) only checks: result and gradients must be
    those of the plain call, which is what is returned.  If they are not, or compiling fails, a warning says so and the
    target is called as it is, from then on; so is one that draws random numbers.  Calls that something watches by a
    TorchFunctionMode, as the engine of per-example gradients does, are never compiled.

    Args:
        target: a module, whose ``forward`` is replaced in place (parameters, buffers and hooks stay what they are), or
            a function.  It returns one tensor.
        after: calls that are not compiled.

    Returns:
        the same module, or another function.
    """
    if isinstance(target, nn.Module):
        # Not torch.compile(target): its wrapper renames parameters, and is no module of the same class.
        if not isinstance(target.forward, _Compiled):
            target.forward = _Compiled(target.forward, after, type(target).__name__)
        return target
    return _Compiled(target, after, getattr(target, "__name__", "a function"))  # type: ignore[return-value]


class _Compiled:
    def __init__(self, plain: Callable[..., Any], after: int, name: str) -> None:
        self.plain, self.after, self.name = plain, after, name
        self.calls = 0
        self.failed = False
        self.checked: set[tuple[Any, ...]] = set()
        self.fast: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Within other code that is being compiled this is part of it.
        if self.failed or torch.compiler.is_compiling() or _get_current_function_mode_stack():
            return self.plain(*args, **kwargs)
        self.calls += 1
        if self.calls <= self.after:
            return self.plain(*args, **kwargs)
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        kind = (torch.is_grad_enabled(), _low_precision(given), *((v.shape, v.dtype) for v in given))
        if self.fast is not None and kind in self.checked:
            try:
                return self.fast(*args, **kwargs)
            except Exception as error:
                # If it is not compiling that fails, this fails in the same way and says what is the matter.
                out = self.plain(*args, **kwargs)
                self._give_up(_first_line(error))
                return out
        out = self.plain(*args, **kwargs)
        try:
            if self.fast is None:
                self.fast = torch.compile(self.plain)
            problem = self._difference(out, self.fast(*args, **kwargs), given)
        except Exception as error:
            problem = _first_line(error)
        if problem:
            self._give_up(problem)
        else:
            self.checked.add(kind)
        return out

    def _difference(self, plain: Tensor, fast: Tensor, given: Sequence[Tensor]) -> str:
        """What is wrong with a compiled result; "" if nothing is."""
        tolerance = _TOLERANCE_LOW if _low_precision(given) else _TOLERANCE
        if not _close([fast.detach()], [plain.detach()], tolerance):
            return "its result is another one"
        owner = getattr(self.plain, "__self__", None)
        weights = list(owner.parameters()) if isinstance(owner, nn.Module) else []
        inputs = [v for v in (*weights, *given) if v.requires_grad]
        if plain.requires_grad and inputs:
            # Some direction, without touching the random state of the program.
            direction = torch.linspace(1, 50, plain.numel(), dtype=torch.float64).sin().view(plain.shape).to(plain)
            options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
            expected = torch.autograd.grad(plain, inputs, direction, retain_graph=True, **options)
            if not _close(torch.autograd.grad(fast, inputs, direction, **options), expected, tolerance):
                return "its gradients are other ones"
        return ""

    def _give_up(self, why: str) -> None:
        self.failed, self.fast = True, None
        warnings.warn(
            f"{self.name} could not be compiled ({why}), so it goes on as it is, more slowly.  compute.compile: false "
            "leaves compiling out.",
            stacklevel=3,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Compiled code belongs to this very network: copies of it compile their own."""
        return vars(self) | {"fast": None, "checked": set()}


def _low_precision(given: Sequence[Tensor]) -> bool:
    devices = {v.device.type for v in given}
    return any(torch.is_autocast_enabled(d) for d in devices) or ("cuda" in devices and any(tf32_allowed()))


def _close(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether ‖got - expected‖ <= tolerance · ‖expected‖ over all tensors together."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, expected, strict=True))
    return apart <= tolerance**2 * sum(float(b.double().square().sum()) for b in expected)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
