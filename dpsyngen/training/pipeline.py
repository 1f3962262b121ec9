"""The whole training run: plan it, refuse it while nothing is spent, run its phases, write the release.

The phases of a run follow from its stage map alone: pre-training if the map asks for it, a public phase for each
public expert, then the private phase.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import PreconditionedDenoiser
from dpsyngen.diffusion.ema import Ema
from dpsyngen.diffusion.loss import denoising_loss, make_noisy
from dpsyngen.diffusion.noise_levels import NoiseLevels
from dpsyngen.diffusion.stages import Stage, StageMap, stage_map
from dpsyngen.diffusion.unet import UNet, check_resolution, count_parameters, named_size
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import write_atomically, write_text
from dpsyngen.privacy.accounting import calibrate_noise, default_delta
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.physical_batch import find_physical_batch
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import TIERS, Program, make_program
from dpsyngen.training.checkpoint import Checkpoints, TrainState
from dpsyngen.training.engine_settings import EngineSettings
from dpsyngen.training.private import DpSgd, PrivateStep, charged_steps, train_private
from dpsyngen.training.public import Progress, PublicStep, public_randomness, train_public
from dpsyngen.training.release import write_release
from dpsyngen.training.run import JsonLines, Run
from dpsyngen.workers import Workers

PRETRAIN = "pretrain"


@dataclass(frozen=True)
class Shape:
    """What is public about the images (METHOD.md: stated assumptions).

    Attributes:
        resolution: pixels.
        channels: 1 or 3.
        class_names: () for an unconditional generator.
        records: declared number of records.
    """

    resolution: int
    channels: int
    class_names: tuple[str, ...]
    records: int

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class Plan:
    """All that is fixed before any private image is used for training.

    Attributes:
        shape: the public facts.
        stages: who trains what.
        delta: δ.
        mechanism: noise, rate, steps.
    """

    shape: Shape
    stages: StageMap
    delta: float
    mechanism: DpSgd


def stages_of(config: Config) -> StageMap:
    """The stage map that a configuration asks for."""
    s = config.stages
    return stage_map(
        s.variant,
        tau_cleaning=s.tau_cleaning,
        tau_coarse=s.tau_coarse,
        networks=s.networks,
        pretrain=s.pretrain,
    )


def make_plan(config: Config, shape: Shape) -> Plan:
    """Check everything that can be checked and calibrate the noise.

    Raises:
        ConfigError: the settings do not fit the data or each other.
    """
    n, batch = shape.records, config.private.batch
    delta = default_delta(n) if config.privacy.delta is None else config.privacy.delta
    if delta >= 1 / n:
        raise ConfigError(
            f"delta is {delta:.3g}, but must be below 1/records = {1 / n:.3g}: a larger δ would allow publishing some "
            f"images outright.  Leave --delta out for {default_delta(n):.0e}."
        )
    if batch > n:
        raise ConfigError(
            f"the batch is {batch}, but there are only {n:,} records.  Choose --batch below that (a quarter of the "
            "records is plenty)."
        )
    check_resolution(named_size(config.network.size), shape.resolution)
    if shape.num_classes == 1:
        raise ConfigError(
            f"there is only one class ({shape.class_names[0]!r}), which leaves nothing to condition on.  Use "
            "--unconditional, or give images of two classes or more."
        )
    stages = stages_of(config)
    if math.isinf(config.privacy.epsilon):
        noise = 0.0
    else:
        try:
            noise = calibrate_noise(config.privacy.epsilon, delta, sampling_rate=batch / n, steps=config.private.steps)
        except ValueError as error:
            raise ConfigError(
                f"no noise level gives ε = {config.privacy.epsilon} at δ = {delta:.3g} with {config.private.steps} "
                f"steps of batch {batch} on {n:,} records ({error})  Use fewer steps or a larger ε."
            ) from None
    mechanism = DpSgd(n, noise, config.privacy.clipping_norm, config.private)
    return Plan(shape, stages, delta, mechanism)


def shape_of(dataset: ImageDataset, config: Config) -> Shape:
    """The public facts about a data set."""
    names = dataset.class_names if config.data.labels else ()
    return Shape(dataset.resolution, dataset.channels, names, config.data.records or len(dataset))


def make_denoiser(config: Config, shape: Shape, conditional: bool, seed: int) -> PreconditionedDenoiser:
    """A freshly initialised network; its random start depends on the public `seed` only."""
    num_classes = shape.num_classes if conditional else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(config.network.size, shape.resolution, shape.channels, num_classes)
    return PreconditionedDenoiser(network, num_classes, config.network.sigma_data)


# ---------------------------------------------------------------------------------------------- the run


class Training:
    """One training run, new or resumed; iterate :meth:`steps` to the end.

    Args:
        run: the run directory.
        config: its configuration.
        dataset: the private images.
        plan: from :func:`make_plan`.
        device: where to compute.
    """

    def __init__(self, run: Run, config: Config, dataset: ImageDataset, plan: Plan, device: str = "cpu") -> None:
        self.run, self.config, self.dataset, self.plan, self.device = run, config, dataset, plan, device
        self.checkpoints = Checkpoints(run.private)
        self.private_log = JsonLines(run.private / "training.jsonl", 0o600)
        self.public_log = JsonLines(run.release / "public_training.jsonl", 0o644)
        self.stop_requested = False
        self.workers = Workers(None if device == "cpu" else 1)
        self.program = _program(config, plan.shape)
        self.randomness = _randomness_of(run, config)
        self.ledger = _ledger_of(run, config, plan, self.program)
        _pin_data(run, dataset, self.randomness, plan)

    @property
    def parameters(self) -> int:
        """Trainable parameters of the private network."""
        return count_parameters(self._denoiser(conditional=True, index=0))

    def steps(self) -> Iterator[Progress]:
        """Run what is left, yielding after each step; the release is written at the end.

        Setting ``stop_requested`` ends it after the current step with a checkpoint.
        """
        public = self.plan.stages.public
        expert_stages = [s for s in public if s.network != self.plan.stages.private.network]
        if self.plan.stages.pretrain:
            everywhere = Stage(PRETRAIN, -math.inf, math.inf, "public", PRETRAIN)
            yield from self._public(everywhere, conditional=True, index=0)
        for index, stage in enumerate(expert_stages, 1):
            if not self.stop_requested:
                yield from self._public(stage, conditional=False, index=index)
        if not self.stop_requested:
            yield from self._private()

    def _denoiser(self, conditional: bool, index: int) -> PreconditionedDenoiser:
        return make_denoiser(self.config, self.plan.shape, conditional, self.config.network.seed + index).to(
            self.device
        )

    def _levels(self, stage: Stage) -> NoiseLevels:
        n = self.config.network
        return NoiseLevels(n.noise_mean, n.noise_std, stage.low, stage.high)

    def _public_step(self, stage: Stage, index: int) -> PublicStep:
        # Each network has its own images: a thousand million are more than any phase draws.
        offset = index * 10**9
        return PublicStep(
            self.program,
            self._levels(stage),
            self.config.public,
            public_randomness(self.config),
            offset,
            self.workers,
        )

    def _fitting_batch(self, denoiser: PreconditionedDenoiser) -> int:
        """Images that fit into memory at a time, found with random numbers instead of images."""
        n, copies = self.config.network, self.config.private.copies
        shape = self.plan.shape
        batch = make_noisy(
            torch.zeros(2, shape.channels, shape.resolution, shape.resolution, device=self.device),
            None,
            NoiseLevels(n.noise_mean, n.noise_std),
            copies=copies,
            num_classes=denoiser.num_classes,
            label_dropout=0.0,
            generator=torch.Generator().manual_seed(0),
        )
        engine = PerExampleGradients(denoiser, 1.0, kernels=KernelChoices(measure=False), workers=1)

        def loss(part: slice) -> Tensor:
            return denoising_loss(denoiser, batch.rows(slice(part.start * copies, part.stop * copies)))

        return find_physical_batch(engine, loss, copies=copies)

    def _public(self, stage: Stage, conditional: bool, index: int) -> Iterator[Progress]:
        """Train a network on programmatic images and release its weights; nothing to do if that was done before."""
        if self.run.weights(stage.network).exists():
            return
        denoiser = self._denoiser(conditional, index)
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=self.config.public.learning_rate)
        state = TrainState(denoiser, Ema(denoiser, self.config.public.ema), {"public": optimizer})
        progress = train_public(stage.name, state, self._public_step(stage, index))
        yield from self._checkpointed(stage.name, state, progress, self.public_log, self.config.public.checkpoint_every)
        if not self.stop_requested:
            self._save_weights(stage.network, state)

    def _private(self) -> Iterator[Progress]:
        c, plan = self.config.private, self.plan
        network = plan.stages.private.network
        denoiser = self._denoiser(conditional=True, index=0)
        if plan.stages.pretrain:
            denoiser.load_state_dict(load_file(self.run.weights(PRETRAIN)))
        optimizers: dict[str, torch.optim.Optimizer] = {
            "private": torch.optim.Adam(
                denoiser.parameters(),
                lr=c.learning_rate,
                betas=(c.beta1, c.beta2),
                weight_decay=c.weight_decay,
            )
        }
        shared = [s for s in plan.stages.public if s.network == network]
        if shared:
            optimizers["public"] = torch.optim.Adam(denoiser.parameters(), lr=self.config.public.learning_rate)
        state = TrainState(denoiser, Ema(denoiser, c.ema), optimizers)
        engine = EngineSettings.of(self.run, self.config)
        take = PrivateStep(
            self.dataset,
            self._levels(plan.stages.private),
            self.config.network.label_dropout,
            plan.mechanism,
            self.randomness,
            physical_batch=engine.physical_batch or self._fitting_batch(denoiser),
            kernels=engine.kernels,
            workers=self.workers,
        )
        engine.physical_batch = take.physical_batch
        public = [self._public_step(stage, index) for index, stage in enumerate(shared, 1)]
        name = plan.stages.private.name
        progress = engine.saved_after_each(train_private(name, state, take, self.ledger, public))
        yield from self._checkpointed(name, state, progress, self.private_log, c.checkpoint_every)
        if self.stop_requested and state.step < c.steps:
            return
        if charged_steps(self.ledger) != state.step:
            raise AssertionError(f"{state.step} steps taken, {charged_steps(self.ledger)} in the ledger")
        self._save_weights(network, state)
        write_release(self.run, self.config, plan, self.ledger, self.randomness, self.program)
        self.checkpoints.clear()

    def _checkpointed(
        self, phase: str, state: TrainState, progress: Iterator[Progress], log: JsonLines, every: int
    ) -> Iterator[Progress]:
        """Pass `progress` on, with a checkpoint every so many steps and when asked to stop."""
        # `progress` has not started, so it goes on from what is restored here.
        self.checkpoints.load(phase, state)
        log.cut(phase, state.step + 1)
        for report in progress:
            log.append(phase=report.phase, step=report.step, **report.values)
            yield report
            if report.step % every == 0 or self.stop_requested:
                self.checkpoints.save(phase, state)
            if self.stop_requested:
                return

    def _save_weights(self, network: str, state: TrainState) -> None:
        average = {k: v.detach().cpu().contiguous() for k, v in state.ema.average.items()}
        write_atomically(self.run.weights(network), lambda p: save_file(average, p))


def _randomness_of(run: Run, config: Config) -> Randomness:
    if run.randomness_path.exists():
        return Randomness.load(run.randomness_path)
    if run.ledger_path.exists():
        # The ledger is made after the random state, so it was lost: fresh noise for charged steps would be wrong.
        raise RunError(
            f"{run.randomness_path} is missing: without it the run cannot be continued privately.  Start a new run."
        )
    seed = config.privacy.insecure_seed
    fresh = Randomness.from_system() if seed is None else Randomness.from_insecure_seed(seed)
    fresh.save(run.randomness_path)
    return fresh


def _program(config: Config, shape: Shape) -> Program:
    """The program that draws the public images, at the size of the private ones.

    Raises:
        ConfigError: it cannot be built, or has another prior tier than the configuration says.
    """
    c = config.program
    program = make_program(c.name, resolution=shape.resolution, channels=shape.channels, seed=c.seed, **c.params)
    if c.prior_tier not in (None, program.prior_tier):
        raise ConfigError(
            f"program.prior_tier={c.prior_tier}, but {c.name} has prior tier {program.prior_tier} "
            f"({TIERS[program.prior_tier]}): correct it, or leave it out."
        )
    return program


def _with_whole_program(config: Config, program: Program) -> Config:
    """The configuration with every parameter of the program, so that it draws the same wherever the run goes on.

    A default may depend on what is there, such as the fonts of a system.
    """
    params = {k: v for k, v in program.config().items() if k not in ("name", "resolution", "channels", "seed")}
    section = config.program.model_copy(update={"params": params, "prior_tier": program.prior_tier})
    return config.model_copy(update={"program": section})


def _ledger_of(run: Run, config: Config, plan: Plan, program: Program) -> Ledger:
    if run.ledger_path.exists():
        ledger = Ledger(run.ledger_path)
    else:
        ledger = Ledger.create(
            run.ledger_path,
            target_epsilon=config.privacy.epsilon,
            delta=plan.delta,
            records=plan.shape.records,
        )
    used = plan.stages.public or plan.stages.pretrain
    if used and not ledger.entries:
        ledger.note_public_choice(
            "public images are drawn by this program; ε holds if it was chosen without looking at private images",
            program=program.config(),
            prior_tier=program.prior_tier,
            prior_tier_meaning=TIERS[program.prior_tier],
        )
    return ledger


def _pin_data(run: Run, dataset: ImageDataset, randomness: Randomness, plan: Plan) -> None:
    """Remember which images the run is of; refuse to resume with others, which would repeat noise on new data."""
    fingerprint = randomness.tag(dataset.fingerprint())
    if run.data_path.exists():
        before = json.loads(run.data_path.read_text())["fingerprint"]
        if not hmac.compare_digest(before, fingerprint):
            raise RunError(
                f"the images are not those that {run.path} was started with.  Continuing would add the same noise to "
                "different data, which can reveal both.  Give the same --data, or start a new run."
            )
        return
    about: dict[str, Any] = {
        "fingerprint": fingerprint,
        "records": len(dataset),
        "source": dataset.source,
        "skipped": list(dataset.skipped),
        "noise_multiplier": plan.mechanism.noise_multiplier,
    }
    write_text(run.data_path, json.dumps(about, indent=1) + "\n", 0o600)


def start(config: Config, dataset: ImageDataset, out: Path, device: str = "cpu") -> Training:
    """Plan a new run and make its directory.

    Raises:
        ConfigError, RunError: before anything is written or spent.
    """
    shape = shape_of(dataset, config)
    plan = make_plan(config, shape)
    # A program that cannot draw such images must say so before the directory is made.
    config = _with_whole_program(config, _program(config, shape))
    return Training(Run.create(out, config), config, dataset, plan, device)


def resume(run: Run, dataset: ImageDataset, device: str = "cpu") -> Training:
    """Go on with an interrupted run."""
    if run.complete:
        raise RunError(f"{run.path} is finished already; there is nothing to resume.")
    config = run.config
    plan = make_plan(config, shape_of(dataset, config))
    if run.data_path.exists():
        # Calibrating again could differ in the last digits with another version of the accountant.
        noise = float(json.loads(run.data_path.read_text())["noise_multiplier"])
        m = plan.mechanism
        plan = Plan(plan.shape, plan.stages, plan.delta, DpSgd(m.records, noise, m.clipping_norm, m.config))
    return Training(run, config, dataset, plan, device)


@contextlib.contextmanager
def stop_on_signals(training: Training, tell: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C (and SIGTERM) end the run after the current step, with a checkpoint; a second Ctrl-C ends it at once."""
    import signal

    def handler(number: int, frame: object) -> None:
        if training.stop_requested:
            raise KeyboardInterrupt
        training.stop_requested = True
        tell("stopping after this step (Ctrl-C again to stop at once) …")

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
