"""Training on programmatic images: ordinary Adam, no private data, no privacy cost.

Every random choice is a function of the public seed and the step, so the result is the same whatever the private
images are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dpsyngen.config import Config, PublicConfig
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import denoising_loss, make_noisy
from dpsyngen.diffusion.noise_levels import NoiseLevels
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import Program
from dpsyngen.training.checkpoint import TrainState
from dpsyngen.training.plain import summed_gradients
from dpsyngen.training.public_images import PublicImages
from dpsyngen.workers import Workers


class Progress(NamedTuple):
    """One finished step.

    Attributes:
        phase: name of the phase.
        step: steps done, from 1; queries of DP moments are all done at once.
        steps: steps of the phase.
        values: what to log; private unless the phase is public.
    """

    phase: str
    step: int
    steps: int
    values: dict[str, float]


class PublicStep:
    """Takes one Adam step at a time on programmatic images.

    Args:
        program: endless source of images.
        levels: noise levels of the stage.
        config: batch, K, learning rate, warm-up.
        randomness: *public* streams; see :func:`public_randomness`.
        offset: first image of the program to use, so that networks see different images.
        workers: threads that share a batch; None: the calling one alone.
    """

    def __init__(
        self,
        program: Program,
        levels: NoiseLevels,
        config: PublicConfig,
        randomness: Randomness,
        offset: int = 0,
        workers: Workers | None = None,
    ) -> None:
        self.levels, self.config = levels, config
        self.randomness, self.offset = randomness, offset
        self.workers = workers or Workers(1)
        self.images = PublicImages(program, config.batch, offset, config.distinct, randomness, self.workers.count)

    def __call__(self, denoiser: NetworkDenoiser, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Take step number `step` (from 0) and return its loss."""
        c = self.config
        device = next(denoiser.parameters()).device
        images = to_float(self.images(step, device))
        generator = torch.Generator().manual_seed(self.randomness.seed("augmentation", step, self.offset))
        batch = make_noisy(
            images,
            None,  # programmatic images have no class
            self.levels,
            copies=c.copies,
            num_classes=denoiser.num_classes,
            label_dropout=0.0,
            generator=generator,
        )
        parameters = list(denoiser.parameters())
        gradients, total = summed_gradients(
            parameters,
            lambda part: denoising_loss(denoiser, batch.rows(slice(part.start * c.copies, part.stop * c.copies))),
            c.batch,
            self.workers,
        )
        rows = c.batch * c.copies
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / rows
        set_learning_rate(optimizer, c.learning_rate * min(1.0, (step + 1) / (c.warmup + 1)))
        optimizer.step()
        return float(total) / rows


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = value


def public_randomness(config: Config) -> Randomness:
    """Streams that depend on the public seed only."""
    return Randomness.from_insecure_seed(config.program.seed)


def train_public(phase: str, state: TrainState, take: PublicStep) -> Iterator[Progress]:
    """Go on from ``state.step`` to the end of a public phase, yielding after each step."""
    assert isinstance(state.module, NetworkDenoiser)
    while state.step < take.config.steps:
        optimizer, batch = state.optimizers["public"], take.config.batch
        loss = take(state.module, optimizer, state.step)
        state.step += 1
        state.ema.update(state.module)
        values = {
            "loss": loss,
            "batch": batch,
            "images": batch * state.step,
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        yield Progress(phase, state.step, take.config.steps, values)
