"""Training on private images by DP-SGD (Abadi et al. 2016) with noise multiplicity (DPDM, arXiv 2210.09929).

Each step: Poisson sampling of records; per-example gradients of the loss averaged over K noise levels, clipped to C
and summed; Gaussian noise; division by the *expected* batch; Adam.  The ledger has the steps before they are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.config import PrivateConfig
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import PreconditionedDenoiser
from dpsyngen.diffusion.loss import NoisyBatch, denoising_loss, make_noisy
from dpsyngen.diffusion.noise_levels import NoiseLevels
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.errors import RunError
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.ledger import Ledger, LedgerEntry
from dpsyngen.privacy.noise import noisy_mean
from dpsyngen.privacy.per_example import ClippedGradient, PerExampleGradients
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.privacy.sampling import poisson_sample
from dpsyngen.training.checkpoint import TrainState
from dpsyngen.training.public import Progress, PublicStep, set_learning_rate

QUERY = "dp-sgd"


@dataclass(frozen=True)
class DpSgd:
    """The constants of the mechanism.

    Attributes:
        records: declared number of records n (public).
        noise_multiplier: z; 0 trains without privacy (ε = ∞): neither clipping nor noise.
        clipping_norm: C.
        config: steps, batch, K and the optimizer.
    """

    records: int
    noise_multiplier: float
    clipping_norm: float
    config: PrivateConfig

    @property
    def sampling_rate(self) -> float:
        """q: expected batch over declared records."""
        return self.config.batch / self.records

    def mechanism(self, steps: int) -> Mechanism:
        """What `steps` steps are to the accountant."""
        return Mechanism(self.sampling_rate, self.noise_multiplier, steps)


class PrivateStep:
    """Takes one DP-SGD step at a time.

    Args:
        dataset: the private images.
        levels: noise levels of the private stage.
        label_dropout: probability of training a row without its class.
        mechanism: the constants.
        randomness: the run's secret streams.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        levels: NoiseLevels,
        label_dropout: float,
        mechanism: DpSgd,
        randomness: Randomness,
    ) -> None:
        self.dataset, self.levels, self.label_dropout = dataset, levels, label_dropout
        self.mechanism, self.randomness = mechanism, randomness

    def __call__(
        self, denoiser: PreconditionedDenoiser, optimizer: torch.optim.Optimizer, step: int
    ) -> dict[str, float]:
        """Take step number `step` (from 0); returns private figures about it."""
        m, c = self.mechanism, self.mechanism.config
        private = m.noise_multiplier > 0
        engine = PerExampleGradients(denoiser, m.clipping_norm)
        total, losses = engine.zero(), 0.0
        chosen = poisson_sample(self.randomness, step, len(self.dataset), m.sampling_rate)
        for part, start in enumerate(range(0, len(chosen), c.physical_batch)):
            rows = chosen[start : start + c.physical_batch]
            batch = self._noisy(rows, denoiser, step, part)
            seen: list[Tensor] = []

            def loss(batch: NoisyBatch = batch, seen: list[Tensor] = seen) -> Tensor:
                value = denoising_loss(denoiser, batch)
                seen.append(value.detach())
                return value

            if private:
                total = total + engine(loss, examples=len(rows), copies=c.copies)
            else:
                total = total + _plain(engine, loss, len(rows), c.copies)
            losses += float(seen[0].sum()) / c.copies
        gradients = noisy_mean(
            total,
            noise_multiplier=m.noise_multiplier,
            expected_examples=m.sampling_rate * m.records,
            randomness=self.randomness,
            step=step,
        )
        for parameter, gradient in zip(engine.parameters, gradients, strict=True):
            parameter.grad = gradient
        set_learning_rate(optimizer, c.learning_rate * self._rate(step))
        optimizer.step()
        count = max(total.examples, 1)
        finite = total.norms[torch.isfinite(total.norms)]
        return {
            "loss": losses / count,
            "examples": total.examples,
            "clipped": float((finite > m.clipping_norm).double().mean()) if private and len(finite) else 0.0,
            "median_norm": float(finite.median()) if len(finite) else 0.0,
            "not_finite": total.not_finite,
        }

    def _noisy(self, rows: NDArray[np.int64], denoiser: PreconditionedDenoiser, step: int, part: int) -> NoisyBatch:
        device = next(denoiser.parameters()).device
        images = to_float(torch.from_numpy(self.dataset.batch(rows)).to(device))
        labels = None
        if denoiser.num_classes:
            assert self.dataset.labels is not None
            labels = torch.from_numpy(self.dataset.labels[rows]).to(device)
        return make_noisy(
            images,
            labels,
            self.levels,
            copies=self.mechanism.config.copies,
            num_classes=denoiser.num_classes,
            label_dropout=self.label_dropout,
            generator=torch.Generator().manual_seed(self.randomness.seed("augmentation", step, part)),
        )

    def _rate(self, step: int) -> float:
        c = self.mechanism.config
        warm = min(1.0, (step + 1) / (c.warmup + 1))
        if c.schedule == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * step / c.steps))


