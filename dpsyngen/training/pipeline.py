"""The phases of a run, one after the other, to the release.

They follow from its stage map alone: pre-training if the map asks for it, a public phase for each public expert, DP
moments if some stage is answered by them, then the private phase.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.ema import Ema
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.loss import denoising_loss, make_noisy
from dpsyngen.diffusion.noise_levels import NoiseLevels
from dpsyngen.diffusion.stages import GAUSSIAN, Stage
from dpsyngen.diffusion.unet import count_parameters
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.files import write_atomically
from dpsyngen.hardware import Compute, choose
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.per_example import PerExampleGradients, find_physical_batch
from dpsyngen.release.write import write_release
from dpsyngen.training.checkpoint import Checkpoints, TrainState
from dpsyngen.training.engine_settings import EngineSettings
from dpsyngen.training.finite import FiniteGuard, require_not_stopped
from dpsyngen.training.follower import PRIVATE, PUBLIC, SET_UP, Setting
from dpsyngen.training.moments_phase import MOMENTS, charge_moments, load_gaussian, release_moments, uncharged
from dpsyngen.training.networks import load_weights, make_denoiser, make_network
from dpsyngen.training.pinned import budget_of, ledger_of, pin_data, randomness_of
from dpsyngen.training.plan import Plan, program_of
from dpsyngen.training.preview import preview
from dpsyngen.training.private import Observer, charged_steps, train_private
from dpsyngen.training.public import Progress, PublicStep, train_public
from dpsyngen.training.run import JsonLines, Run
from dpsyngen.training.step_log import StepLog, timed
from dpsyngen.training.steps import PRETRAIN, PUBLIC_INDEX, private_step, public_step
from dpsyngen.training.tensor_file import save_file
from dpsyngen.workers import Workers


class Training:
    """One training run, new or resumed; iterate :meth:`steps` to the end.

    Args:
        run: the run directory.
        config: its configuration.
        dataset: the private images.
        plan: from :func:`dpsyngen.training.plan.make_plan`.
        device: where to compute.
        ranks: the processes that share the work; this is the main one.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        dataset: ImageDataset,
        plan: Plan,
        device: str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self.run, self.config, self.dataset, self.plan, self.ranks = run, config, dataset, plan, ranks
        self.compute = choose(device, config.compute, local_rank=None if ranks.alone else ranks.local_rank)
        self.device = device = self.compute.device
        # Before anything is read that another process could be changing.
        run.open_for_writing()
        self.private_log = JsonLines(run.private / "training.jsonl", 0o600)
        self.public_log = JsonLines(run.release / "public_training.jsonl", 0o644)
        self.stop_requested = False
        self.warn: Callable[[str], None] = warnings.warn
        self.tell: Callable[[str], None] = lambda text: None  # what is being done that has no steps
        # Audits look on, and train another network.
        self.observer: Observer | None = None
        self.make_denoiser = make_denoiser
        self._shown: dict[str, NetworkDenoiser] | None = {}  # the networks that draw for TensorBoard
        self.workers = Workers(None if device == "cpu" else 1)
        self.program = program_of(config, plan.shape)
        self.randomness = randomness_of(run, config)
        self.ledger = ledger_of(run, config, plan, self.program, self.randomness)
        pin_data(run, config, dataset, self.randomness, self.ledger, plan)
        self.checkpoints = Checkpoints(run.private, self.ledger)
        self.budget = budget_of(config)
        if self.budget is not None:
            self.budget.reserve(self.ledger.run, run.path.name, plan.mechanisms, dataset.fingerprint())
        left = plan.steps - charged_steps(self.ledger)
        wanted = () if plan.moments is None else uncharged(self.ledger, plan.moments)
        if left > 0:
            wanted += (plan.mechanism.mechanism(left),)
        if wanted:
            self.ledger.require(*wanted)

    @property
    def parameters(self) -> int:
        """Trainable parameters of the private network; 0 if there is none."""
        if self.plan.stages.gaussian:
            return 0
        with torch.device("meta"):
            return count_parameters(make_network(self.config, self.plan.shape, residual=self.plan.stages.moments))

    def steps(self) -> Iterator[Progress]:
        """Run what is left, yielding after each step; the release is written at the end.

        Setting ``stop_requested`` ends it after the current step with a checkpoint.  The run directory is locked until
        the end of the iteration, whichever way it ends.

        Raises:
            RunError: another process works on the run, or its files do not fit together.
        """
        with self.run.lock():
            require_not_stopped(self.run.private)
            self.ranks.tell(SET_UP, setting=Setting(self.config, self.plan, self.randomness))
            yield from self._phases()

    def _phases(self) -> Iterator[Progress]:
        public = self.plan.stages.public
        expert_stages = [s for s in public if s.network != self.plan.stages.private.network]
        if self.plan.stages.pretrain:
            everywhere = Stage(PRETRAIN, -math.inf, math.inf, "public", PRETRAIN)
            yield from self._public(everywhere, conditional=True)
        for stage in expert_stages:
            if not self.stop_requested:
                yield from self._public(stage, conditional=False)
        if self.plan.stages.moments and not self.stop_requested:
            yield from self._moments()
        if not self.stop_requested:
            yield from self._private()

    def _denoiser(self, conditional: bool, index: int, gaussian: GaussianDenoiser | None = None) -> NetworkDenoiser:
        seed = self.config.network.seed + index
        return self.make_denoiser(self.config, self.plan.shape, conditional, seed, gaussian).to(self.device)

    def _gaussian(self) -> GaussianDenoiser | None:
        """The denoiser of the DP moments, if there are any."""
        if not self.plan.stages.moments:
            return None
        return load_gaussian(self.run.weights(GAUSSIAN), self.plan.shape).to(self.device)

    def _moments(self) -> Iterator[Progress]:
        """Release moments of the private images; nothing to do if that was done before."""
        path, plan = self.run.weights(GAUSSIAN), self.plan.moments
        assert plan is not None
        charge_moments(self.ledger, plan, self.plan.shape)
        if path.exists():
            return
        queries = len(plan.mechanisms())
        self.tell(f"{MOMENTS}: reading the private images, {queries} times")
        release_moments(
            path,
            self.dataset,
            self.plan.shape,
            plan,
            self.randomness,
            rank=self.config.moments.rank,
            stopped=lambda: self.stop_requested,
            ranks=self.ranks,
        )
        if path.exists():
            yield Progress(MOMENTS, queries, queries, {})

    def _public_step(self, stage: Stage, compute: Compute) -> PublicStep:
        return public_step(self.config, self.program, stage, self.workers, self.ranks, compute)

    def _fitting_batch(self, denoiser: NetworkDenoiser, compute: Compute) -> int:
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

        with compute.autocast():
            return find_physical_batch(engine, loss, copies=copies)

    def _public(self, stage: Stage, conditional: bool) -> Iterator[Progress]:
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
        yield from self._checkpointed(stage.name, state, progress, self.public_log, self.config.public.checkpoint_every)
        if not self.stop_requested:
            self._save_weights(stage.network, state)

    def _private(self) -> Iterator[Progress]:
        c, plan = self.config.private, self.plan
        network = plan.stages.private.network
        gaussian = self._gaussian()
        if plan.stages.gaussian:
            self._release()
            return
        denoiser = self._denoiser(conditional=True, index=0, gaussian=gaussian)
        engine = EngineSettings.of(self.run, self.config, self.compute)
        compute = engine.compute or self.compute.for_dp_steps()
        compute.prepare(denoiser)
        if plan.stages.pretrain:
            load_weights(self.run.weights(PRETRAIN), denoiser)
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
        take = private_step(
            self.config,
            plan,
            self.dataset,
            self.randomness,
            physical_batch=engine.physical_batch or self._fitting_batch(denoiser, compute),
            kernels=engine.kernels,
            workers=self.workers,
            ranks=self.ranks,
            compute=compute,
            observer=self.observer,
        )
        moments = None if gaussian is None else load_file(self.run.weights(GAUSSIAN))
        self.ranks.tell(
            PRIVATE, physical_batch=take.physical_batch, shared=shared, moments=moments, pins=compute.pins()
        )
        engine.physical_batch = take.physical_batch
        # What was measured must be known before noise is used: a step that is repeated has to sum in the same order.
        take.before_release = engine.save
        public = [self._public_step(stage, compute) for stage in shared]
        name = plan.stages.private.name
        progress = train_private(name, state, take, self.ledger, public, with_epsilon=self.observer is None)
        yield from self._checkpointed(name, state, progress, self.private_log, c.checkpoint_every)
        if self.stop_requested and state.step < c.steps:
            return
        if charged_steps(self.ledger) != state.step:
            raise AssertionError(f"{state.step} steps taken, {charged_steps(self.ledger)} in the ledger")
        self._save_weights(network, state)
        self._release()

    def _release(self) -> None:
        write_release(self.run, self.config, self.plan, self.ledger, self.randomness, self.program, self.budget)
        self.checkpoints.clear()

    def _checkpointed(
        self, phase: str, state: TrainState, progress: Iterator[Progress], figures: JsonLines, every: int
    ) -> Iterator[Progress]:
        """Pass `progress` on, with a checkpoint every so many steps and when asked to stop."""
        # `progress` has not started, so it goes on from what is restored here.
        private = phase == self.plan.stages.private.name
        steps, charged = (
            (self.config.private.steps, charged_steps(self.ledger)) if private else (self.config.public.steps, None)
        )
        self.checkpoints.load(phase, state, steps, charged)
        guard = self._guard(phase, private)
        board = self.config.logging.tensorboard
        log = StepLog(self.run.private, phase, state.step, figures, tensorboard=board, warn=self.warn)
        with contextlib.closing(log):
            for report, seconds in timed(progress):
                log.write(report, seconds)
                # Before a checkpoint is written: the last one stays finite.
                saves = report.step % every == 0 or self.stop_requested
                guard.check(state, report.step, last=saves or report.step == steps)
                if private and board:
                    self._draw(log, state, report)
                yield report
                if report.step % every == 0 or self.stop_requested:
                    log.sync()
                    self.checkpoints.save(phase, state)
                if self.stop_requested:
                    return

    def _draw(self, log: StepLog, state: TrainState, report: Progress) -> None:
        """Show TensorBoard what the average of the weights draws, now and then."""
        if self._shown is None or (report.step % self.config.logging.images_every and report.step != report.steps):
            return
        try:
            if not self._shown:
                stages, gaussian = self.plan.stages, self._gaussian()
                for name in stages.networks:
                    own = name == stages.private.network
                    self._shown[name] = self._denoiser(own, 0, gaussian if own else None).eval()
                    if not own:
                        load_weights(self.run.weights(name), self._shown[name])
            log.draw(report.step, preview(self.config, self.plan, self._shown, state.ema, self.device))
        except (RuntimeError, OSError) as error:  # such as: no memory for a second network
            self._shown = None
            self.warn(f"no pictures for TensorBoard from here on ({str(error).splitlines()[0]}); the training goes on")

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
