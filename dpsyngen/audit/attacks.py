"""Attacks on a training run: what its releases, all weights and all images together say of who was in."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.audit.networks import lookup_scores
from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import NoisyBatch, denoising_loss
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.training.transcript import StepRecord, Transcript

LARGEST = 5 * 10**7
"""Numbers in all canaries' gradients together, which are in memory at once, several times over."""


class Scores:
    """What each step's release says of each canary: a white-box attack that knows every weight and every image.

    A release is the sum over canaries of s_i g_i plus noise, s_i = 1 for canaries that were chosen.  The gradients are
    known up to the noise that their images were used with, so they are computed at two draws of it: g_i is their mean,
    and half their difference is a direction in which the sum may be off.  The best linear estimate of s under this
    model (ridge regression) is added up over steps.

    Args:
        batches: noisy rows of all canaries, at two draws of noise of the auditor's own.
        config: of the run that is attacked.
        transcript: has the scale of its noise and its divisor.
    """

    def __init__(self, batches: tuple[NoisyBatch, NoisyBatch], config: Config, transcript: Transcript) -> None:
        self.batches, self.copies = batches, config.private.copies
        assert config.data.records is not None
        self.rate = config.private.batch / config.data.records
        self.noise_scale, self.expected_examples = transcript.noise_scale, transcript.expected_examples
        self._of_steps: dict[int, NDArray[np.float64]] = {}

    def add(self, record: StepRecord, engine: PerExampleGradients) -> None:
        """Score a step.  A step that is repeated after a crash counts once."""
        first, second = (self._gradients(engine, batch) for batch in self.batches)
        used = self.rate / 2  # a canary is in with probability 1/2, and then chosen with probability q
        known, doubt = (first + second) / 2, (first - second) / 2
        count = len(known)
        released = torch.cat([t.detach().flatten() for t in record.released]) * self.expected_examples
        rest = released.to(known.dtype) - used * known.sum(0)
        # Each direction is scaled by the standard deviation of its coefficient; the difference of two draws is √2 that
        # of one from the mean.
        directions = torch.cat([known * math.sqrt(used * (1 - used)), doubt * math.sqrt(2 * used)])
        gram = (directions @ directions.T).double()
        gram.diagonal().add_(self.noise_scale**2)
        estimate = torch.linalg.solve(gram, (directions @ rest).double())
        self._of_steps[record.step] = estimate[:count].cpu().numpy()

    @property
    def total(self) -> NDArray[np.float64]:
        """[m], over all steps."""
        return np.sum(list(self._of_steps.values()), axis=0)

    def _gradients(self, engine: PerExampleGradients, batch: NoisyBatch) -> Tensor:
        """[m, parameters], clipped, one canary at a time as far as memory is concerned."""
        module = engine.module
        assert isinstance(module, NetworkDenoiser)
        count = len(batch.clean) // self.copies
        chunk = max(1, min(32, LARGEST // (4 * sum(p.numel() for p in engine.parameters))))
        rows = []
        for first in range(0, count, chunk):
            part = range(first, min(first + chunk, count))
            piece = batch.rows(slice(part.start * self.copies, part.stop * self.copies))
            of_each = engine.per_example(partial(denoising_loss, module, piece), len(part), self.copies)
            flat = torch.cat([g.flatten(1) for g in of_each], 1)
            norms = flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
            rows.append(flat * (engine.clipping_norm / norms).clamp_max(1.0))
        return torch.cat(rows)


class LookupScores:
    """The same attack on the lookup network, where it is reading off a coordinate.

    Args:
        canaries: m; canary i has class i.
    """

    def __init__(self, canaries: int) -> None:
        self.canaries = canaries
        self._of_steps: dict[int, NDArray[np.float64]] = {}

    def add(self, record: StepRecord, engine: PerExampleGradients) -> None:
        """Score a step."""
        self._of_steps[record.step] = lookup_scores(record.released, self.canaries).cpu().numpy()

    @property
    def total(self) -> NDArray[np.float64]:
        """[m], over all steps."""
        return np.sum(list(self._of_steps.values()), axis=0)