def _plain(engine: PerExampleGradients, loss: Callable[[], Tensor], examples: int, copies: int) -> ClippedGradient:
    """The unclipped sum of gradients, for the non-private reference; its sensitivity is infinite."""
    for p in engine.parameters:
        p.grad = None
    (loss().sum() / copies).backward()
    sums = [torch.zeros_like(p) if p.grad is None else p.grad for p in engine.parameters]
    return ClippedGradient(sums, math.inf, examples, sums[0].new_zeros(0), 0)


def charge_ahead(ledger: Ledger, mechanism: DpSgd, step: int) -> None:
    """Make sure that the ledger has the step numbered `step` (from 0) before it is taken.

    Steps are charged in blocks of a checkpoint interval.  A step that a killed run had charged already is not
    charged again: it is the same step, with the same records and the same noise.

    Raises:
        BudgetExceeded: the block would exceed the target ε.
        RunError: earlier steps were charged at another sampling rate or noise, so settings were changed in between
            and steps that are charged already would not be the ones that are taken.
    """
    c = mechanism.config
    one = mechanism.mechanism(1)
    for entry in _entries(ledger):
        m = entry.mechanism
        if m is not None and (m.sampling_rate, m.noise_multiplier) != (one.sampling_rate, one.noise_multiplier):
            raise RunError(
                f"the ledger has DP-SGD steps at sampling rate {m.sampling_rate:.6g} and noise multiplier "
                f"{m.noise_multiplier:.6g}, but the run would go on at {one.sampling_rate:.6g} and "
                f"{one.noise_multiplier:.6g}: its configuration was changed.  Undo the change, or start a new run."
            )
    if step < charged_steps(ledger):
        return
    block = min(c.checkpoint_every, c.steps - step)
    if block < 1:
        raise AssertionError(f"step {step} is beyond the {c.steps} steps that were planned")
    ledger.charge(
        mechanism.mechanism(block),
        "DP-SGD steps that train the context stage on private images",
        query=QUERY,
        first_step=step,
        steps=block,
        l2_sensitivity=mechanism.clipping_norm if mechanism.noise_multiplier else "unbounded",
        expected_batch=c.batch,
    )


def charged_steps(ledger: Ledger) -> int:
    """DP-SGD steps that the ledger has."""
    return sum(int(e.details["steps"]) for e in _entries(ledger))


def _entries(ledger: Ledger) -> list[LedgerEntry]:
    return [e for e in ledger.entries if e.details.get("query") == QUERY]


def train_private(
    phase: str,
    state: TrainState,
    take: PrivateStep,
    ledger: Ledger,
    public: list[PublicStep] | None = None,
) -> Iterator[Progress]:
    """Go on from ``state.step`` to the end of the private phase, yielding after each step.

    Args:
        phase: name of the phase.
        state: the network in training.
        take: the private step.
        ledger: charged before the steps are taken.
        public: for a shared network, one PublicStep for each public stage: their steps are spread evenly between
            the private ones.
    """
    assert isinstance(state.module, PreconditionedDenoiser)
    steps = take.mechanism.config.steps
    while state.step < steps:
        step = state.step
        if public:
            total = sum(p.config.steps for p in public)
            for i in range(step * total // steps, (step + 1) * total // steps):
                public[i % len(public)](state.module, state.optimizers["public"], i // len(public))
        charge_ahead(ledger, take.mechanism, step)
        values = take(state.module, state.optimizers["private"], step)
        state.step += 1
        state.ema.update(state.module)
        yield Progress(phase, state.step, steps, values)
