"""Per-example clipped gradients in one backward pass, for any module built from the layers in ``rules``.

The engine watches the *functions* a model calls (``F.conv2d``, ``F.linear``, …) rather than its modules, so tied
weights, layers that are called twice and functional calls are all seen, and state of an earlier pass cannot be
reused: each pass has its own tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dpsyngen.privacy.clipping import ClippedGradient, ClippingStyle, check_clipping, clip, clip_and_sum
from dpsyngen.privacy.contributions import Contribution, Dense, merged
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.rules import RULES, UnsupportedLayer
from dpsyngen.privacy.rules.constants import tensors_in
from dpsyngen.workers import Workers

__all__ = ["ClippedGradient", "PerExampleGradients", "UnsupportedLayer", "clip_and_sum"]


class _Tape:
    """What one pass records: contributions to the gradient of each parameter, example by example."""

    def __init__(self, engine: PerExampleGradients, examples: int, copies: int) -> None:
        self.examples, self.copies, self.kernels = examples, copies, engine.kernels
        self._names = engine.names
        self._constants = engine.constants
        self._position = {id(p): i for i, p in enumerate(engine.parameters)}
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
        """See :class:`rules.constants.DerivingTape`."""
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


class PerExampleGradients:
    """Clipped per-example gradients of a module.

    Args:
        module: any module whose trainable parameters are used by layers that have a rule (Linear, Conv1d/2d and their
            transposes, GroupNorm, LayerNorm, Embedding, MultiheadAttention, attention built from them), or that are
            added to, multiplied with or concatenated to the rows of the batch.
        clipping_norm: C > 0, the bound on the L2 norm of one example's contribution over all parameters together.
        style: "flat", "per-layer" or "automatic"; see :func:`dpsyngen.privacy.clipping.clip`.  The sensitivity of
            the result is C in each.
        kernels: how convolutions compute; None: measure on first use (:class:`KernelChoices`).
        workers: how many threads share a batch in :meth:`sum`, or the threads themselves; None: one for each of
            PyTorch's threads, at most 8 (one on a GPU).

    The model must treat the rows of a batch independently.  Layers known to mix them are refused, but ordinary
    arithmetic that does (``h - h.mean(0)``) cannot be seen from here, and would void the sensitivity.

    Example: DP-SGD without our trainer.

        >>> import torch
        >>> from dpsyngen.privacy.noise import noisy_mean
        >>> from dpsyngen.privacy.per_example import PerExampleGradients
        >>> from dpsyngen.privacy.randomness import Randomness
        >>> from dpsyngen.privacy.sampling import poisson_sample
        >>> x, y = torch.randn(100, 3), torch.randn(100, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> engine = PerExampleGradients(model, clipping_norm=1.0)
        >>> randomness = Randomness.from_system()
        >>> for step in range(3):
        ...     chosen = torch.from_numpy(poisson_sample(randomness, step, records=100, sampling_rate=0.2))
        ...     def loss(part):  # of the examples chosen[part], one number each
        ...         rows = chosen[part]
        ...         return (model(x[rows]) - y[rows]).square().sum(1)
        ...     clipped = engine.sum(loss, len(chosen))
        ...     noisy = noisy_mean(
        ...         clipped, noise_multiplier=1.0, expected_examples=20, randomness=randomness, step=step
        ...     )
        ...     for parameter, gradient in zip(engine.parameters, noisy, strict=True):
        ...         parameter.grad = gradient
        ...     optimizer.step()
        >>> clipped.l2_sensitivity <= 1.0, [tuple(s.shape) for s in clipped.sums]
        (True, [(1, 3), (1,)])

    Formal guarantee: with the records of each step chosen by Poisson sampling, each pass of the loop is one run of the
    Poisson-subsampled Gaussian mechanism; ``dpsyngen.privacy.accounting`` gives its ε.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        clipping_norm: float,
        *,
        style: ClippingStyle = "flat",
        kernels: KernelChoices | None = None,
        workers: Workers | int | None = None,
    ) -> None:
        check_clipping(clipping_norm, style)
        self.module, self.style = module, style
        self.clipping_norm = float(clipping_norm)
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the module has no parameter with requires_grad=True, so there is nothing to train.")
        self.names = [n for n, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        frozen = [p for p in module.parameters() if not p.requires_grad]
        self.constants = {id(t) for t in (*frozen, *module.buffers())}
        self.kernels = kernels or KernelChoices()
        on_gpu = self.parameters[0].device.type != "cpu"
        self.workers = (
            workers if isinstance(workers, Workers) else Workers(1 if workers is None and on_gpu else workers)
        )
        modules = [n.rpartition(".")[0] for n in self.names]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(modules))}
        self._layers = [numbers[m] for m in modules]

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

    def contributions(self, loss: Callable[[], Tensor], examples: int, copies: int = 1) -> list[Contribution]:
        """One pass: what each parameter's per-example gradients are, in the cheapest form.

        Args and errors: as :meth:`per_example`.
        """
        tape = _Tape(self, examples, copies)
        with torch.enable_grad():
            with _Recorder(tape):
                rows = loss()
            if rows.shape != (examples * copies,):
                raise ValueError(
                    f"the loss has shape {tuple(rows.shape)}, but must be one number a row: "
                    f"({examples * copies},) = examples x copies."
                )
            (rows.sum() / copies).backward()
        tape.send_back()
        missing = [n for i, n in enumerate(self.names) if i not in tape.recorded]
        if missing:
            raise UnsupportedLayer(
                f"no per-example gradient reached {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}.  "
                "A silent zero would hide a bug: freeze parameters that the loss does not depend on."
            )
        recorded, tape.recorded = tape.recorded, {}  # the graph holds the tape: leave nothing large on it
        return [recorded[i] for i in range(len(self.parameters))]

    def per_example(self, loss: Callable[[], Tensor], examples: int, copies: int = 1) -> list[Tensor]:
        """Unclipped per-example gradients, one tensor [examples, *parameter.shape] for each parameter.

        Args:
            loss: computes the loss of each row, shape [examples * copies], copies of one example adjacent.
            examples: B >= 1.
            copies: K >= 1, rows of each example; their losses are *averaged* (noise multiplicity).

        Raises:
            UnsupportedLayer: a parameter is used in a way that has no rule, is never used, or examples mix.
        """
        return [c.dense() for c in self.contributions(loss, examples, copies)]

    def __call__(self, loss: Callable[[], Tensor], examples: int, copies: int = 1) -> ClippedGradient:
        """Sum over examples of clipped gradients, in one pass of this thread; see :meth:`per_example`.

        A gradient with a NaN or an infinity contributes exactly zero.
        """
        if examples == 0:
            return self.zero()
        contributions = self.contributions(loss, examples, copies)
        return clip(contributions, self._layers, self.clipping_norm, self.style)

    def sum(
        self,
        loss: Callable[[slice], Tensor],
        examples: int,
        *,
        copies: int = 1,
        physical_batch: int = 32,
    ) -> ClippedGradient:
        """Sum over any number of examples of clipped gradients, a bounded number of them in memory at a time.

        Args:
            loss: for a slice of the examples, the loss of each of their rows, [len(slice) * copies].  It is called
                from several threads at once, so it must not change anything that they share.
            examples: B >= 0, the logical batch.
            copies: K >= 1, rows of each example; their losses are averaged.
            physical_batch: examples in memory at a time, over all workers together.  It changes the rounding of the
                sums and nothing else.

        Returns:
            the sum, added up in the order of the examples: for given settings it is the same each time.
        """
        if physical_batch < 1 or examples < 0 or copies < 1:
            raise ValueError(
                f"physical_batch={physical_batch} and copies={copies} must be at least 1, examples={examples} at "
                "least 0."
            )
        # Parts of nearly equal size, a multiple of the workers of them, so that none waits long for the others.
        count = self.workers.count
        parts = min(max(examples, 1), -(-examples // physical_batch) * count)
        edges = [i * examples // max(parts, 1) for i in range(parts + 1)]

        def one(part: slice) -> ClippedGradient:
            return self(lambda: loss(part), part.stop - part.start, copies)

        sums: list[Tensor] | None = None
        norms: list[Tensor] = []
        bad = 0
        for i in range(0, parts, count):
            slices = [slice(a, b) for a, b in zip(edges[i : i + count], edges[i + 1 : i + count + 1], strict=False)]
            for clipped in self.workers.map(one, [s for s in slices if s.stop > s.start]):
                if sums is None:
                    sums = clipped.sums
                else:
                    torch._foreach_add_(sums, clipped.sums)
                norms.append(clipped.norms)
                bad += clipped.not_finite
        if sums is None:
            return self.zero()
        return ClippedGradient(sums, self.clipping_norm, examples, torch.cat(norms), bad)
