"""Per-example clipped gradients in one backward pass, for any module built from the layers in ``rules``.

The engine watches the *functions* a model calls (``F.conv2d``, ``F.linear``, …) rather than its modules, so tied
weights, layers that are called twice and functional calls are all seen, and state of an earlier pass cannot be
reused: each pass has its own tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dpsyngen.errors import DpsyngenError
from dpsyngen.privacy.rules import RULES


class UnsupportedLayer(DpsyngenError, RuntimeError):
    """The model uses a parameter in a way whose per-example gradient is not known, or mixes examples.

    Not a TypeError: Python's arithmetic operators swallow those.
    """


@dataclass(frozen=True)
class ClippedGradient:
    """The sum over examples of their clipped gradients, with the L2 sensitivity of that sum.

    Formal guarantee: for every choice of the other examples, adding or removing one example (or replacing it by
    nothing) changes the concatenation of ``sums`` by at most ``l2_sensitivity`` in L2 norm.

    Attributes:
        sums: one tensor for each trainable parameter, in the order of the parameters.
        l2_sensitivity: the clipping norm C (after the rounding slack, never more than C).
        examples: how many examples went in.  Data-dependent under Poisson sampling: never release it.
        norms: [examples], L2 norms before clipping; NaN or inf where the gradient was not finite.  Private.
        not_finite: how many examples had a NaN or infinite gradient; they contribute exactly zero.  Private.
    """

    sums: list[Tensor]
    l2_sensitivity: float
    examples: int
    norms: Tensor
    not_finite: int

    def __add__(self, other: ClippedGradient) -> ClippedGradient:
        """The clipped gradient of both sets of examples, which must be disjoint; the sensitivity stays."""
        return ClippedGradient(
            [a + b for a, b in zip(self.sums, other.sums, strict=True)],
            max(self.l2_sensitivity, other.l2_sensitivity),
            self.examples + other.examples,
            torch.cat([self.norms, other.norms.to(self.norms.dtype)]),
            self.not_finite + other.not_finite,
        )


class _Tape:
    """Per-example gradients of one pass."""

    def __init__(self, parameters: list[Tensor], names: list[str], examples: int, copies: int) -> None:
        self.examples, self.copies = examples, copies
        self._parameters, self._names = parameters, names
        self._position = {id(p): i for i, p in enumerate(parameters)}
        self.recorded: list[Tensor | None] = [None] * len(parameters)

    def tracks(self, value: object) -> bool:
        return id(value) in self._position

    def name_of(self, value: object) -> str:
        return self._names[self._position[id(value)]]

    def add(self, parameter: Tensor, per_example: Tensor) -> None:
        i = self._position[id(parameter)]
        before = self.recorded[i]
        per_example = per_example.to(parameter.dtype)
        self.recorded[i] = per_example if before is None else before + per_example

    def check_rows(self, layer: str, value: Tensor) -> None:
        rows = self.examples * self.copies
        if value.dim() == 0 or value.shape[0] != rows:
            raise UnsupportedLayer(
                f"{layer} got an input of shape {tuple(value.shape)}, but the first dimension must be the "
                f"{rows} rows of the batch ({self.examples} examples x {self.copies} copies), so that each "
                "example's gradient can be told apart.  Keep the batch first in every layer with parameters."
            )


def _tensors(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _tensors(value)
        else:
            yield value


class _Recorder(TorchFunctionMode):
    """Sends each function call that involves a tracked parameter through its rule; refuses the rest."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MIXING:
            _MIXING[func](args, kwargs)
        tape = self._tape
        tracked = [v for v in _tensors((*args, *kwargs.values())) if tape.tracks(v)]
        if not tracked:
            return func(*args, **kwargs)
        known = RULES.get(func)
        if known is not None:
            return known(tape, func, args, kwargs)
        out = func(*args, **kwargs)
        # Looking at a parameter (its shape, its dtype, a no-op cast) is fine; computing with it is not.
        if any(isinstance(o, Tensor) and o.requires_grad and not tape.tracks(o) for o in _tensors((out,))):
            name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
            raise UnsupportedLayer(
                f"parameter {tape.name_of(tracked[0])!r} is used by {name}, which has no per-example rule.  Known: "
                f"{', '.join(sorted(f.__name__ for f in RULES))}.  Freeze the parameter (requires_grad=False), "
                "replace the layer, or add a rule in dpsyngen.privacy.rules."
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


class PerExampleGradients:
    """Clipped per-example gradients of a module.

    Args:
        module: any module whose trainable parameters are used by layers that have a rule (Linear, Conv1d/2d,
            GroupNorm, LayerNorm, Embedding; attention built from them).
        clipping_norm: C > 0, the bound on the L2 norm of one example's gradient over all parameters together.

    The model must treat the rows of a batch independently.  Layers known to mix them are refused, but ordinary
    arithmetic that does (``h - h.mean(0)``) cannot be seen from here, and would void the sensitivity.

    Example:
        >>> import torch
        >>> from dpsyngen.privacy.per_example import PerExampleGradients
        >>> model = torch.nn.Linear(3, 1)
        >>> engine = PerExampleGradients(model, clipping_norm=1.0)
        >>> x, y = torch.randn(5, 3), torch.randn(5, 1)
        >>> clipped = engine(lambda: (model(x) - y).square().sum(1), examples=5)
        >>> clipped.l2_sensitivity <= 1.0, [tuple(s.shape) for s in clipped.sums]
        (True, [(1, 3), (1,)])
    """

    def __init__(self, module: torch.nn.Module, clipping_norm: float) -> None:
        if not clipping_norm > 0:
            raise ValueError(f"clipping_norm is {clipping_norm}, but must be positive.")
        self.module = module
        self.clipping_norm = float(clipping_norm)
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the module has no parameter with requires_grad=True, so there is nothing to train.")
        self.names = [n for n, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]

    def zero(self) -> ClippedGradient:
        """The clipped gradient of an empty batch: zeros, with the same sensitivity.  A legal Poisson outcome."""
        first = self.parameters[0]
        return ClippedGradient(
            [torch.zeros_like(p, requires_grad=False) for p in self.parameters],
            self.clipping_norm,
            0,
            first.new_zeros(0, requires_grad=False),
            0,
        )

    def per_example(self, loss: Callable[[], Tensor], examples: int, copies: int = 1) -> list[Tensor]:
        """Unclipped per-example gradients, one tensor [examples, *parameter.shape] for each parameter.

        Args:
            loss: computes the loss of each row, shape [examples * copies], copies of one example adjacent.
            examples: B >= 1.
            copies: K >= 1, rows of each example; their losses are *averaged* (noise multiplicity).

        Raises:
            UnsupportedLayer: a parameter is used in a way that has no rule, is never used, or examples mix.
        """
        tape = _Tape(self.parameters, self.names, examples, copies)
        with torch.enable_grad():
            with _Recorder(tape):
                rows = loss()
            if rows.shape != (examples * copies,):
                raise ValueError(
                    f"the loss has shape {tuple(rows.shape)}, but must be one number a row: "
                    f"({examples * copies},) = examples x copies."
                )
            (rows.sum() / copies).backward()
        missing = [n for n, g in zip(self.names, tape.recorded, strict=True) if g is None]
        if missing:
            raise UnsupportedLayer(
                f"no per-example gradient reached {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}.  "
                "A silent zero would hide a bug: freeze parameters that the loss does not depend on."
            )
        return [g for g in tape.recorded if g is not None]

    def __call__(self, loss: Callable[[], Tensor], examples: int, copies: int = 1) -> ClippedGradient:
        """Sum over examples of gradients clipped to C; see :meth:`per_example` for the arguments.

        Each example's gradient g becomes g * min(1, C / ||g||); a gradient with a NaN or an infinity becomes 0.
        """
        if examples == 0:
            return self.zero()
        gradients = self.per_example(loss, examples, copies)
        return clip_and_sum(gradients, self.clipping_norm)


def clip_and_sum(gradients: list[Tensor], clipping_norm: float) -> ClippedGradient:
    """Clip each example's gradient (over all tensors together) to `clipping_norm` and sum over examples.

    Args:
        gradients: tensors [examples, ...] in fp32 or fp64.
        clipping_norm: C > 0.
    """
    with torch.no_grad():
        examples = gradients[0].shape[0]
        flat = [g.reshape(examples, -1) for g in gradients]
        # fp64 accumulation where there is such a thing: squares of large fp32 gradients overflow in fp32.
        wide = torch.float32 if flat[0].device.type == "mps" else torch.float64
        per_tensor = torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=wide) for g in flat])
        norms = torch.linalg.vector_norm(per_tensor, dim=0)
        finite = torch.isfinite(norms)
        # The products below round to nearest; shrink C by a few units in the last place to stay within it.
        slack = 1.0 - 4.0 * torch.finfo(flat[0].dtype).eps
        tiny = torch.finfo(wide).tiny  # a norm of zero stays unclipped
        factors = (clipping_norm * slack / norms.clamp_min(tiny)).clamp_max(1.0)
        # Below the smallest normal number a factor has few digits and may round up by far more than the slack; an
        # example that large contributes nothing.
        usable = finite & (factors >= torch.finfo(flat[0].dtype).tiny)
        factors = torch.where(usable, factors, torch.zeros_like(factors))
        bad = int((~finite).sum())
        if bad:
            # 0 * NaN is NaN, so such rows are blanked as well as weighted by zero.
            for g in flat:
                g[~finite] = 0.0
        factors = factors.to(flat[0].dtype)
        sums = [torch.mv(g.t(), factors).view(t.shape[1:]) for g, t in zip(flat, gradients, strict=True)]
    return ClippedGradient(sums, clipping_norm, examples, norms, bad)
