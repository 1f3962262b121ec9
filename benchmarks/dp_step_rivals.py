"""Ways to get one clipped gradient sum, each as a function of a task: ours, plain autograd, Opacus, torch.func.

Every builder returns a :class:`Method` whose ``step()`` is one forward and backward pass up to the clipped sum.  All of
them work on a copy of the same network, so that hooks and formats of one do not reach another.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpsyngen.privacy.per_example import ClippedGradient, PerExampleGradients
from dpsyngen.workers import Workers, summed_gradients

OPACUS = ("opacus-hooks", "opacus-functorch", "opacus-ghost", "opacus-fast")
RIVALS = (*OPACUS, "vmap")
INSTALL = dict.fromkeys(("opacus", "diffusers"), "pip install -c constraints.txt -e '.[bench]'")


class Unavailable(Exception):
    """A method that cannot do this task; the text says why."""


@dataclass
class Task:
    """One network and one batch.

    Attributes:
        module: the network.
        batch: tensors [examples * copies, ...], the copies of an example next to each other.
        row_losses: (network, *batch) -> the loss of each row.
        examples: B.
        copies: K; the losses of an example's copies are averaged.
        autocast: compute in bfloat16 where PyTorch's autocast does.
    """

    module: nn.Module
    batch: tuple[Tensor, ...]
    row_losses: Callable[..., Tensor]
    examples: int
    copies: int
    autocast: bool = False

    @property
    def device(self) -> torch.device:
        return self.batch[0].device

    def losses(self, module: nn.Module, *batch: Tensor) -> Tensor:
        """The losses of the rows in `batch`, in the precision of the task."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.row_losses(module, *batch)

    def losses_of(self, module: nn.Module, examples: slice) -> Tensor:
        """The losses of the rows of some examples."""
        rows = slice(examples.start * self.copies, examples.stop * self.copies)
        return self.losses(module, *(t[rows] for t in self.batch))


@dataclass
class Method:
    """One way to do a task.

    Attributes:
        step: one pass; returns the clipped sum (plain: the gradient), a tensor for each parameter.
        clear: forget what the last pass left behind; not timed.
        note: what a reader should know about it.
    """

    step: Callable[[], list[Tensor]]
    clear: Callable[[], None]
    note: str = ""


def missing(library: str) -> bool:
    """Whether `library` is not installed."""
    return importlib.util.find_spec(library) is None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that the rivals are known for (secure randomness, full backward hooks, vmap fallbacks)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _no_gradients(module: nn.Module) -> Callable[[], None]:
    def clear() -> None:
        for p in module.parameters():
            p.grad = None

    return clear


# ------------------------------------------------------------------------------------------------ plain and ours


def plain(task: Task, memory_format: torch.memory_format) -> Method:
    """Ordinary autograd: the gradient of the summed losses, not clipped."""
    module = copy.deepcopy(task.module).to(memory_format=memory_format)
    batch = tuple(t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in task.batch)

    def step() -> list[Tensor]:
        (task.losses(module, *batch).sum() / task.copies).backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    return Method(step, _no_gradients(module))


def plain_shared(task: Task) -> Method:
    """Ordinary autograd with the batch shared by threads, as our engine shares it: what remains is the cost of privacy.

    PyTorch does not do this by itself, so it is not the baseline.
    """
    module, workers = copy.deepcopy(task.module), Workers()
    parameters = list(module.parameters())

    def step() -> list[Tensor]:
        gradients, _ = summed_gradients(parameters, lambda part: task.losses_of(module, part), task.examples, workers)
        return [g / task.copies for g in gradients]

    return Method(step, _no_gradients(module))


def _ours(engine: PerExampleGradients, task: Task) -> ClippedGradient:
    """The one place that calls the engine."""
    return engine.sum(
        lambda part: task.losses_of(engine.module, part),
        task.examples,
        copies=task.copies,
        physical_batch=task.examples,
    )


def our_engine(task: Task) -> tuple[PerExampleGradients, Tensor]:
    """The engine of dpsyngen, set to clip about half of the examples, and the norms of their gradients."""
    engine = PerExampleGradients(copy.deepcopy(task.module), clipping_norm=1.0)
    norms = _ours(engine, task).norms
    # A hair below the median, so that an example in the middle is clipped by every method.
    engine.clipping_norm = float(norms.float().quantile(0.5)) * (1 - 1e-4)
    return engine, norms


