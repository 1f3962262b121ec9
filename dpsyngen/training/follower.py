"""What the other processes of a distributed training do: their share of each step, as the main one asks for it.

A follower has no files.  Settings, the key of the noise and the weights come from the main process; the images it
reads itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.diffusion.stages import Stage
from dpsyngen.distributed import END, Ranks
from dpsyngen.errors import RunError
from dpsyngen.hardware import Compute, choose
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.moments import MOMENTS, Stopped, estimate_moments
from dpsyngen.training.networks import make_denoiser
from dpsyngen.training.plan import Plan, program_of
from dpsyngen.training.private import Computing, PrivateStep
from dpsyngen.training.public import PublicStep, levels_of, public_step
from dpsyngen.training.session import chosen_images
from dpsyngen.workers import Workers

READ, SET_UP, PUBLIC, PRIVATE = "read", "set up", "public", "private"

Load = Callable[[Config], ImageDataset]
"""Reads the private images as a configuration asks for them."""


def read_together(ranks: Ranks, config: Config, load: Load) -> ImageDataset:
    """In the main process: have all read the images, and see to it that they are the same; else RunError.

    DataError where images cannot be read.  Nothing is spent yet.
    """
    if ranks.alone:
        return load(config)
    with ranks.lead(READ, config=config):
        dataset = ranks.agree(lambda: load(config))
        prints = ranks.gather(_print(dataset))
    others = [rank for rank, value in enumerate(prints) if value != prints[0]]
    if others:
        raise RunError(
            f"the processes of rank {', '.join(map(str, others))} have read other images than the main one: "
            f"{dataset.source} must be the same on every machine, in the same order."
        )
    return dataset


def _print(dataset: ImageDataset) -> tuple[str, str]:
    """Of the images, and of whose each of them is, which the choice of ``privacy.most_per_person`` follows from."""
    persons = b"" if dataset.persons is None else dataset.persons.tobytes()
    return dataset.fingerprint(), hashlib.sha256(persons).hexdigest()


def follow(ranks: Ranks, load: Load, device: str) -> None:
    """Work for the main process until it says that it is done; raises Dismissed if it failed, RankLost if it is gone.

    Ctrl-C and SIGTERM, which torchrun passes on to all processes, are left to the main one: it ends the run after the
    current step, which takes all.
    """
    with handling(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
        _Follower(ranks, load, device).run()


class _Follower:
    dataset: ImageDataset  # from READ on
    config: Config  # from SET_UP on, like the next two
    plan: Plan
    randomness: Randomness
    denoiser: NetworkDenoiser  # of the phase

    def __init__(self, ranks: Ranks, load: Load, device: str) -> None:
        self.ranks, self.load, self.device = ranks, load, device
        self.workers = Workers(None if device == "cpu" else 1)
        self.steps: dict[str, PublicStep | PrivateStep] = {}

    def run(self) -> None:
        handlers: dict[str, Callable[..., None]] = {
            READ: self._on_read,
            SET_UP: self._on_set_up,
            PUBLIC: self._on_public,
            MOMENTS: self._on_moments,
            PRIVATE: self._on_private,
        }
        while (command := self.ranks.next_command()).name != END:
            if command.name in handlers:
                handlers[command.name](**command.values)
            else:  # a step that was prepared
                self.steps[command.name].gradients(self.denoiser, **command.values)

    def _on_read(self, config: Config) -> None:
        def load() -> ImageDataset:
            # What this machine cannot do must be known before anything is spent, too.
            choose(self.device, config.compute)
            return self.load(config)

        self.dataset = self.ranks.agree(load)
        self.ranks.gather(_print(self.dataset))

    def _on_set_up(self, config: Config, plan: Plan, randomness: Randomness) -> None:
        self.config, self.plan, self.randomness = config, plan, randomness
        self.dataset = chosen_images(config, self.dataset, randomness)  # by the run's key, so that all have the same

    def _on_public(self, stage: Stage, conditional: bool) -> None:
        compute = choose(self.device, self.config.compute)
        self.denoiser = make_denoiser(self.config, self.plan.shape, conditional, 0)
        compute.prepare(self.denoiser)
        compute.compiled(self.denoiser.network, trains=True)
        self._prepare_public([stage], compute)

    def _prepare_public(self, stages: list[Stage], compute: Compute) -> None:
        program = program_of(self.config, self.plan.shape)
        made = [public_step(self.config, program, s, self.workers, self.ranks, compute) for s in stages]
        self.steps = {step.name: step for step in made}

    def _on_moments(self) -> None:
        plan, shape = self.plan.moments, self.plan.shape
        assert plan is not None
        query = partial(estimate_moments, self.dataset, shape.num_classes, shape.records, plan, self.randomness)
        with contextlib.suppress(Stopped):
            query(rank=self.config.moments.rank, ranks=self.ranks)

    def _on_private(
        self, physical_batch: int, shared: list[Stage], moments: ClassGaussians | None, pins: dict[str, Any]
    ) -> None:
        shape, n, gaussian = self.plan.shape, self.config.network, None
        if moments is not None:
            gaussian = GaussianDenoiser(moments, (shape.channels, shape.resolution, shape.resolution))
        compute = choose(self.device, self.config.compute).for_dp_steps().pinned(pins)
        self.denoiser = make_denoiser(self.config, shape, True, 0, gaussian)
        compute.prepare(self.denoiser)
        self._prepare_public(shared, compute)
        # Kernels are measured in each process for itself: they decide about speed and rounding only.
        kernels = KernelChoices(measure=self.config.privacy.insecure_seed is None)
        how = Computing(physical_batch, kernels, self.workers, self.ranks, compute)
        levels = levels_of(n, self.plan.stages.private)
        take = PrivateStep(self.dataset, levels, n.label_dropout, self.plan.mechanism, self.randomness, how)
        self.steps[take.name] = take


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], object] | signal.Handlers, *signals: signal.Signals) -> Iterator[None]:
    """Answer `signals` by `handler`, and as before afterwards."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stoppable(Protocol):
    """A training that ends after the current step when it is asked to."""

    stop_requested: bool
    ranks: Ranks


@contextlib.contextmanager
def stop_on_signals(training: Stoppable, tell: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal end the run after the current step, with a checkpoint; a second one ends it
    at once.

    torchrun passes signals on to its processes, to which a terminal has sent them already, and kills what still runs
    after half a minute: with several processes one signal after another counts as one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's; in another one an interrupt cannot arrive
        return

    def handler(number: int, frame: object) -> None:
        if training.stop_requested:
            if not training.ranks.alone:
                return
            raise KeyboardInterrupt
        training.stop_requested = True
        try:
            at_once = " (Ctrl-C again to stop at once)" if training.ranks.alone else ""
            tell(f"stopping after this step{at_once} …")
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
    with handling(handler, *chosen):
        yield
