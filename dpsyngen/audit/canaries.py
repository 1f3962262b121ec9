"""Training runs of the audit's own: the audited run's settings, on canary images drawn by a program.

They go the way of every run (``start``, ``Training.steps``, a crash, ``resume``), with entropy from the operating
system, in a temporary folder.  No private image is touched, so they cost no privacy.  They train one of two networks:

The *lookup* network has one number for each class and nothing else.  A canary with a class of its own then has a
gradient along a coordinate of its own, far longer than C, and the same whatever noise is drawn: each step in which it
is used moves what is released in that coordinate by exactly C.

The *lively* network is the run's, with weights as if it had been trained for a while.  Fresh ones have layers near zero
behind which nothing has a gradient, so all images pull at the same few weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsyngen.audit.invariants import Claim, Transcript, check_transcript
from dpsyngen.audit.one_run import OneRun, lookup_scores, plan_guesses
from dpsyngen.audit.report import Finding
from dpsyngen.config import Config, DataConfig, PrivacyConfig, StagesConfig
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.programs import make_program
from dpsyngen.training.networks import make_denoiser
from dpsyngen.training.pipeline import Hooks, Training
from dpsyngen.training.plan import Shape
from dpsyngen.training.private import StepRecord, charged_mechanisms, charged_steps
from dpsyngen.training.run import Run

LOOKUP_LEVELS = {"noise_mean": 2.0, "noise_std": 0.1}
"""Density of log σ: noise far above the image, where the loss hardly depends on which noise it was."""

_PERTURBATION = 0.05  # standard deviation of what is added to each weight
_STEEP = 1e4
_DELTA = 4e-3  # δ of the audit's own runs, times their records
CHECKPOINT_EVERY = 4


@dataclass(frozen=True)
class CanaryPlan:
    """The size of a run of the audit's own."""

    canaries: int
    others: int  # images that are always in
    batch: int  # expected, of all canaries + others
    steps: int
    lookup: bool = False  # train the lookup network, which needs classes, instead of the run's
    resolution: int = 8
    channels: int = 1
    classes: bool = True
    crash_after: int | None = None  # steps after which the session ends like a killed process, before a checkpoint
    score: bool = False  # attack it: the lookup network only


def draw_canaries(plan: CanaryPlan) -> tuple[ImageDataset, NDArray[np.bool_]]:
    """Draw canaries, each in or not by a fair coin, with entropy from the operating system.

    Returns what is trained on, the others first (with classes, each canary has one of its own, and the others share
    one), and which canaries are in it, [canaries].
    """
    rng = np.random.default_rng()
    shape = (plan.canaries, plan.channels, plan.resolution, plan.resolution)
    # Black and white pixels at random are as unlike each other as images can be; the lookup network tells canaries
    # apart by class, and white ones have gradients of one sign.
    canaries = rng.integers(1 if plan.lookup else 0, 2, shape, dtype=np.uint8) * 255
    inside = rng.random(plan.canaries) < 0.5
    program = make_program("dead-leaves", resolution=plan.resolution, channels=plan.channels)
    images = np.concatenate([program.batch(range(plan.others)), canaries[inside]])
    if not plan.classes:
        return ImageDataset(images, None, (), "canaries of an audit"), inside
    labels = np.concatenate([np.full(plan.others, plan.canaries), np.flatnonzero(inside)]).astype(np.int64)
    names = (*(f"canary {i}" for i in range(plan.canaries)), "others")
    return ImageDataset(images, labels, names, "canaries of an audit"), inside


def audit_config(config: Config, plan: CanaryPlan, records: int) -> Config:
    """The audited run's configuration, for a short run without public phases on `records` images.

    K, clipping, kind of noise and target ε stay.  Every image shows its class and weights hardly move, which helps the
    attack, and on which the guarantee does not depend.
    """
    p, network = config.privacy, {"label_dropout": 0.0, **(LOOKUP_LEVELS if plan.lookup else {})}
    # The bound of the one-run audit loses 2mδ: a smaller δ than the run's keeps that small beside 1 - confidence.
    delta = min(p.delta or 1.0, _DELTA / records)
    private: dict[str, float] = {
        "steps": plan.steps,
        "batch": plan.batch,
        "warmup": 0,
        "checkpoint_every": CHECKPOINT_EVERY,
        # Where weights stay as they are, so does what tells canaries apart.
        "learning_rate": 1e-12 if plan.lookup else 1e-9,
    }
    if plan.lookup:
        private["physical_batch"] = 256
    return config.model_copy(
        update={
            "data": DataConfig(records=records),
            "privacy": PrivacyConfig(epsilon=p.epsilon, delta=delta, clipping_norm=p.clipping_norm),
            "stages": StagesConfig(variant="dpdm"),
            "network": config.network.model_copy(update=network),
            "private": config.private.model_copy(update=private),
            # Nothing is drawn, and guidance would need labels to be dropped.
            "sampling": config.sampling.model_copy(update={"guidance": 1.0}),
        }
    )


