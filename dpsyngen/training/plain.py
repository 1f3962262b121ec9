"""Ordinary gradients, with the batch shared by the machine's cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dpsyngen.workers import Workers


def summed_gradients(
    parameters: Sequence[Tensor], loss: Callable[[slice], Tensor], examples: int, workers: Workers
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the summed loss of a batch.

    Args:
        parameters: what to differentiate by.
        loss: for a slice of the examples, any number of losses; called from several threads.
        examples: how many there are, at least 1.
        workers: who shares them.

    Returns:
        one gradient for each parameter (zeros where the loss does not depend on it), and the summed loss.
    """
    parts = min(workers.count, examples)
    edges = [i * examples // parts for i in range(parts + 1)]

    def one(part: slice) -> tuple[list[Tensor], Tensor]:
        total = loss(part).sum()
        return list(torch.autograd.grad(total, parameters, materialize_grads=True)), total.detach()

    results = workers.map(one, [slice(a, b) for a, b in pairwise(edges)])
    gradients, total = results[0]
    for more, value in results[1:]:
        torch._foreach_add_(gradients, more)
        total = total + value
    return gradients, total
