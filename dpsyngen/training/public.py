"""Training on programmatic images: ordinary Adam, no private data, no privacy cost.

Every random choice is a function of the public seed and the step, so the result is the same whatever the private
images are.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.config import Config, NetworkConfig, PublicConfig
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import NoiseLevels, denoising_loss, make_noisy
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.diffusion.stages import Stage, StageMap
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.hardware import Compute, send
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import Program
from dpsyngen.training.checkpoint import TrainState
from dpsyngen.training.log import Step
from dpsyngen.workers import Workers, summed_gradients

PRETRAIN = "pretrain"
PUBLIC_INDEX = {PRETRAIN: 0, "cleaning": 1, "coarse": 2}
"""Which images and which initial weights a public phase has: by its name, so that one stage is the same network in
every variant, and experiments can share it."""


def pretraining(stages: StageMap) -> Stage:
    """The noise levels at which programs train what the private network starts from."""
    private = stages.private
    low, high = (private.low, private.high) if stages.pretrain == "matched" else (-math.inf, math.inf)
    return Stage(PRETRAIN, low, high, "public", PRETRAIN)


class PublicImages:
    """Batches by step number: fresh images without end, or a fixed number of them in a new order each time around.

    On a CPU the threads that train draw before they train; with an accelerator, threads draw the next batch while it is
    busy with this one.

    Args:
        program, batch, share: what draws, how many images a step has, and which of them are wanted; None: all.
        offset: the first image of the program to use, so that networks see different images.
        distinct: how many different images there are; they are kept in memory.  None: all are fresh.
        randomness, threads: *public* streams, for the order, and how many draw on a CPU.
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
        self._kept = np.empty((distinct or 0, program.channels, program.resolution, program.resolution), dtype=np.uint8)
        self._drawn = np.zeros(distinct or 0, dtype=bool)
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
        begin, end = first // self.distinct, (stop - 1) // self.distinct
        order = np.concatenate([self._order(turn, self.distinct) for turn in range(begin, end + 1)])
        places = order[first - begin * self.distinct : stop - begin * self.distinct]
        new = np.unique(places[~self._drawn[places]])
        if len(new):
            self._kept[new] = self.program.batch(self.offset + new, threads=threads)
            self._drawn[new] = True
        return self._kept[places]

    def _order(self, turn: int, distinct: int) -> NDArray[np.int64]:
        generator = torch.Generator().manual_seed(self.randomness.seed("sampling", turn, self.offset))
        return torch.randperm(distinct, generator=generator).numpy()


class PublicStep:
    """Takes one Adam step at a time on programmatic images, from number `offset` on, at the noise `levels` of a stage.

    `randomness` are *public* streams, `workers` (None: the calling thread) and `ranks` share a batch, `name` is what
    the main process calls this step when it leads others, and `compute` the precision (None: as PyTorch is set).
    """

    def __init__(
        self,
        program: Program,
        levels: NoiseLevels,
        config: PublicConfig,
        randomness: Randomness,
        offset: int = 0,
        workers: Workers | None = None,
        ranks: Ranks = ALONE,
        name: str = "public step",
        compute: Compute | None = None,
    ) -> None:
        self.levels, self.config, self.randomness, self.offset = levels, config, randomness, offset
        self.workers, self.ranks, self.name, self.compute = workers or Workers(1), ranks, name, compute
        share, threads = ranks.share(config.batch), self.workers.count
        self.images = PublicImages(program, config.batch, offset, config.distinct, randomness, threads, share)

    def __call__(self, denoiser: NetworkDenoiser, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Take step number `step` (from 0) and return its loss."""
        c = self.config
        with self.ranks.lead(self.name, step=step):
            gradients, total = self.gradients(denoiser, step)
        rows = c.batch * c.copies
        for parameter, gradient in zip(denoiser.parameters(), gradients, strict=True):
            parameter.grad = gradient / rows
        set_learning_rate(optimizer, c.learning_rate * min(1.0, (step + 1) / (c.warmup + 1)))
        optimizer.step()
        return float(total) / rows

    def gradients(self, denoiser: NetworkDenoiser, step: int) -> tuple[list[Tensor], Tensor]:
        """Gradients of the summed loss of the batch, and that loss; in a follower, which does no more, of its part."""
        c, parameters = self.config, list(denoiser.parameters())
        self.ranks.copy_from_main(parameters)
        device = parameters[0].device
        mine = self.ranks.share(c.batch)
        images = self.images(step, device)
        if not self.ranks.alone:
            # The noise of the whole batch comes out of one stream, so all draw all of it, on empty images.
            whole = images.new_zeros(c.batch, *images.shape[1:])
            whole[mine] = images
            images = whole
        batch = make_noisy(
            to_float(images),
            None,  # programmatic images have no class
            self.levels,
            copies=c.copies,
            num_classes=denoiser.num_classes,
            label_dropout=0.0,
            generator=torch.Generator().manual_seed(self.randomness.seed("augmentation", step, self.offset)),
        )

        def loss(part: slice) -> Tensor:
            start, stop = mine.start + part.start, mine.start + part.stop
            return denoising_loss(denoiser, batch.rows(slice(start * c.copies, stop * c.copies)))

        if mine.start == mine.stop:
            gradients, total = [torch.zeros_like(p) for p in parameters], parameters[0].new_zeros(())
        else:
            with contextlib.nullcontext() if self.compute is None else self.compute.autocast():
                gradients, total = summed_gradients(parameters, loss, mine.stop - mine.start, self.workers)
        *gradients, total = self.ranks.sum_to_main([*gradients, total.detach()])
        return gradients, total


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = value


def levels_of(n: NetworkConfig, stage: Stage) -> NoiseLevels:
    """Noise levels that a stage trains at."""
    return NoiseLevels(n.noise_mean, n.noise_std, stage.low, stage.high)


def public_step(
    config: Config, program: Program, stage: Stage, workers: Workers, ranks: Ranks, compute: Compute
) -> PublicStep:
    """The step that trains `stage` on images of the program.

    On a network that DP-SGD trains as well, `compute` must be that of DP-SGD steps: what is taken again after a crash
    has to round in the same way.
    """
    # Each network has its own images: a thousand million are more than any phase draws.
    offset = PUBLIC_INDEX[stage.name] * 10**9
    levels, name = levels_of(config.network, stage), f"public step {stage.name}"
    randomness = Randomness.from_insecure_seed(config.program.seed)  # public, and the same whatever the images
    return PublicStep(program, levels, config.public, randomness, offset, workers, ranks, name, compute)


def train_public(phase: str, state: TrainState, take: PublicStep) -> Iterator[Step]:
    """Go on from ``state.step`` to the end of a public phase, yielding after each step."""
    assert isinstance(state.module, NetworkDenoiser)
    while state.step < take.config.steps:
        optimizer, batch = state.optimizers["public"], take.config.batch
        loss = take(state.module, optimizer, state.step)
        state.step += 1
        state.ema.update(state.module)
        values = {"loss": loss, "batch": batch, "images": batch * state.step}
        values["learning_rate"] = optimizer.param_groups[0]["lr"]
        yield Step(phase, state.step, take.config.steps, values)