def train_canaries(
    config: Config, plan: CanaryPlan, folder: Path, *, confidence: float, device: str = "cpu"
) -> tuple[list[Finding], OneRun | None]:
    """Train on canaries in a new folder, crash and resume if asked to: what its steps and its ledger show, and the
    attack on it.

    The configuration is that of the audited run, whose ε must be finite; `confidence` is that of the lower bound on ε.
    """
    (dataset, inside), scores = draw_canaries(plan), dict[int, NDArray[np.float64]]()
    # The public number of records is that of all that could be in.
    small = audit_config(config, plan, plan.canaries + plan.others)

    def observe(record: StepRecord, engine: PerExampleGradients) -> None:
        transcript.add(record)
        if plan.score:  # a step that is repeated after a crash counts once
            scores[record.step] = lookup_scores(record, plan.canaries)

    hooks = Hooks(observer=observe, make_denoiser=lookup_denoiser if plan.lookup else lively_denoiser)
    training = Training.start(small, dataset, folder, device, hooks=hooks)
    m, delta = training.plan.mechanism, training.plan.delta
    ledger_path = training.run.ledger_path
    noise_scale, expected = m.noise_multiplier * m.clipping_norm, m.sampling_rate * m.records
    transcript = Transcript(len(dataset), noise_scale, expected, lambda: charged_steps(Ledger(ledger_path)))
    if plan.score:
        # The number of guesses is fixed before anything of the run is seen.
        guesses = plan_guesses(plan.canaries, delta, confidence, m.sampling_rate, m.noise_multiplier, plan.steps)
    _take_steps(training, plan.crash_after)
    if plan.crash_after is not None:
        del training  # and with it whatever was not in a checkpoint
        _take_steps(Training.resume(Run(folder), dataset, device, hooks=hooks))
    ledger = Ledger(ledger_path)
    # Were several mechanisms charged, the cheapest would be the one to hold the run to.
    charged = charged_mechanisms(ledger)
    rate, noise = min(c.sampling_rate for c in charged), max(c.noise_multiplier for c in charged)
    claim = Claim(rate, noise * m.clipping_norm, charged_steps(ledger), crashed=plan.crash_after is not None)
    findings = check_transcript(transcript, claim)
    if not plan.score:
        return findings, None
    found = np.sum(list(scores.values()), axis=0)
    return findings, OneRun(found, inside, guesses, delta, ledger.epsilon(), confidence)


def _take_steps(training: Training, last: int | None = None) -> None:
    """Take all steps, or stop after the `last` like a killed process."""
    with training.run.lock():
        for progress in training.steps():
            if progress.step == last:
                return


class LookupNetwork(nn.Module):
    """F = `steep` times the number of the row's class, in all pixels: a steep factor makes gradients long."""

    def __init__(self, num_classes: int, channels: int, resolution: int, steep: float) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, 1)
        nn.init.zeros_(self.table.weight)
        self.shape, self.steep = (channels, resolution, resolution), steep

    def forward(self, x: Tensor, c_noise: Tensor, classes: Tensor | None = None) -> Tensor:
        assert classes is not None
        return self.steep * self.table(classes).view(-1, 1, 1, 1).expand(-1, *self.shape)


def lookup_denoiser(
    config: Config, shape: Shape, conditional: bool, seed: int, gaussian: GaussianDenoiser | None = None
) -> NetworkDenoiser:
    """In place of :func:`dpsyngen.training.networks.make_denoiser`."""
    network = LookupNetwork(shape.num_classes, shape.channels, shape.resolution, _STEEP * config.privacy.clipping_norm)
    return NetworkDenoiser(network, shape.num_classes, config.network.sigma_data)


def lively_denoiser(
    config: Config, shape: Shape, conditional: bool, seed: int, gaussian: GaussianDenoiser | None = None
) -> NetworkDenoiser:
    """In place of :func:`dpsyngen.training.networks.make_denoiser`; a pure function of its arguments, like that."""
    denoiser = make_denoiser(config, shape, conditional, seed, gaussian)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(_PERTURBATION * torch.randn(p.shape, generator=generator))
    return denoiser
