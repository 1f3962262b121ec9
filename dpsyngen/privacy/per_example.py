"""Per-example clipped gradients in one backward pass, for any module built from the layers in ``rules``.

The engine watches the *functions* a model calls (``F.conv2d``, ``F.linear``, …) rather than its modules, so tied
weights, layers that are called twice and functional calls are all seen, and state of an earlier pass cannot be
reused: each pass has its own tape.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from dpsyngen.errors import ConfigError, listed, require
from dpsyngen.hardware import look
from dpsyngen.privacy.clipping import (
    STYLES,
    ClippedGradient,
    ClippingStyle,
    GridGradient,
    clip,
    clip_to_grid,
    valid_mask,
)
from dpsyngen.privacy.contributions import Contribution
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.rules import Recorder, Tape, UnsupportedLayer
from dpsyngen.workers import Workers

_Clipped = TypeVar("_Clipped", bound=ClippedGradient)
RowsLoss = Callable[[], Tensor]
"""Computes the loss of each row, [examples · copies], the copies of one example next to each other."""
Loss = Callable[[slice], Tensor]
"""The same for a slice of the examples."""


def layer_numbers(names: list[str]) -> list[int]:
    """For each parameter the number of its module: the layer that per-layer clipping counts it to."""
    modules = [name.rpartition(".")[0] for name in names]
    numbers = {module: i for i, module in enumerate(dict.fromkeys(modules))}
    return [numbers[module] for module in modules]


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

    The model must treat the rows of a batch independently.  Layers known to mix them are refused; ordinary arithmetic
    that does (``h - h.mean(0)``) would void the sensitivity and cannot be seen in a single pass:
    :meth:`verify` finds it.

    Example: DP-SGD without our trainer.

        >>> import torch
        >>> from dpsyngen.privacy.noise import GaussianMechanism
        >>> from dpsyngen.privacy.per_example import PerExampleGradients
        >>> from dpsyngen.privacy.randomness import Randomness, poisson_sample
        >>> x, y = torch.randn(100, 3), torch.randn(100, 1)
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> engine = PerExampleGradients(model, clipping_norm=1.0)
        >>> mechanism = GaussianMechanism(noise_multiplier=1.0, expected_examples=20)
        >>> randomness = Randomness.from_system()
        >>> for step in range(3):
        ...     chosen = torch.from_numpy(poisson_sample(randomness, step, records=100, sampling_rate=0.2))
        ...     def loss(part):  # of the examples chosen[part], one number each
        ...         rows = chosen[part]
        ...         return (model(x[rows]) - y[rows]).square().sum(1)
        ...     clipped = mechanism.sum(engine, loss, len(chosen))
        ...     noisy = mechanism.release(clipped, randomness, step)
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
        ok = clipping_norm > 0 and math.isfinite(clipping_norm)
        require(ok, "clipping_norm", clipping_norm, "positive and finite")
        require(style in STYLES, "clipping style", style, STYLES)
        self.module, self.style, self.clipping_norm = module, style, float(clipping_norm)
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("the module has no parameter with requires_grad=True, so there is nothing to train.")
        self.names = [n for n, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]
        frozen = [p for p in module.parameters() if not p.requires_grad]
        self.constants = {id(t) for t in (*frozen, *module.buffers())}
        self.kernels = kernels or KernelChoices()
        self._passing = threading.local()  # has the `tape` of this thread's forward pass
        if workers is None and self.parameters[0].device.type != "cpu":
            workers = 1
        self.workers = workers if isinstance(workers, Workers) else Workers(workers)
        self.layers = self._layers()

    def _layers(self) -> list[int]:
        """For each parameter the number of its layer in the whole model."""
        if any(hasattr(p, "to_local") for p in self.parameters):
            raise ConfigError("the parameters are sharded (DTensor): use OwnExamples of dpsyngen.privacy.sharding.")
        return layer_numbers(self.names)

    def zero(self) -> ClippedGradient:
        """The clipped gradient of an empty batch: zeros, with the same sensitivity.  A legal Poisson outcome."""
        sums = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        norms = torch.zeros(0, dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        return ClippedGradient(sums, self.clipping_norm, 0, norms, 0)

    def contributions(self, loss: RowsLoss, examples: int, copies: int = 1) -> list[Contribution]:
        """One pass: each parameter's per-example gradients, in the cheapest form; as :meth:`per_example`."""
        tape = self._tape(examples, copies)
        with torch.enable_grad():
            # Forward: rules replace the functions that use parameters, and losses of the K copies are averaged.
            rows = self._losses(tape, loss)
            # Backward: each rule hands its layer's per-example gradients to the tape.
            (rows.sum() / copies).backward()
        tape.send_back()
        missing = [n for i, n in enumerate(self.names) if i not in tape.recorded]
        if missing:
            raise UnsupportedLayer(
                f"no per-example gradient reached {listed(missing, 5)}: freeze parameters that the loss does not use."
            )
        recorded, tape.recorded = tape.recorded, {}  # the graph holds the tape: leave nothing large on it
        return [recorded[i] for i in range(len(self.parameters))]

    def _tape(self, examples: int, copies: int) -> Tape:
        parameters = dict(zip(self.names, self.parameters, strict=True))
        return Tape(parameters, self.constants, self.kernels, examples, copies)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """For ``torch.utils.checkpoint.checkpoint(…, use_reentrant=False, context_fn=engine.checkpoint_contexts)``.

        Activation checkpointing runs a part of the model again during the backward pass; with these contexts that run
        is seen like the first one.  Without them PyTorch refuses (``CheckpointError``).
        """
        tape = getattr(self._passing, "tape", None)
        return nullcontext(), nullcontext() if tape is None else Recorder(tape)

    def _losses(self, tape: Tape, loss: RowsLoss) -> Tensor:
        """[examples · copies], computed while the tape watches."""
        self._passing.tape = tape
        try:
            with Recorder(tape):
                rows = loss()
        finally:
            self._passing.tape = None
        if rows.shape != (tape.examples * tape.copies,):
            allowed = f"({tape.examples * tape.copies},) = examples x copies"
            raise ValueError(f"the loss has shape {tuple(rows.shape)}, but must be one number a row: {allowed}.")
        return rows

    def collect(self, sums: Iterator[Tensor]) -> list[Tensor]:
        """The sums of the result, from those of each parameter in order; a sharded engine adds up all processes'."""
        return list(sums)

    def per_example(self, loss: RowsLoss, examples: int, copies: int = 1) -> list[Tensor]:
        """Unclipped per-example gradients, one tensor [examples, *parameter.shape] for each parameter.

        `loss` computes the loss of each row, [examples · copies]; losses of the K >= 1 copies of one of the B >= 1
        examples are *averaged* (noise multiplicity).  UnsupportedLayer where examples mix, or a parameter is used in a
        way that has no rule, or never.
        """
        return [c.dense() for c in self.contributions(loss, examples, copies)]

    def __call__(
        self, loss: RowsLoss, examples: int, copies: int = 1, *, valid: int | Tensor | None = None
    ) -> ClippedGradient:
        """Sum over examples of clipped gradients, in one pass of this thread; arguments as of :meth:`per_example`.

        A gradient with a NaN or an infinity contributes exactly zero.  `valid` says which of the examples are more than
        padding: a boolean tensor [examples], or the number n of the first ones.  The rest contribute exactly zero and
        are not counted.
        """
        mask = valid_mask(valid, examples, self.parameters[0].device)
        if examples == 0:
            return self.zero()
        contributions = self.contributions(loss, examples, copies)
        return clip(contributions, self.layers, self.clipping_norm, self.style, valid=mask, collect=self.collect)

    def sum(
        self, loss: Loss, examples: int, *, copies: int = 1, physical_batch: int = 32, valid: int | Tensor | None = None
    ) -> ClippedGradient:
        """Sum over B >= 0 examples of clipped gradients, in their order: for given settings it is the same each time.

        Args:
            loss: for a slice of the examples, the loss of each of their rows, [len(slice) * copies].  It is called
                from several threads at once, so it must not change anything that they share.
            examples, copies, valid: as of :meth:`__call__`.
            physical_batch: examples in memory at a time, over all workers together.  It changes the rounding of the
                sums and nothing else.
        """
        mask = valid_mask(valid, examples, self.parameters[0].device)

        def one(part: slice) -> ClippedGradient:
            own = None if mask is None else mask[part]
            return self(lambda: loss(part), part.stop - part.start, copies, valid=own)

        return self._added_up(one, examples, copies, physical_batch) or self.zero()

    def sum_on_grid(
        self, loss: Loss, examples: int, *, grid: float, copies: int = 1, physical_batch: int = 32
    ) -> GridGradient:
        """Like :meth:`sum`, exact, in multiples of `grid` (a power of two).  Flat clipping only."""
        require(self.style == "flat", "clipping style", self.style, "'flat' for a sum on a grid")

        def one(part: slice) -> GridGradient:
            gradients = self.per_example(lambda: loss(part), part.stop - part.start, copies)
            return clip_to_grid(gradients, self.clipping_norm, grid)

        # Also of no examples; it refuses a grid that does not fit C.
        empty = clip_to_grid([p.new_zeros(0, *p.shape) for p in self.parameters], self.clipping_norm, grid)
        return self._added_up(one, examples, copies, physical_batch) or empty

    def verify(self, loss: Loss, examples: int, copies: int = 1, tolerance: float = 1e-3) -> None:
        """Check on some examples that the gradient of each does not depend on the others; else UnsupportedLayer.

        Worth doing once for a model of your own, on random numbers in place of private data.  Dropout and other random
        layers must be off.  `tolerance` is relative to the norm of an example's gradient.
        """
        require(examples >= 2, "examples", examples, "at least 2, to see whether they mix")
        together = self.per_example(lambda: loss(slice(0, examples)), examples, copies)
        for b in range(examples):
            alone = self.per_example(partial(loss, slice(b, b + 1)), 1, copies)
            differences = [float((t[b] - a[0]).norm()) for t, a in zip(together, alone, strict=True)]
            norm = math.hypot(*(float(a.norm()) for a in alone))
            worst = max(range(len(differences)), key=lambda i: differences[i])
            if not math.hypot(*differences) <= tolerance * norm:
                raise UnsupportedLayer(
                    f"the gradient of example {b} depends on the other examples of its batch, most of all that of "
                    f"{self.names[worst]!r}: the model mixes them (a mean over the batch, its statistics) or is random."
                )

    def _added_up(
        self, function: Callable[[slice], _Clipped], examples: int, copies: int, physical_batch: int
    ) -> _Clipped | None:
        """The sum of ``function`` of slices of the examples, as many at a time as workers; None if there are none."""
        require(examples >= 0, "examples", examples, "at least 0")
        require(copies >= 1, "copies", copies, "at least 1")
        require(physical_batch >= 1, "physical_batch", physical_batch, "at least 1")
        # Parts of nearly equal size, a multiple of the workers of them, so that none waits long for the others.
        count = self.workers.count
        parts = min(examples, -(-examples // physical_batch) * count)
        slices = [slice(a, b) for a, b in pairwise(i * examples // max(parts, 1) for i in range(parts + 1))]
        step = min(count, physical_batch)
        added = (c for i in range(0, parts, step) for c in self.workers.map(function, slices[i : i + step]))
        return reduce(operator.add, added) if parts else None


# ------------------------------------------------------------------------------------------- the physical batch

_SHARE = 0.5  # of the memory that is free; the rest is for what else the program and the machine do
_TEMPORARY = 1.5  # gradients of activations and workspaces come on top of what is kept


def bytes_for_each_example(engine: PerExampleGradients, loss: Loss, copies: int = 1) -> int:
    """Memory that one more of at least two examples takes in a pass: what autograd keeps, and its gradients."""
    counts = []
    for examples in (1, 2):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            contributions = engine.contributions(partial(loss, slice(0, examples)), examples, copies)
        held = [v for c in contributions for v in vars(c).values()]
        tensors = [t for v in held for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        counts.append(sum(kept.values()) + sum(t.numel() * t.element_size() for t in tensors))
    return max(counts[1] - counts[0], 1)


def find_physical_batch(
    engine: PerExampleGradients, loss: Loss, *, copies: int = 1, memory: int | None = None, most: int | None = None
) -> int:
    """The largest power of two of examples that fits into memory, with room to spare; at least 1.

    `memory` are the bytes that may be used, None: half of what is available now.  `most` is 64 on a CPU, where more is
    no faster, and 4096 on a GPU.
    """
    device = engine.parameters[0].device
    if memory is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else look().available
        memory = int(free * _SHARE)
    limit = (64 if device.type == "cpu" else 4096) if most is None else most
    require(memory >= 1, "memory", memory, "positive")
    require(limit >= 1, "most", most, "positive")
    fits = memory / (_TEMPORARY * bytes_for_each_example(engine, loss, copies))
    return 1 << max(int(min(fits, limit)), 1).bit_length() - 1
