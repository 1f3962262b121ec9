"""The phases of a run, one after the other: pre-training, public experts, DP moments, DP-SGD, release.

They follow from its stage map alone: pre-training if the map asks for it, a public phase for each public expert, DP
moments if some stage is answered by them, then the private phase.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import Ema, NetworkDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.stages import GAUSSIAN, Stage
from dpsyngen.diffusion.unet import count_parameters, shapes_alone
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.errors import RunError
from dpsyngen.files import write_atomically
from dpsyngen.hardware import Compute, choose
from dpsyngen.privacy.budget import Budget
from dpsyngen.programs import TIERS
from dpsyngen.programs.grid import image_grid
from dpsyngen.programs.registry import program_class
from dpsyngen.training.checkpoint import Checkpoints, TrainState, remove_checkpoints, save_file
from dpsyngen.training.follower import PRIVATE, PUBLIC, SET_UP
from dpsyngen.training.health import require_finite, require_not_stopped
from dpsyngen.training.log import (
    PREVIEW,
    JsonLines,
    Note,
    OnEvent,
    Step,
    StepLog,
    TensorBoard,
    Warned,
    ignore,
    require_tensorboard,
    timed,
)
from dpsyngen.training.moments import MOMENTS, Stopped, charge_moments, charged_moments, estimate_moments, load_gaussian
from dpsyngen.training.networks import fitting_batch, load_weights, make_denoiser, make_network, preview, prior_of
from dpsyngen.training.plan import MomentsPlan, Plan, describe, make_plan, program_of, shape_of, stages_of
from dpsyngen.training.private import Computing, Observer, PrivateStep, charged_steps, train_private
from dpsyngen.training.public import (
    PRETRAIN,
    PUBLIC_INDEX,
    PublicStep,
    levels_of,
    pretraining,
    public_step,
    train_public,
)
from dpsyngen.training.run import Run
from dpsyngen.training.session import EngineSettings, Session, fixed_settings, planned, with_group_size
from dpsyngen.workers import Workers


@dataclass(frozen=True)
class Hooks:
    """What the caller of a training adds to it."""

    on_event: OnEvent = ignore  # told what happens; see :data:`dpsyngen.training.log.Event`
    finish: Callable[[Training], None] | None = None  # called when all is trained: writes the release
    observer: Observer | None = None  # looks on as private steps are taken, for audits
    make_denoiser: Callable[..., NetworkDenoiser] = make_denoiser  # audits train other networks


class Training:
    """One training run, new (:meth:`start`) or continued (:meth:`resume`); iterate :meth:`steps` to the end.

    Attributes:
        run, config, dataset, plan, ranks: as given; the process is the main one of `ranks`.
        stop_requested: set it to end the training after the current step, with a checkpoint.
        randomness, ledger, budget: the key, what was charged, and the budget that all runs on these images share.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        dataset: ImageDataset,
        plan: Plan,
        device: str = "cpu",
        ranks: Ranks = ALONE,
        hooks: Hooks = Hooks(),
    ) -> None:
        self.run, self.config, self.dataset, self.plan = run, config, dataset, plan
        self.ranks, self.hooks = ranks, hooks
        self.compute = choose(device, config.compute)
        self.device = device = self.compute.device
        # Before anything is read that another process could be changing.
        run.open_for_writing()
        self.private_log = JsonLines(run.private / "training.jsonl", 0o600)
        self.public_log = JsonLines(run.release / "public_training.jsonl", 0o644)
        self.stop_requested = False
        self.workers = Workers(None if device == "cpu" else 1)
        self.program = program_of(config, plan.shape)
        # The order of what follows is that of a crash-safe session: key, ledger, data, reservation; charges come later.
        p = config.privacy
        session = Session(run.private, p, plan.delta, plan.shape.records, later=[run.engine_path])
        self.randomness, self.ledger = session.randomness, session.ledger
        prior = prior_of(config, plan.stages, plan.shape.channels)
        noted = next((e.details["prior"] for e in self.ledger.entries if "prior" in e.details), None)
        if prior is not None and noted not in (None, prior.about):
            raise RunError(
                f"the prior {config.network.prior!r} is another one than when the run was started (its SHA-256 is "
                f"{prior.about['sha256']}, not {noted['sha256']}).  Put the old file back, or start a new run."
            )
        if prior is not None and not self.ledger.entries:
            self.ledger.note_public_choice(
                "a prior is used, weights that images drawn by programs trained, and nothing else",
                prior=prior.about,
            )
        if (plan.stages.public or plan.stages.pretrain) and len(self.ledger.entries) <= (prior is not None):
            self.ledger.note_public_choice(
                "public images are drawn by this program; ε holds if it was chosen without looking at private images",
                program=self.program.config(),
                prior_tier=self.program.prior_tier,
                prior_tier_meaning=TIERS[self.program.prior_tier],
            )
        whole, self.dataset = dataset.fingerprint(), session.images(config, dataset)
        dataset = self.dataset
        moments = plan.moments
        known = session.pin(
            dataset.fingerprint(),
            fixed_settings(config),
            records=len(dataset),
            parameters=self.parameters,
            source=dataset.source,
            skipped=list(dataset.skipped),
            noise_multiplier=plan.mechanism.noise_multiplier,
            moments=None if moments is None else [moments.mean, moments.pooled, moments.by_class],
        )
        # Calibrating again could differ in the last digits with another version of the accountant.
        mechanism = replace(plan.mechanism, noise_multiplier=known["noise_multiplier"])
        if moments is not None and known["moments"] is not None:
            moments = MomentsPlan(*known["moments"])
        self.plan = plan = replace(plan, mechanism=mechanism, moments=moments)
        self.checkpoints = Checkpoints(run.private, self.ledger)
        self.budget = None if p.budget is None else Budget(Path(p.budget))
        if self.budget is not None:
            self.budget.reserve(self.ledger.run, run.path.name, plan.mechanisms, whole, p.most_per_person)
        left = plan.steps - charged_steps(self.ledger)
        wanted = () if plan.moments is None else plan.moments.mechanisms()[len(charged_moments(self.ledger)) :]
        if left > 0:
            wanted += (plan.mechanism.mechanism(left),)
        if wanted:
            self.ledger.require(*wanted)

    @classmethod
    def start(
        cls,
        config: Config,
        dataset: ImageDataset,
        out: Path,
        device: str = "cpu",
        ranks: Ranks = ALONE,
        hooks: Hooks = Hooks(),
    ) -> Training:
        """Plan a new run and make its directory `out`; errors come before anything is written or spent."""
        if config.logging.tensorboard:
            require_tensorboard()
        config, plan = planned(config, dataset)
        return cls(Run.create(out, config), config, dataset, plan, device, ranks, hooks)

    @classmethod
    def resume(
        cls,
        run: Run,
        dataset: ImageDataset,
        device: str = "cpu",
        ranks: Ranks = ALONE,
        hooks: Hooks = Hooks(),
        tensorboard: bool | None = None,
    ) -> Training:
        """Go on with an interrupted run, on the images of its start; `tensorboard` replaces what its settings say.

        RunError if it is finished, another process works on it, or something does not fit.
        """
        require_unfinished(run)
        run.open_for_writing()
        config = run.config
        if tensorboard is not None:
            logging = config.logging.model_copy(update={"tensorboard": tensorboard})
            config = config.model_copy(update={"logging": logging})
        if config.logging.tensorboard:
            require_tensorboard()
        with_group_size(config, dataset)
        return cls(run, config, dataset, make_plan(config, shape_of(dataset, config)), device, ranks, hooks)

    @property
    def parameters(self) -> int:
        """Trainable parameters of the private network; 0 if there is none."""
        if self.plan.stages.gaussian:
            return 0
        with shapes_alone():
            return count_parameters(make_network(self.config, self.plan.shape, residual=self.plan.stages.moments))

    def describe(self) -> Iterator[str]:
        """What is about to be done, in lines that hold nothing private."""
        yield f"run directory: {self.run.path}"
        yield from describe(self.plan, self.config, self.parameters)
        if not self.ranks.alone or self.compute.kind != "cpu":
            where = f"{self.ranks.count} processes, each on" if self.ranks.count > 1 else "computing on"
            dp = self.compute.for_dp_steps().precision
            yield f"{where} {self.compute.kind}: DP-SGD in {dp}, all else in {self.compute.precision}"

    def steps(self) -> Iterator[Step]:
        """Train what is left, yielding each step after telling ``hooks.on_event``; the release is written at the end.

        The run directory is locked until the end of the iteration, whichever way it ends.  RunError if it is locked or
        its files do not fit together.
        """
        with self.run.lock():
            require_not_stopped(self.run.private)
            self.ranks.tell(SET_UP, config=self.config, plan=self.plan, randomness=self.randomness)
            with contextlib.closing(self._phases()) as steps:  # type: ignore[type-var]
                for step in steps:
                    self.hooks.on_event(step)
                    yield step

    def _phases(self) -> Iterator[Step]:
        stages = self.plan.stages
        public = [(s, False) for s in stages.public if s.network != stages.private.network]
        if stages.pretrain:
            public.insert(0, (pretraining(stages), True))
        for stage, conditional in public:
            if not self.stop_requested:
                yield from self._public(stage, conditional)
        if stages.moments and not self.stop_requested:
            yield from self._moments()
        if self.stop_requested:
            return
        for stage in (s for s in stages.stages if s.trainer == "prior"):
            prior = prior_of(self.config, stages, self.plan.shape.channels)
            assert prior is not None
            self._save_weights(stage.network, {f"network.{name}": w for name, w in prior.weights.items()})
        if stages.gaussian:
            self._gaussian()  # which refuses damaged moments
            self._release()
        else:
            yield from self._private()

    # ------------------------------------------------------------------------------------------ public phases

    def _public(self, stage: Stage, conditional: bool) -> Iterator[Step]:
        """Train a network on programmatic images and release its weights; nothing to do if that was done before."""
        if self.run.weights(stage.network).exists():
            return
        denoiser = self._denoiser(conditional, PUBLIC_INDEX[stage.name])
        self.compute.prepare(denoiser)
        self.compute.compiled(denoiser.network, trains=True)
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=self.config.public.learning_rate)
        state = TrainState(denoiser, Ema(denoiser, self.config.public.ema), {"public": optimizer})
        self.ranks.tell(PUBLIC, stage=stage, conditional=conditional)
        progress = train_public(stage.name, state, self._public_step(stage, self.compute))
        yield from self._checkpointed(stage.name, state, progress)
        if not self.stop_requested:
            self._save_weights(stage.network, state.ema.average)

    def _public_step(self, stage: Stage, compute: Compute) -> PublicStep:
        return public_step(self.config, self.program, stage, self.workers, self.ranks, compute)

    def _denoiser(self, conditional: bool, index: int, gaussian: GaussianDenoiser | None = None) -> NetworkDenoiser:
        seed = self.config.network.seed + index
        return self.hooks.make_denoiser(self.config, self.plan.shape, conditional, seed, gaussian).to(self.device)

    # ----------------------------------------------------------------------------------------- private phases

    def _moments(self) -> Iterator[Step]:
        """Release moments of the private images; nothing to do if that was done before."""
        path, plan = self.run.weights(GAUSSIAN), self.plan.moments
        assert plan is not None
        charge_moments(self.ledger, plan, self.plan.shape)
        if path.exists():
            return
        queries = len(plan.mechanisms())
        self.hooks.on_event(Note(f"{MOMENTS}: reading the private images, {queries} times"))
        shape, rank = self.plan.shape, self.config.moments.rank
        query = partial(estimate_moments, self.dataset, shape.num_classes, shape.records, plan, self.randomness)
        with self.ranks.lead(MOMENTS):
            try:
                moments = query(rank=rank, stopped=lambda: self.stop_requested, ranks=self.ranks)
            except Stopped:
                return
        self._save_weights(GAUSSIAN, moments.to_tensors())
        yield Step(MOMENTS, queries, queries, {}, private=True)

    def _gaussian(self) -> GaussianDenoiser | None:
        """The denoiser of the DP moments, if there are any."""
        if not self.plan.stages.moments:
            return None
        return load_gaussian(self.run.weights(GAUSSIAN), self.plan.shape).to(self.device)

    def _private(self) -> Iterator[Step]:
        c, stages = self.config.private, self.plan.stages
        network, name, gaussian = stages.private.network, stages.private.name, self._gaussian()
        denoiser = self._denoiser(conditional=True, index=0, gaussian=gaussian)
        engine = EngineSettings.of(self.run.engine_path, self.config, self.compute)
        engine.compute.prepare(denoiser)
        if stages.pretrain:
            load_weights(self.run.weights(PRETRAIN), denoiser)
        optimizers: dict[str, torch.optim.Optimizer] = {
            "private": torch.optim.Adam(
                denoiser.parameters(), lr=c.learning_rate, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay
            )
        }
        shared = [s for s in stages.public if s.network == network]
        if shared:
            optimizers["public"] = torch.optim.Adam(denoiser.parameters(), lr=self.config.public.learning_rate)
        state = TrainState(denoiser, Ema(denoiser, c.ema), optimizers)
        fits = engine.physical_batch or fitting_batch(denoiser, self.config, self.plan.shape, engine.compute)
        engine.physical_batch = fits
        moments = None if gaussian is None else gaussian.gaussians
        self.ranks.tell(PRIVATE, physical_batch=fits, shared=shared, moments=moments, pins=engine.compute.pins())
        # What was measured must be on the disk before noise is used: a repeated step has to sum in the same order.
        how = Computing(
            fits, engine.kernels, self.workers, self.ranks, engine.compute, self.hooks.observer, engine.save
        )
        levels, dropout = levels_of(self.config.network, stages.private), self.config.network.label_dropout
        take = PrivateStep(self.dataset, levels, dropout, self.plan.mechanism, self.randomness, how)
        public = [self._public_step(stage, engine.compute) for stage in shared]
        progress = train_private(name, state, take, self.ledger, public)
        yield from self._checkpointed(name, state, progress, private=True)
        if state.step < c.steps:  # it was asked to stop
            return
        if charged_steps(self.ledger) != state.step:
            raise AssertionError(f"{state.step} steps taken, {charged_steps(self.ledger)} in the ledger")
        self._save_weights(network, state.ema.average)
        self._release()

    # ----------------------------------------------------------------------------------- checkpoints, release

    def _checkpointed(
        self, phase: str, state: TrainState, progress: Iterator[Step], private: bool = False
    ) -> Iterator[Step]:
        """Pass `progress` on, with a checkpoint every so many steps and when asked to stop."""
        c = self.config.private if private else self.config.public
        # `progress` has not started, so it goes on from what is restored here.
        self.checkpoints.load(phase, state, c.steps, charged_steps(self.ledger) if private else None)
        for name in self.checkpoints.damaged:
            self.hooks.on_event(Note(f"a damaged checkpoint was passed over: {name}"))
        shape = (self.plan.shape.channels, self.plan.shape.resolution, self.plan.shape.resolution)
        board = None
        if self.config.logging.tensorboard:
            board = TensorBoard(self.run.private, phase, state.step, self.hooks.on_event)
        log = StepLog(self.run.private, phase, state.step, self.private_log if private else self.public_log, board)
        with contextlib.closing(log):
            for report, seconds in timed(progress):
                log.write(report, seconds)
                saves = report.step % c.checkpoint_every == 0 or self.stop_requested
                # Before a checkpoint is written: the last one stays finite.
                last = saves or report.step == c.steps
                require_finite(self.run.private, state, report, c.learning_rate, shape, last=last)
                if private:
                    self._draw(state, report)
                yield report
                if saves or self.stop_requested:
                    log.sync()
                    self.checkpoints.save(phase, state)
                if self.stop_requested:
                    return

    def _draw(self, state: TrainState, report: Step) -> None:
        """Keep a picture of what the average of the weights draws, now and then."""
        every = self.config.logging.pictures
        if every is None or (report.step % every and report.step != report.steps):
            return
        try:
            # That of the network in training: to make it anew, large matrices are diagonalised.
            stages, gaussian = self.plan.stages, getattr(state.module, "gaussian", None)
            shown = {}
            for name in stages.networks:
                own = name == stages.private.network
                shown[name] = self._denoiser(own, 0, gaussian if name in stages.reading else None).eval()
                if not own:
                    load_weights(self.run.weights(name), shown[name])
            images = preview(self.config, self.plan, shown, state.ema, self.device)
            picture = image_grid(images, math.isqrt(len(images)), scale=2)
            write_atomically(self.run.private / PREVIEW, lambda path: picture.save(path, format="PNG"), 0o600)
        except (RuntimeError, OSError) as error:  # such as: no memory for a second network
            why = str(error).splitlines()[0]
            self.hooks.on_event(Warned(f"no picture of what is drawn ({why}); the training goes on"))

    def _save_weights(self, network: str, weights: dict[str, Tensor]) -> None:
        kept = {name: w.detach().cpu() for name, w in weights.items()}
        write_atomically(self.run.weights(network), lambda p: save_file(kept, p))

    def _release(self) -> None:
        if self.hooks.finish is not None:
            self.hooks.finish(self)
            remove_checkpoints(self.run.private)


def require_usable(config: Config) -> None:
    """ConfigError for stages or a program that cannot be, LedgerError for a file that is no budget; needs no images."""
    stages_of(config)
    program_class(config.program.name)
    if config.privacy.budget is not None:
        Budget(Path(config.privacy.budget))


def require_unfinished(run: Run) -> None:
    """Raise RunError if the run is finished."""
    if run.complete:
        # Its last act, which a crash may have cut off.
        with contextlib.suppress(RunError, OSError), run.lock():
            remove_checkpoints(run.private)
        raise RunError(f"{run.path} is finished already; there is nothing to resume.")
