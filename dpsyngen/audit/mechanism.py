"""One step of the audited run's training code, with its settings: what it releases, and what it clips."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dpsyngen.audit.distinguish import StepGame, play_step_game
from dpsyngen.audit.findings import Finding
from dpsyngen.audit.networks import lively_denoiser
from dpsyngen.audit.sensitivity import check_gradients, check_sensitivity, layers_of
from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.loss import NoisyBatch, denoising_loss, make_noisy
from dpsyngen.diffusion.noise_levels import NoiseLevels
from dpsyngen.privacy.exact import GridGradient
from dpsyngen.privacy.per_example import ClippedGradient
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.plan import Shape
from dpsyngen.training.private import DpSgd, PrivateStep, in_units_of_the_gradient

_SLOTS_OF_DISCRETE_NOISE = 64  # its sampler takes a millisecond a call, however few numbers are asked for
_HUGE = 300.0  # pixels of an image that is as far from the others as a hostile one could be


def step_of(config: Config, mechanism: DpSgd) -> PrivateStep:
    """The training step with the audited run's constants, a fresh key, and no private image."""
    n = config.network
    blank = ImageDataset(np.zeros((1, 1, 8, 8), dtype=np.uint8), None, (), "none")
    return PrivateStep(
        blank,
        NoiseLevels(n.noise_mean, n.noise_std),
        n.label_dropout,
        mechanism,
        Randomness.from_system(),
        physical_batch=config.private.physical_batch or 16,
    )


def audit_noise(config: Config, mechanism: DpSgd, *, trials: int, confidence: float) -> StepGame:
    """The step-level game, played with the code that releases the run's gradients."""
    step = step_of(config, mechanism)

    def summed(module: nn.Module, loss: object, examples: int) -> ClippedGradient | GridGradient:
        return step.summed(step.engine(module), loss, examples)  # type: ignore[arg-type]

    return play_step_game(
        summed,
        step.released,
        clipping_norm=mechanism.clipping_norm,
        noise_multiplier=mechanism.noise_multiplier,
        expected_examples=float(mechanism.config.batch),
        copies=mechanism.config.copies,
        trials=trials,
        slots=_SLOTS_OF_DISCRETE_NOISE if mechanism.config.noise == "discrete" else 1,
        confidence=confidence,
    )


class ClippingAudit:
    """The clipped sums of the run's network on hostile images.

    Args:
        config: of the run.
        mechanism: its constants.
        shape: what is public about its images.
        device: where to compute.
        gaussian: the denoiser of the run's released DP moments, which its network is a residual of; None: there is
            none.
    """

    def __init__(
        self,
        config: Config,
        mechanism: DpSgd,
        shape: Shape,
        device: str = "cpu",
        gaussian: GaussianDenoiser | None = None,
    ) -> None:
        copies = min(max(config.private.copies, 2), 4)  # one copy would not show in which order they are averaged
        private = config.private.model_copy(update={"copies": copies})
        self.step = step_of(
            config, DpSgd(mechanism.records, mechanism.noise_multiplier, mechanism.clipping_norm, private)
        )
        seed = config.network.seed
        self.denoiser = lively_denoiser(config, shape, conditional=True, seed=seed, gaussian=gaussian).to(device)
        self.engine = self.step.engine(self.denoiser)
        self.copies = copies
        self.rows = _hostile_rows(config, self.denoiser, shape, copies, device)
        self.examples = len(self.rows.clean) // copies

    def findings(self) -> list[Finding]:
        """Sensitivity, and the order of averaging and clipping."""
        c, style = self.step.mechanism.clipping_norm, self.step.mechanism.config.clipping
        return [
            check_sensitivity(self._summed, self.examples, c),
            check_gradients(self._summed, self._reference, layers_of(self.engine.names), self.examples, c, style),
        ]

    def seconds_a_row(self) -> float:
        """What a row of a batch costs here, for choosing the size of longer audits."""
        begun = time.perf_counter()
        self._summed(range(self.examples))
        return (time.perf_counter() - begun) / (self.examples * self.copies)

    def _pick(self, examples: Sequence[int]) -> NoisyBatch:
        index = torch.tensor([e * self.copies + k for e in examples for k in range(self.copies)])
        r = self.rows
        labels = None if r.labels is None else r.labels[index]
        return NoisyBatch(r.clean[index], r.noisy[index], r.sigma[index], labels)

    def _summed(self, examples: Sequence[int]) -> list[Tensor]:
        batch = self._pick(examples)

        def loss(part: slice) -> Tensor:
            return denoising_loss(self.denoiser, batch.rows(slice(part.start * self.copies, part.stop * self.copies)))

        return in_units_of_the_gradient(self.step.summed(self.engine, loss, len(examples)))

    def _reference(self, example: int) -> list[list[Tensor]]:
        batch = self._pick([example])
        of_copies = []
        for k in range(self.copies):
            loss = denoising_loss(self.denoiser, batch.rows(slice(k, k + 1))).sum()
            of_copies.append(list(torch.autograd.grad(loss, self.engine.parameters)))
        return of_copies


def _hostile_rows(
    config: Config,
    denoiser: NetworkDenoiser,
    shape: Shape,
    copies: int,
    device: str,
) -> NoisyBatch:
    """Two random images, a third equal to the second, a blank one, and two whose pixels are far out of range."""
    size = (shape.channels, shape.resolution, shape.resolution)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((6, *size), generator=generator) * 2 - 1
    images[2] = images[1]
    images[3] = 0
    images[4] *= _HUGE
    images[5] = _HUGE
    labels = None if not denoiser.num_classes else torch.arange(6) % denoiser.num_classes
    n = config.network
    batch = make_noisy(
        images,
        labels,
        NoiseLevels(n.noise_mean, n.noise_std),
        copies=copies,
        num_classes=denoiser.num_classes,
        label_dropout=0.0,
        generator=generator,
    )
    classes = None if batch.labels is None else batch.labels.to(device)
    return NoisyBatch(batch.clean.to(device), batch.noisy.to(device), batch.sigma.to(device), classes)
