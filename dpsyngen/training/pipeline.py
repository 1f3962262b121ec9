"""The whole training run: plan it, refuse it while nothing is spent, run its phases, write the release.

The phases of a run follow from its stage map alone: pre-training if the map asks for it, a public phase for each
public expert, then the private phase.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
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
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.physical_batch import find_physical_batch
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import TIERS, Program, make_program
from dpsyngen.training.checkpoint import Checkpoints, TrainState, remove_checkpoints
from dpsyngen.training.engine_settings import EngineSettings
from dpsyngen.training.finite import FiniteGuard, require_not_stopped
from dpsyngen.training.private import DpSgd, Observer, PrivateStep, charged_steps, train_private
from dpsyngen.training.public import Progress, PublicStep, public_randomness, train_public
from dpsyngen.training.release import write_release
from dpsyngen.training.run import JsonLines, Run
from dpsyngen.training.tensor_file import save_file
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
            noise = calibrate_noise(
                config.privacy.epsilon,
                delta,
                sampling_rate=batch / n,
                steps=config.private.steps,
                group_size=config.privacy.group_size,
            )
        except ValueError as error:
            raise ConfigError(
                f"no noise level gives ε = {config.privacy.epsilon} at δ = {delta:.3g} with {config.private.steps} "
                f"steps of batch {batch} on {n:,} records ({error})  Use fewer steps or a larger ε."
            ) from None
    mechanism = DpSgd(n, noise, config.privacy.clipping_norm, config.private)
    return Plan(shape, stages, delta, mechanism)


def _budget_of(config: Config) -> Budget | None:
    path = config.privacy.budget
    return None if path is None else Budget(Path(path))


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
        # Before anything is read that another process could be changing.
        run.open_for_writing()
        self.private_log = JsonLines(run.private / "training.jsonl", 0o600)
        self.public_log = JsonLines(run.release / "public_training.jsonl", 0o644)
        self.stop_requested = False
        # Audits look on, and train another network.
        self.observer: Observer | None = None
        self.make_denoiser = make_denoiser
        self.workers = Workers(None if device == "cpu" else 1)
        self.program = _program(config, plan.shape)
        self.randomness = _randomness_of(run, config)
        self.ledger = _ledger_of(run, config, plan, self.program, self.randomness)
        _pin_data(run, config, dataset, self.randomness, self.ledger, plan)
        self.checkpoints = Checkpoints(run.private, self.ledger)
        self.budget = _budget_of(config)
        if self.budget is not None:
            self.budget.reserve(
                self.ledger.run, run.path.name, plan.mechanism.mechanism(config.private.steps), dataset.fingerprint()
            )
        left = config.private.steps - charged_steps(self.ledger)
        if left > 0:
            self.ledger.require(plan.mechanism.mechanism(left))

    @property
    def parameters(self) -> int:
        """Trainable parameters of the private network."""
        return count_parameters(self._denoiser(conditional=True, index=0))

    def steps(self) -> Iterator[Progress]:
        """Run what is left, yielding after each step; the release is written at the end.

        Setting ``stop_requested`` ends it after the current step with a checkpoint.  The run directory is locked until
        the end of the iteration, whichever way it ends.

        Raises:
            RunError: another process works on the run, or its files do not fit together.
        """
        with self.run.lock():
            require_not_stopped(self.run.private)
            yield from self._phases()

    def _phases(self) -> Iterator[Progress]:
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
        return self.make_denoiser(self.config, self.plan.shape, conditional, self.config.network.seed + index).to(
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
            _load_weights(self.run.weights(PRETRAIN), denoiser)
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
            observer=self.observer,
        )
        engine.physical_batch = take.physical_batch
        # What was measured must be known before noise is used: a step that is repeated has to sum in the same order.
        take.before_release = engine.save
        public = [self._public_step(stage, index) for index, stage in enumerate(shared, 1)]
        name = plan.stages.private.name
        progress = train_private(name, state, take, self.ledger, public)
        yield from self._checkpointed(name, state, progress, self.private_log, c.checkpoint_every)
        if self.stop_requested and state.step < c.steps:
            return
        if charged_steps(self.ledger) != state.step:
            raise AssertionError(f"{state.step} steps taken, {charged_steps(self.ledger)} in the ledger")
        self._save_weights(network, state)
        write_release(self.run, self.config, plan, self.ledger, self.randomness, self.program, self.budget)
        self.checkpoints.clear()

    def _checkpointed(
        self, phase: str, state: TrainState, progress: Iterator[Progress], log: JsonLines, every: int
    ) -> Iterator[Progress]:
        """Pass `progress` on, with a checkpoint every so many steps and when asked to stop."""
        # `progress` has not started, so it goes on from what is restored here.
        private = phase == self.plan.stages.private.name
        steps, charged = (
            (self.config.private.steps, charged_steps(self.ledger)) if private else (self.config.public.steps, None)
        )
        self.checkpoints.load(phase, state, steps, charged)
        log.cut(phase, state.step + 1)
        guard = self._guard(phase, private)
        for report in progress:
            log.append(phase=report.phase, step=report.step, **report.values)
            # Before a checkpoint is written: the last one stays finite.
            saves = report.step % every == 0 or self.stop_requested
            guard.check(state, report.step, last=saves or report.step == steps)
            yield report
            if report.step % every == 0 or self.stop_requested:
                log.sync()
                self.checkpoints.save(phase, state)
            if self.stop_requested:
                return

    def _guard(self, phase: str, private: bool) -> FiniteGuard:
        rate, option = (
            (self.config.private.learning_rate, "--lr")
            if private
            else (self.config.public.learning_rate, "--set public.learning_rate=…")
        )
        shape = (self.plan.shape.channels, self.plan.shape.resolution, self.plan.shape.resolution)
        return FiniteGuard(self.run.private, phase, rate, option, shape)

    def _save_weights(self, network: str, state: TrainState) -> None:
        average = {k: v.detach().cpu().contiguous() for k, v in state.ema.average.items()}
        write_atomically(self.run.weights(network), lambda p: save_file(average, p))


def _load_weights(path: Path, denoiser: PreconditionedDenoiser) -> None:
    try:
        denoiser.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise RunError(
            f"{path} is damaged: {str(error).splitlines()[0]}.  Remove it and resume: it is trained again, to the same "
            "weights."
        ) from None


def _randomness_of(run: Run, config: Config) -> Randomness:
    """The key of the run; a new one only where nothing can have used the old one."""
    # All of these are made after the key.
    later = (run.ledger_path, run.ledger_path.with_name(run.ledger_path.name + ".head"), run.data_path)
    begun = any(p.exists() for p in (*later, run.engine_path))
    if run.randomness_path.exists():
        try:
            return Randomness.load(run.randomness_path)
        except RunError:
            if begun:
                raise
        run.randomness_path.unlink()
    elif begun:
        # Fresh noise for charged steps would be wrong.
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


def _ledger_of(run: Run, config: Config, plan: Plan, program: Program, randomness: Randomness) -> Ledger:
    name = randomness.tag("name of the run")[:32]
    if run.ledger_path.exists():
        ledger = Ledger(run.ledger_path)
        ledger.catch_up()
        if ledger.run != name:
            raise RunError(
                f"{run.randomness_path} is not the random state with which {run.ledger_path} was begun: steps that are "
                "charged would get other noise.  Put back the files of this run, or start a new one."
            )
    elif run.data_path.exists() or run.engine_path.exists():
        # Both are made after the ledger.
        raise RunError(
            f"{run.ledger_path} is missing, though the run had begun: what it charged is no longer known.  Put it back "
            "from a backup, or start a new run."
        )
    else:
        ledger = Ledger.create(
            run.ledger_path,
            target_epsilon=config.privacy.epsilon,
            delta=plan.delta,
            records=plan.shape.records,
            group_size=config.privacy.group_size,
            run=name,
            secure=randomness.secure,
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


def _pin_data(
    run: Run, config: Config, dataset: ImageDataset, randomness: Randomness, ledger: Ledger, plan: Plan
) -> None:
    """Remember which images and settings the run is of; refuse to resume with others, which would repeat noise on new
    data.
    """
    fingerprint, settings = randomness.tag(dataset.fingerprint()), _fixed_settings(config)
    pinned = _pinned(run)
    if pinned is not None:
        if not hmac.compare_digest(pinned["fingerprint"], fingerprint):
            raise RunError(
                f"the images are not those that {run.path} was started with.  Continuing would add the same noise to "
                "different data, which can reveal both.  Give the same --data, or start a new run."
            )
        before = pinned["settings"]
        changed = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
        if changed:
            raise RunError(
                f"{run.private / 'config.yaml'} was changed since the run was started ({', '.join(changed[:5])}).  "
                "Continuing would add the same noise to different sums, which can reveal both.  Undo the change, or "
                "start a new run."
            )
        return
    if ledger.mechanisms or ledger.non_private:
        raise RunError(
            f"{run.data_path} is missing, though private steps were charged: nothing says any more that the images are "
            "the same.  Put it back from a backup, or start a new run."
        )
    about: dict[str, Any] = {
        "fingerprint": fingerprint,
        "records": len(dataset),
        "source": dataset.source,
        "skipped": list(dataset.skipped),
        "noise_multiplier": plan.mechanism.noise_multiplier,
        "settings": settings,
    }
    write_text(run.data_path, json.dumps(about, indent=1) + "\n", 0o600)


def _pinned(run: Run) -> dict[str, Any] | None:
    """What :func:`_pin_data` wrote; None if it did not come to that yet."""
    if not run.data_path.exists():
        return None
    try:
        about = json.loads(run.data_path.read_text(encoding="utf-8"))
        return {
            "fingerprint": str(about["fingerprint"]),
            "noise_multiplier": float(about["noise_multiplier"]),
            "settings": dict(about["settings"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{run.data_path}, which says what images the run is of, cannot be read: {error!r}.  Put it back from a "
            "backup, or start a new run."
        ) from None


# What may change between two sessions of a run: it decides neither what a step is nor what is made of the steps.
_FREE = {
    "data": {"source"},
    "privacy": {"budget"},
    "private": {"physical_batch", "checkpoint_every"},
    "public": {"checkpoint_every"},
}


def _fixed_settings(config: Config) -> dict[str, Any]:
    """All settings that a resumed run must share with its beginning, by their full names, as JSON has them."""
    sections = config.model_dump(mode="json", exclude={"sampling"})
    out: dict[str, Any] = {}
    for section, values in sections.items():
        if not isinstance(values, dict):
            out[section] = values
            continue
        out |= {f"{section}.{k}": v for k, v in values.items() if k not in _FREE.get(section, ())}
    return dict(json.loads(json.dumps(out)))


def start(config: Config, dataset: ImageDataset, out: Path, device: str = "cpu") -> Training:
    """Plan a new run and make its directory.

    Raises:
        ConfigError, RunError: before anything is written or spent.
    """
    shape = shape_of(dataset, config)
    plan = make_plan(config, shape)
    # A program that cannot draw such images must say so before the directory is made.
    config = _with_whole_program(config, _program(config, shape))
    if config.privacy.budget is not None:
        config = config.model_copy(
            update={"privacy": config.privacy.model_copy(update={"budget": str(Path(config.privacy.budget).resolve())})}
        )
    budget = _budget_of(config)
    if budget is not None:
        # Training reserves it again under the file's lock; here it is refused while there is no run directory yet.
        budget.require_data(dataset.fingerprint())
        budget.require(plan.mechanism.mechanism(config.private.steps))
    return Training(Run.create(out, config), config, dataset, plan, device)


def resume(run: Run, dataset: ImageDataset, device: str = "cpu") -> Training:
    """Go on with an interrupted run."""
    require_unfinished(run)
    run.open_for_writing()
    config = run.config
    plan = make_plan(config, shape_of(dataset, config))
    pinned = _pinned(run)
    if pinned is not None:
        # Calibrating again could differ in the last digits with another version of the accountant.
        m = plan.mechanism
        mechanism = DpSgd(m.records, pinned["noise_multiplier"], m.clipping_norm, m.config)
        plan = Plan(plan.shape, plan.stages, plan.delta, mechanism)
    return Training(run, config, dataset, plan, device)


def require_unfinished(run: Run) -> None:
    """Raise RunError if the run is finished."""
    if run.complete:
        # Its last act, which a crash may have cut off.
        with contextlib.suppress(RunError, OSError), run.lock():
            remove_checkpoints(run.private)
        raise RunError(f"{run.path} is finished already; there is nothing to resume.")


@contextlib.contextmanager
def stop_on_signals(training: Training, tell: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the run after the current step, with a checkpoint; a second one ends it
    at once.
    """
    import signal

    def handler(number: int, frame: object) -> None:
        if training.stop_requested:
            raise KeyboardInterrupt
        training.stop_requested = True
        try:
            tell("stopping after this step (Ctrl-C again to stop at once) …")
        except OSError:
            # The terminal is gone, and with it every place to write to: what is said from now on must not end the step.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for output in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(nowhere, output.fileno())
            os.close(nowhere)

    chosen = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        chosen.append(signal.SIGHUP)
    before = {s: signal.signal(s, handler) for s in chosen}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
