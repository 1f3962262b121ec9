"""Training on private images by DP-SGD (Abadi et al., CCS 2016) with noise multiplicity (DPDM, arXiv 2210.09929).

A step, in their symbols (n records, sampling rate q, clipping norm C, noise multiplier z, K noise levels an image):

1. B: each record on its own with probability q (Poisson sampling; an empty B is a step like any other);
2. g_i = ∇ (1/K) Σ_k ℓ(x_i, σ_k), the gradient of an image's loss averaged over its K noise levels;
3. S = Σ_{i in B} g_i · min(1, C / ‖g_i‖), whose L2 sensitivity is C;
4. g = (S + z C N(0, I)) / (q n): the divisor is a constant, never the realised batch;
5. Adam takes g.  From 4 on everything is public.

The ledger has the steps before they are taken.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.config import PrivateConfig
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import NoiseLevels, NoisyBatch, denoising_loss, make_noisy
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.errors import RunError
from dpsyngen.hardware import Compute
from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.privacy.clipping import ClippedGradient
from dpsyngen.privacy.exact import DiscreteGaussian
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.noise import GaussianMechanism, NoPrivacy, StepMechanism
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness, poisson_sample
from dpsyngen.training.checkpoint import TrainState
from dpsyngen.training.log import Step
from dpsyngen.training.public import PublicStep, set_learning_rate
from dpsyngen.workers import Workers

QUERY = "dp-sgd"


@dataclass(frozen=True)
class StepRecord:
    """One DP-SGD step, as it was taken.  Everything but `released` is private."""

    step: int  # its number, from 0
    chosen: NDArray[np.int64]  # [B], the records that Poisson sampling chose
    sums: list[Tensor]  # the clipped sum, one tensor a parameter, in units of the gradient
    released: list[Tensor]  # what the optimizer gets, one tensor a parameter


Observer = Callable[[StepRecord, PerExampleGradients], None]
"""Looks on as steps are taken, for audits.  What it sees is private."""


@dataclass(frozen=True)
class DpSgd:
    """The constants of the mechanism."""

    records: int  # declared number of records n (public)
    noise_multiplier: float  # z; 0 trains without privacy (ε = ∞): neither clipping nor noise
    clipping_norm: float  # C
    config: PrivateConfig  # steps, batch, K and the optimizer

    @property
    def sampling_rate(self) -> float:
        """q: expected batch over declared records."""
        return self.config.batch / self.records

    def mechanism(self, steps: int) -> Mechanism:
        """What `steps` steps are to the accountant."""
        return Mechanism(self.sampling_rate, self.noise_multiplier, steps)


# Images whose noise is drawn together.  Fixed, so that the noise of a step does not depend on how the batch is divided
# among memory and cores: a step that is repeated after a crash is the same step.
_BLOCK = 16


@dataclass(frozen=True)
class Computing:
    """How private steps are computed: it decides about speed and rounding, not about what a step is.

    All `ranks` draw the same set of records from the run's stream and take a part of it each; the clipped sums are
    added up in the main one, which adds noise to their sum, once.
    """

    physical_batch: int  # images in memory at a time
    kernels: KernelChoices = field(default_factory=KernelChoices)  # how convolutions compute
    workers: Workers = field(default_factory=lambda: Workers(1))  # threads that share a batch
    ranks: Ranks = ALONE  # processes that share a batch
    compute: Compute | None = None  # precision, see :meth:`Compute.for_dp_steps`; None: as PyTorch is set
    observer: Observer | None = None  # told of each step just before the optimizer uses it, in audits
    before_release: Callable[[], None] | None = None  # called when a step's sum is known, before its noise is


class PrivateStep:
    """Takes one DP-SGD step at a time, at the noise `levels` of the private stage.

    `label_dropout` is the probability of training a row without its class.  Nothing is padded: the processes meet once
    a step, however many records each has, none included.
    """

    name = "private step"

    def __init__(
        self,
        dataset: ImageDataset,
        levels: NoiseLevels,
        label_dropout: float,
        dp: DpSgd,
        randomness: Randomness,
        how: Computing,
    ) -> None:
        self.dataset, self.levels, self.label_dropout, self.dp = dataset, levels, label_dropout, dp
        self.randomness, self.how, self.ranks = randomness, how, how.ranks
        z, expected = dp.noise_multiplier, dp.sampling_rate * dp.records
        kind = DiscreteGaussian if dp.config.noise == "discrete" else GaussianMechanism
        self.mechanism: StepMechanism = kind(z, expected) if z > 0 else NoPrivacy(expected)
        self._engine: PerExampleGradients | None = None
        self._makers = Workers()  # of noisy rows, for a GPU, whose passes are made by one worker

    def engine(self, denoiser: torch.nn.Module) -> PerExampleGradients:
        """The engine for this network, kept from step to step."""
        if self._engine is None or self._engine.module is not denoiser:
            self._engine = PerExampleGradients(
                denoiser,
                self.dp.clipping_norm,
                style=self.dp.config.clipping,
                kernels=self.how.kernels,
                workers=self.how.workers,
            )
        return self._engine

    def __call__(self, denoiser: NetworkDenoiser, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
        """Take step number `step` (from 0); returns private figures about it."""
        dp, c = self.dp, self.dp.config
        engine = self.engine(denoiser)
        with self.ranks.lead(self.name, step=step):
            chosen, total, loss = self.gradients(denoiser, step)
        if self.how.before_release is not None:
            self.how.before_release()
        # 4. S + z C N(0, I), over the expected batch: the one line after which everything is public.
        gradients = self.mechanism.release(total, self.randomness, step)
        if self.how.observer is not None:
            self.how.observer(StepRecord(step, chosen, total.gradient, gradients), engine)
        for parameter, gradient in zip(engine.parameters, gradients, strict=True):
            parameter.grad = gradient
        # 5. Adam.
        rate = c.learning_rate * self._rate(step)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        count = max(total.examples, 1)
        finite = total.norms[torch.isfinite(total.norms)]
        return {
            "loss": loss / c.copies / count,
            "examples": total.examples,
            "clipped": float((finite > dp.clipping_norm).double().mean()) if len(finite) else 0.0,
            "median_norm": float(finite.median()) if len(finite) else 0.0,
            "not_finite": total.not_finite,
            "learning_rate": rate,
            **self._noise_and_signal(total, engine),
        }

    def gradients(self, denoiser: NetworkDenoiser, step: int) -> tuple[NDArray[np.int64], ClippedGradient, float]:
        """The records of a step, the sum of their clipped gradients, and the sum of their losses over all copies; in a
        follower, which does no more, the last two are of its part.
        """
        engine, ranks = self.engine(denoiser), self.ranks
        ranks.copy_from_main(engine.parameters)
        # 1. B, the same in all processes, each of which takes a part of it.
        chosen = poisson_sample(self.randomness, step, len(self.dataset), self.dp.sampling_rate)
        mine = ranks.share(len(chosen))
        seen: dict[int, Tensor] = {}

        def loss(part: slice) -> Tensor:
            part = slice(mine.start + part.start, mine.start + part.stop)
            value = denoising_loss(denoiser, self._noisy(chosen, part, denoiser, step))
            seen[part.start] = value.detach().sum()  # not looked at yet: that would wait for a GPU
            return value

        # 2. and 3. The engine averages the losses of an image's K rows before it clips.
        with contextlib.nullcontext() if self.how.compute is None else self.how.compute.autocast():
            total = self.summed(engine, loss, mine.stop - mine.start)
        losses = sum(float(seen[start]) for start in sorted(seen))
        if ranks.alone:
            return chosen, total, losses
        # Small figures first, over gloo: where a process is gone that shows at once, and the large sums are not begun.
        about = ranks.gather_to_main((len(chosen), total.norms.cpu(), total.not_finite, total.l2_sensitivity, losses))
        sums = ranks.sum_to_main(total.sums)
        if about is None:
            return chosen, total, losses
        records, norms, dropped, sensitivities, all_losses = zip(*about, strict=True)
        if set(records) != {len(chosen)} or set(sensitivities) != {total.l2_sensitivity}:
            raise AssertionError(f"step {step}: the processes do not do the same ({records}, {sensitivities})")
        # The parts are disjoint, so their sum has the sensitivity of each.
        joined = replace(total, sums=sums, norms=torch.cat(norms), not_finite=sum(dropped), examples=len(chosen))
        return chosen, joined, sum(all_losses)

    def summed(self, engine: PerExampleGradients, loss: Callable[[slice], Tensor], examples: int) -> ClippedGradient:
        """The sum of the clipped gradients of so many `examples`, 0 included; `loss` is of each row of a slice."""
        copies = self.dp.config.copies
        return self.mechanism.sum(engine, loss, examples, copies=copies, physical_batch=self.how.physical_batch)

    def _noise_and_signal(self, total: ClippedGradient, engine: PerExampleGradients) -> dict[str, float]:
        """Norms (L2) of the averaged clipped gradient, and of the noise that is added to it, as it is expected."""
        dp, parameters = self.dp, sum(p.numel() for p in engine.parameters)
        signal = math.sqrt(sum(float(s.square().sum()) for s in total.gradient)) / dp.config.batch
        noise = dp.noise_multiplier * dp.clipping_norm * math.sqrt(parameters) / dp.config.batch
        norms = {"gradient_norm": signal, "noise_norm": noise}
        # An empty batch has no signal, so no ratio.
        return norms | {"noise_to_signal": noise / signal} if signal > 0 else norms

    def _noisy(self, chosen: NDArray[np.int64], part: slice, denoiser: NetworkDenoiser, step: int) -> NoisyBatch:
        """Noisy rows of the examples ``chosen[part]``: made on the CPU, and sent at once."""
        first = part.start // _BLOCK
        blocks = range(first, -(-part.stop // _BLOCK))
        whole = self._makers.map(
            lambda i: self._block(chosen[i * _BLOCK : (i + 1) * _BLOCK], denoiser, step, i), blocks
        )
        copies, skip = self.dp.config.copies, part.start - first * _BLOCK
        rows = NoisyBatch.joined(whole).rows(slice(skip * copies, (skip + part.stop - part.start) * copies))
        return rows.to(next(denoiser.parameters()).device)

    def _block(self, records: NDArray[np.int64], denoiser: NetworkDenoiser, step: int, number: int) -> NoisyBatch:
        images = to_float(torch.from_numpy(self.dataset.batch(records)))
        labels = None
        if denoiser.num_classes:
            assert self.dataset.labels is not None
            labels = torch.from_numpy(self.dataset.labels[records])
        return make_noisy(
            images,
            labels,
            self.levels,
            copies=self.dp.config.copies,
            num_classes=denoiser.num_classes,
            label_dropout=self.label_dropout,
            generator=torch.Generator().manual_seed(self.randomness.seed("augmentation", step, number)),
        )

    def _rate(self, step: int) -> float:
        c = self.dp.config
        warm = min(1.0, (step + 1) / (c.warmup + 1))
        if c.schedule == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * step / c.steps))


def charge_ahead(ledger: Ledger, dp: DpSgd, step: int) -> None:
    """Make sure that the ledger has the step numbered `step` (from 0) before it is taken; else BudgetExceeded.

    Steps are charged in blocks of a checkpoint interval.  A step that a killed run had charged already is not charged
    again: it is the same step, with the same records and the same noise.  RunError if steps were charged at another
    sampling rate or noise, so that they would not be the ones that are taken.
    """
    c = dp.config
    for m in charged_mechanisms(ledger):
        if m != dp.mechanism(m.count):
            raise RunError(
                f"the ledger has DP-SGD steps at sampling rate {m.sampling_rate:.6g} and noise multiplier "
                f"{m.noise_multiplier:.6g}: undo the change of settings, or start a new run."
            )
    if step < charged_steps(ledger):
        return
    block = min(c.checkpoint_every, c.steps - step)
    ledger.charge(
        dp.mechanism(block),
        "DP-SGD steps that train the context stage on private images",
        query=QUERY,
        first_step=step,
        steps=block,
        l2_sensitivity=dp.clipping_norm if dp.noise_multiplier else "unbounded",
        clipping=c.clipping,
        noise=c.noise,
        expected_batch=c.batch,
    )


def charged_steps(ledger: Ledger) -> int:
    """DP-SGD steps that the ledger has."""
    return sum(int(e.details["steps"]) for e in ledger.entries if e.details.get("query") == QUERY)


def charged_mechanisms(ledger: Ledger) -> list[Mechanism]:
    """What the ledger says that the DP-SGD steps of this run are."""
    entries = (e for e in ledger.entries if e.details.get("query") == QUERY)
    return [e.mechanism for e in entries if e.mechanism is not None]


def epsilon_so_far(ledger: Ledger, dp: DpSgd, step: int) -> float:
    """ε, at the ledger's δ, after `step` steps and all that came before them (DP moments), in twentieths of the run: of
    the next one that is whole.

    So many evaluations take seconds in all, and the last gives the ε of the certificate.
    """
    steps = dp.config.steps
    part = -(-steps // 20)
    charged = dp.mechanism(min(steps, -(-step // part) * part))
    others = [e.mechanism for e in ledger.entries if e.mechanism is not None and e.details.get("query") != QUERY]
    whole = [*others, dp.mechanism(steps)]
    return epsilon([*others, charged], ledger.delta, group_size=ledger.group_size, whole=whole)


def train_private(
    phase: str, state: TrainState, take: PrivateStep, ledger: Ledger, public: list[PublicStep]
) -> Iterator[Step]:
    """Go on from ``state.step`` to the end of the private phase, yielding after each step; `ledger` is charged before.

    `public` has for a shared network one PublicStep a public stage: their steps are spread evenly between the private.
    """
    assert isinstance(state.module, NetworkDenoiser)
    dp, steps, public_steps = take.dp, take.dp.config.steps, sum(p.config.steps for p in public)
    while state.step < steps:
        step = state.step
        losses = [
            public[i % len(public)](state.module, state.optimizers["public"], i // len(public))
            for i in range(step * public_steps // steps, (step + 1) * public_steps // steps)
        ]
        charge_ahead(ledger, dp, step)
        values = take(state.module, state.optimizers["private"], step)
        state.step += 1
        state.ema.update(state.module)
        values["epochs"] = state.step * dp.sampling_rate
        if losses:
            values["public_loss"] = sum(losses) / len(losses)
        if take.how.observer is None:  # audits take the same steps many times
            values["epsilon"] = epsilon_so_far(ledger, dp, state.step)
        yield Step(phase, state.step, steps, values, private=True)