def ours(engine: PerExampleGradients, task: Task) -> Method:
    """The engine of dpsyngen."""
    return Method(lambda: _ours(engine, task).sums, _no_gradients(engine.module))


# ------------------------------------------------------------------------------------------------------- Opacus
#
# Opacus has no noise multiplicity: to it every row is an example of its own.  Whoever wants K copies has to fork it.
# The forks below are the cheapest that keep its kernels: the loss is divided by K and the copies of an example are
# added up where each layer's gradients appear, so that only B of them, and not B*K, are kept and clipped.  (To average
# after the backward pass, as is more usual, takes K times the memory.)  Clipping is done by Opacus' own optimizers.


def _adapt_samplers(task: Task, gsm: Any) -> None:
    """Make the samplers of `gsm` add up their per-row gradients [B*K, ...] over copies, to [B, ...].

    Also lays their inputs out densely: Opacus 1.6 unfolds the input of a convolution with strides that hold for dense
    tensors only, and is silently wrong for an input in channels-last order, which attention in diffusers hands on.
    """
    copies, examples = task.copies, task.examples

    def adapted(sampler: Callable[..., dict[Any, Tensor]]) -> Callable[..., dict[Any, Tensor]]:
        def sample(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[Any, Tensor]:
            rows = sampler(layer, [a.contiguous() for a in activations], backprops)
            if copies == 1:
                return rows
            return {p: g.view(examples, copies, *g.shape[1:]).sum(1) for p, g in rows.items()}

        return sample

    gsm.GRAD_SAMPLERS = {layer: adapted(sampler) for layer, sampler in gsm.GRAD_SAMPLERS.items()}
    if copies > 1:
        _set_batch(task, gsm)


def _fold_copies(task: Task, gsm: Any) -> None:
    """Per-example gradients of a layer as one function of its K rows, which never makes gradients of single rows."""
    copies, examples = task.copies, task.examples
    if copies == 1:
        return

    def fold(layer: Any, bare: nn.Module) -> None:
        names = [n for n, _ in bare.named_parameters()]

        def loss(parameters: list[Tensor], activations: Tensor, backprops: Tensor) -> Tensor:
            mixed = activations.is_floating_point() and activations.dtype != parameters[0].dtype
            with torch.autocast(task.device.type, torch.bfloat16, enabled=mixed):
                out = torch.func.functional_call(bare, dict(zip(names, parameters, strict=True)), (activations,))
                return (out * backprops).sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

        def sample(parameters: list[Tensor], activations: Tensor, backprops: Tensor) -> Any:
            folded = (t.reshape(examples, copies, *t.shape[1:]) for t in (activations, backprops))
            return each(parameters, *folded)

        layer.ft_compute_sample_grad = sample

    for name, layer in gsm._module.named_modules():
        if hasattr(layer, "ft_compute_sample_grad"):
            fold(layer, task.module.get_submodule(name))  # the original, without hooks
    _set_batch(task, gsm)


def _set_batch(task: Task, gsm: Any) -> None:
    """Tell each layer that its gradients have B entries, in the place where Opacus' LSTM does so, too."""

    def before(layer: Any, _: Any) -> None:
        layer.max_batch_len = task.examples

    for layer in gsm.iterate_submodules(gsm._module):
        layer.register_forward_pre_hook(before)


def _opacus_options(module: nn.Module) -> dict[str, Any]:
    # In strict mode Opacus refuses every network with a buffer, even a table of constants.
    return {"loss_reduction": "sum", "strict": not any(True for _ in module.buffers())}


def _opacus_optimizer(kind: Any, module: nn.Module, clipping_norm: float) -> Any:
    sgd = torch.optim.SGD(module.parameters(), lr=0.0)
    return kind(sgd, noise_multiplier=0.0, max_grad_norm=clipping_norm, expected_batch_size=None, loss_reduction="sum")


def opacus_samples(task: Task, clipping_norm: float, *, functorch: bool) -> Method:
    """Per-example gradients of all layers by Opacus, clipped and summed by its DPOptimizer."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    module = copy.deepcopy(task.module)
    gsm = GradSampleModule(module, force_functorch=functorch, **_opacus_options(module))
    optimizer = _opacus_optimizer(DPOptimizer, module, clipping_norm)
    if functorch:
        _fold_copies(task, gsm)
    else:
        _adapt_samplers(task, gsm)

    def step() -> list[Tensor]:
        (task.losses(module, *task.batch).sum() / task.copies).backward()
        optimizer.clip_and_accumulate()
        return [p.summed_grad for p in optimizer.params]

    return Method(step, lambda: optimizer.zero_grad(set_to_none=True))


def opacus_two_passes(task: Task, clipping_norm: float, *, ghost: bool) -> Method:
    """Opacus' norms first, then a second backward pass of the weighted loss."""
    if ghost and task.copies > 1:
        raise Unavailable("its norms are those of single rows, and the norm of an average over copies needs more")
    if not ghost and task.copies == 1:
        raise Unavailable("stands in for opacus-ghost where there are copies")
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    module = copy.deepcopy(task.module)
    gsm = GradSampleModuleFastGradientClipping(
        module, max_grad_norm=clipping_norm, use_ghost_clipping=ghost, **_opacus_options(module)
    )
    optimizer = _opacus_optimizer(DPOptimizerFastGradientClipping, module, clipping_norm)
    _adapt_samplers(task, gsm)

    def step() -> list[Tensor]:
        losses = task.losses(module, *task.batch).view(task.examples, task.copies).mean(1)
        DPTensorFastGradientClipping(gsm, optimizer, losses, "sum").backward()
        return [p.grad for p in module.parameters()]

    def clear() -> None:
        optimizer.zero_grad(set_to_none=True)
        for p in module.parameters():
            p._forward_counter = 0

    return Method(step, clear)


# --------------------------------------------------------------------------------------------------- torch.func


class _Losses(nn.Module):
    """A network together with its loss, so that functional_call can swap its weights."""

    def __init__(self, task: Task, module: nn.Module) -> None:
        super().__init__()
        self.task, self.module = task, module

    def forward(self, *batch: Tensor) -> Tensor:
        return self.task.losses(self.module, *batch).mean()


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return float("inf")


def vmap(task: Task, clipping_norm: float) -> Method:
    """torch.func: the gradient of one example's mean loss over its K rows, mapped over examples, then clipped."""
    losses = _Losses(task, copy.deepcopy(task.module))
    parameters = {n: p.detach() for n, p in losses.named_parameters()}
    # Gradients of all examples, as much again while they are made, and activations: some ten times the weights each.
    each = 10 * sum(p.numel() * p.element_size() for p in parameters.values())
    chunk = None if each * task.examples < _free_memory(task.device) / 2 else max(1, task.examples // 4)

    def of_example(weights: dict[str, Tensor], *batch: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(losses, weights, batch)
        return value

    gradient = torch.func.vmap(
        torch.func.grad(of_example), in_dims=(None, *(0 for _ in task.batch)), chunk_size=chunk, randomness="error"
    )

    def step() -> list[Tensor]:
        folded = [t.view(task.examples, task.copies, *t.shape[1:]) for t in task.batch]
        samples = list(gradient(parameters, *folded).values())
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in samples]).norm(dim=0)
        factors = (clipping_norm / norms.clamp_min(1e-12)).clamp_max(1.0)
        return [torch.tensordot(factors, g, dims=1) for g in samples]

    return Method(step, _no_gradients(losses), "" if chunk is None else f"chunks of {chunk} examples")


def build(name: str, task: Task, clipping_norm: float) -> Method:
    """Plain autograd or a rival; Unavailable if it cannot do the task."""
    if name in OPACUS and missing("opacus"):
        raise Unavailable(f"Opacus is not installed: {INSTALL['opacus']}")
    match name:
        case "plain contiguous":
            return plain(task, torch.contiguous_format)
        case "plain channels-last":
            return plain(task, torch.channels_last)
        case "opacus-hooks" | "opacus-functorch":
            return opacus_samples(task, clipping_norm, functorch=name == "opacus-functorch")
        case "opacus-ghost" | "opacus-fast":
            return opacus_two_passes(task, clipping_norm, ghost=name == "opacus-ghost")
        case "vmap":
            return vmap(task, clipping_norm)
    raise ValueError(f"{name!r} is no method")
