"""Watch the functions that a model calls in one pass, and send those that use parameters to their rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dpsyngen.privacy.rules import RULES, Tape, UnsupportedLayer
from dpsyngen.privacy.rules.registry import LAYERS, tensors_in


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
        tracked = [v for v in values if tape.tracks(v)]
        if all(tape.is_constant(v) for v in values):
            return tape.derive(func, args, kwargs)
        # 4. Where a parameter meets the batch there must be a rule.
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
