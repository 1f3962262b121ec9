"""The steps of a run, built from its settings: the same in the process that leads and in those that follow."""

from __future__ import annotations

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.noise_levels import NoiseLevels
from dpsyngen.diffusion.stages import Stage
from dpsyngen.distributed import Ranks
from dpsyngen.hardware import Compute
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import Program
from dpsyngen.training.plan import Plan
from dpsyngen.training.private import Observer, PrivateStep
from dpsyngen.training.public import PublicStep, public_randomness
from dpsyngen.workers import Workers

PRETRAIN = "pretrain"
PUBLIC_INDEX = {PRETRAIN: 0, "cleaning": 1, "coarse": 2}
"""Which images and which initial weights a public phase has: by its name, so that one stage is the same network in
every variant, and experiments can share it."""


def levels_of(config: Config, stage: Stage) -> NoiseLevels:
    """Noise levels that a stage trains at."""
    n = config.network
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
    return PublicStep(
        program,
        levels_of(config, stage),
        config.public,
        public_randomness(config),
        offset,
        workers,
        ranks,
        f"public step {stage.name}",
        compute,
    )


def private_step(
    config: Config,
    plan: Plan,
    dataset: ImageDataset,
    randomness: Randomness,
    *,
    physical_batch: int,
    kernels: KernelChoices,
    workers: Workers,
    ranks: Ranks,
    compute: Compute,
    observer: Observer | None = None,
) -> PrivateStep:
    """The step that trains the private stage."""
    return PrivateStep(
        dataset,
        levels_of(config, plan.stages.private),
        config.network.label_dropout,
        plan.mechanism,
        randomness,
        physical_batch=physical_batch,
        kernels=kernels,
        workers=workers,
        observer=observer,
        ranks=ranks,
        compute=compute,
    )
