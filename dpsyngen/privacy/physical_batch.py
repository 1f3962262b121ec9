"""How many examples fit into memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dpsyngen.privacy.contributions import Contribution
from dpsyngen.privacy.per_example import PerExampleGradients

_SHARE = 0.5  # of the memory that is free; the rest is for what else the program and the machine do
_TEMPORARY = 1.5  # gradients of activations and workspaces come on top of what is kept


def available_memory(device: torch.device) -> int:
    """Bytes that can be used now on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def bytes_for_each_example(engine: PerExampleGradients, loss: Callable[[slice], Tensor], copies: int = 1) -> int:
    """Memory that one more example in a pass takes: what autograd keeps and the per-example gradients.

    Args:
        engine: the engine.
        loss: for a slice of at least two examples, the loss of each of their rows; see ``PerExampleGradients.sum``.
            Random numbers in place of private images do.
        copies: K.
    """
    counts = []
    for examples in (1, 2):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            contributions = engine.contributions(partial(loss, slice(0, examples)), examples, copies)
        counts.append(sum(kept.values()) + sum(_bytes_of(c) for c in contributions))
    return max(counts[1] - counts[0], 1)


def _bytes_of(contribution: Contribution) -> int:
    tensors = [v for v in vars(contribution).values() if isinstance(v, Tensor)]
    tensors += [t for v in vars(contribution).values() if isinstance(v, list) for t in v if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def find_physical_batch(
    engine: PerExampleGradients,
    loss: Callable[[slice], Tensor],
    *,
    copies: int = 1,
    memory: int | None = None,
    most: int | None = None,
) -> int:
    """The largest power of two of examples that fits into memory, with room to spare.

    Args:
        engine, loss, copies: see :func:`bytes_for_each_example`.
        memory: bytes that may be used; None: half of what is available now.
        most: upper end; None: 64 examples on a CPU, where more is no faster, and 4096 on a GPU.

    Returns:
        at least 1, and at least one for each worker if they fit.
    """
    device = engine.parameters[0].device
    budget = available_memory(device) * _SHARE if memory is None else memory
    limit = (64 if device.type == "cpu" else 4096) if most is None else most
    if budget < 1 or limit < 1:
        raise ValueError(f"memory={memory} and most={most} must be positive.")
    fits = budget / (_TEMPORARY * bytes_for_each_example(engine, loss, copies))
    batch = 1
    while 2 * batch <= min(fits, limit):
        batch *= 2
    return batch
