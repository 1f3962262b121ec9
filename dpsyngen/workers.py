"""Passes over parts of a batch, side by side on the cores of one machine.

PyTorch splits each *operation* over the cores, which for images of this size leaves them waiting for one another
many hundred times a pass.  Splitting the *batch* instead, one thread with its own part and undivided operations,
needs them to meet once.  PyTorch releases Python's lock inside its operations, so threads suffice.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_MOST = 8  # beyond that, Python's lock costs more than finer parts gain: operations are split as well


class Workers:
    """`count` threads that share the cores; None: one for each of ``torch.get_num_threads()``, at most 8.

    With one worker, or inside of a worker, everything runs in the calling thread.
    """

    def __init__(self, count: int | None = None) -> None:
        if count is not None and count < 1:
            raise ValueError(f"count is {count}, but there must be at least one worker.")
        self.cores = torch.get_num_threads()
        self.count = min(self.cores, _MOST) if count is None else count
        self._each = max(1, self.cores // self.count)
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def map(self, function: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
        """``[function(i) for i in items]``, in order, in the caller's modes; the first error comes when all ended."""
        if self.count == 1 or len(items) <= 1 or getattr(_worker, "inside", False):
            return [function(item) for item in items]
        if self._pool is None or self._process != os.getpid():  # a forked process has no other threads
            self._process = os.getpid()
            self._pool = ThreadPoolExecutor(self.count, "dpsyngen-worker", self._start)
        # The caller's modes, which new threads do not inherit.
        grad = torch.is_grad_enabled()
        autocast = {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}

        def run(item: _In) -> _Out:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(grad))
                for device, dtype in autocast.items():
                    stack.enter_context(torch.autocast(device, dtype=dtype))
                return function(item)

        # Some libraries take their number of threads from a global setting, others from a thread's own.
        with _changing, contextlib.ExitStack() as at_end:
            at_end.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self._each)
            futures = [self._pool.submit(run, item) for item in items]
            try:
                return [future.result() for future in futures]
            finally:
                wait([future for future in futures if not future.cancel()])

    def _start(self) -> None:
        _worker.inside = True
        torch.get_num_threads()  # a thread's first use of PyTorch resets its setting; get that over with
        torch.set_num_threads(self._each)


_changing = threading.Lock()


def _after_fork() -> None:
    global _changing
    _changing = threading.Lock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork)
_worker = threading.local()  # has `inside` in the threads of any pool, which do not share their parts any further


def summed_gradients(
    parameters: Sequence[Tensor], loss: Callable[[slice], Tensor], examples: int, workers: Workers
) -> tuple[list[Tensor], Tensor]:
    """Gradients of the summed loss of a batch, one for each parameter (zeros where it has none), and the summed loss.

    `loss` gives for a slice of the `examples`, at least one, any number of losses; it is called from several threads.
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
