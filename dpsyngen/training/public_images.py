"""Which image of a program is used in which step of public training, and drawing them without holding up the steps."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen.hardware import send
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import Program


class PublicImages:
    """Batches by step number: fresh images without end, or a fixed number of them in a new order each time around.

    On a CPU the threads that train draw before they train; with an accelerator, threads draw the next batch while it is
    busy with this one.

    Args:
        program: what draws.
        batch: images of a step.
        offset: the first image of the program to use, so that networks see different images.
        distinct: how many different images there are; they are kept in memory.  None: all are fresh.
        randomness: *public* streams, for the order.
        threads: that draw on a CPU.
        share: which of the images of a batch are wanted; None: all.
    """

    def __init__(
        self,
        program: Program,
        batch: int,
        offset: int,
        distinct: int | None,
        randomness: Randomness,
        threads: int,
        share: slice | None = None,
    ) -> None:
        self.share = slice(0, batch) if share is None else share
        self.program, self.batch, self.offset, self.distinct = program, batch, offset, distinct
        self.randomness, self.threads = randomness, threads
        self._kept: NDArray[np.uint8] | None = None
        self._drawn = np.zeros(distinct or 0, dtype=bool)
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._drawing = ThreadPoolExecutor(1, "dpsyngen-drawing")
        self._ahead: tuple[int, Future[NDArray[np.uint8]]] | None = None

    def __call__(self, step: int, device: torch.device) -> torch.Tensor:
        """The images of step number `step` (from 0), uint8 [N, C, H, W], on the device."""
        if device.type == "cpu":
            return torch.from_numpy(self._images(step, self.threads))
        ahead, self._ahead = self._ahead, None
        cores = len(os.sched_getaffinity(0))
        images = ahead[1].result() if ahead is not None and ahead[0] == step else self._images(step, cores)
        self._ahead = step + 1, self._drawing.submit(self._images, step + 1, cores)
        return send(images, device)

    def _images(self, step: int, threads: int) -> NDArray[np.uint8]:
        first, stop = step * self.batch + self.share.start, step * self.batch + self.share.stop
        if self.distinct is None or first == stop:
            return self.program.batch(range(self.offset + first, self.offset + stop), threads=threads)
        places = np.array([self._place(position) for position in range(first, stop)])
        if self._kept is None:
            p = self.program
            self._kept = np.empty((self.distinct, p.channels, p.resolution, p.resolution), dtype=np.uint8)
        new = np.unique(places[~self._drawn[places]])
        if len(new):
            self._kept[new] = self.program.batch(self.offset + new, threads=threads)
            self._drawn[new] = True
        return self._kept[places]

    def _place(self, position: int) -> int:
        """Which of the distinct images is the one at a position of the endless sequence."""
        assert self.distinct is not None
        turn, within = divmod(position, self.distinct)
        if turn not in self._orders:
            generator = torch.Generator().manual_seed(self.randomness.seed("sampling", turn, self.offset))
            order = torch.randperm(self.distinct, generator=generator).numpy()
            # A batch reaches into the next turn, and the one drawn ahead may be the first of it.
            self._orders = {k: v for k, v in self._orders.items() if k >= turn - 1} | {turn: order}
        return int(self._orders[turn][within])
