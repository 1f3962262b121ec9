"""Starting a run, and going on with one that was interrupted."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from dpsyngen.config import Config, with_batch
from dpsyngen.data import ImageDataset
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.errors import RunError
from dpsyngen.training.checkpoint import remove_checkpoints
from dpsyngen.training.moments import MomentsPlan
from dpsyngen.training.pinned import budget_of, pinned
from dpsyngen.training.pipeline import Training
from dpsyngen.training.plan import make_plan, program_of, shape_of, with_whole_program
from dpsyngen.training.run import Run
from dpsyngen.training.tensorboard import require_tensorboard


def start(config: Config, dataset: ImageDataset, out: Path, device: str = "cpu", ranks: Ranks = ALONE) -> Training:
    """Plan a new run and make its directory.

    Raises:
        ConfigError, RunError: before anything is written or spent.
    """
    if config.logging.tensorboard:
        require_tensorboard()
    shape = shape_of(dataset, config)
    config = with_batch(config, shape.records)
    plan = make_plan(config, shape)
    # A program that cannot draw such images must say so before the directory is made.
    config = with_whole_program(config, program_of(config, shape))
    if config.privacy.budget is not None:
        config = config.model_copy(
            update={"privacy": config.privacy.model_copy(update={"budget": str(Path(config.privacy.budget).resolve())})}
        )
    budget = budget_of(config)
    if budget is not None:
        # Training reserves it again under the file's lock; here it is refused while there is no run directory yet.
        budget.require_data(dataset.fingerprint())
        budget.require(plan.mechanisms)
    return Training(Run.create(out, config), config, dataset, plan, device, ranks)


def resume(
    run: Run, dataset: ImageDataset, device: str = "cpu", tensorboard: bool | None = None, ranks: Ranks = ALONE
) -> Training:
    """Go on with an interrupted run.

    Args:
        run: the run.
        dataset: the images that it was started with.
        device: where to compute.
        tensorboard: whether this session writes files for TensorBoard; None: what the run's settings say.
        ranks: the processes that share the work, of any number.
    """
    require_unfinished(run)
    run.open_for_writing()
    config = run.config
    if tensorboard is not None:
        config = config.model_copy(update={"logging": config.logging.model_copy(update={"tensorboard": tensorboard})})
    if config.logging.tensorboard:
        require_tensorboard()
    plan = make_plan(config, shape_of(dataset, config))
    known = pinned(run)
    if known is not None:
        # Calibrating again could differ in the last digits with another version of the accountant.
        moments = plan.moments if known["moments"] is None else MomentsPlan(*known["moments"])
        plan = replace(
            plan, mechanism=replace(plan.mechanism, noise_multiplier=known["noise_multiplier"]), moments=moments
        )
    return Training(run, config, dataset, plan, device, ranks)


def require_unfinished(run: Run) -> None:
    """Raise RunError if the run is finished."""
    if run.complete:
        # Its last act, which a crash may have cut off.
        with contextlib.suppress(RunError, OSError), run.lock():
            remove_checkpoints(run.private)
        raise RunError(f"{run.path} is finished already; there is nothing to resume.")
