"""The phase that releases DP moments: charged first, then computed, then written where the generator finds them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.distributed import ALONE, Ranks
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import write_atomically
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.moments import COUNT_WEIGHT, RESIDUAL_NORM, WHITE_NORM, MomentsPlan, Stopped, estimate_moments
from dpsyngen.training.plan import Shape
from dpsyngen.training.tensor_file import save_file

MOMENTS = "moments"
"""Name of the phase."""

QUERY = "moments"
UNBOUNDED: dict[str, Any] = {"l2_sensitivity": "unbounded"}


def queries(plan: MomentsPlan, shape: Shape) -> list[tuple[str, Mechanism, float | None]]:
    """What is asked, what it costs and its L2 sensitivity, where that is known before the first answer."""
    size = shape.channels * shape.resolution**2
    counted = 1 + COUNT_WEIGHT**2 if shape.num_classes > 1 else 1.0
    known = [
        ("sum and number of the images of each class", math.sqrt(size * counted)),
        ("scatter matrix of the images around their class means", size * RESIDUAL_NORM**2),
        (f"scatter matrix of each class in the directions found ({WHITE_NORM**2:g} a direction)", None),
    ]
    return [(text, m, bound) for (text, bound), m in zip(known, plan.mechanisms(), strict=False)]


def charged_moments(ledger: Ledger) -> list[Mechanism | None]:
    """The queries that the ledger has; None for one without noise."""
    return [e.mechanism for e in ledger.entries if e.details.get("query") == QUERY]


def uncharged(ledger: Ledger, plan: MomentsPlan) -> tuple[Mechanism, ...]:
    """The queries that the ledger does not have yet."""
    return plan.mechanisms()[len(charged_moments(ledger)) :]


def charge_moments(ledger: Ledger, plan: MomentsPlan, shape: Shape) -> None:
    """Make sure that the ledger has the moments before they are taken.

    A run that was killed in between takes them again, with the same noise: the same result, charged once.

    Raises:
        BudgetExceeded: they would exceed the target ε.
        RunError: moments of other noise were charged before, so the settings were changed in between.
    """
    wanted = queries(plan, shape)
    charged = charged_moments(ledger)
    for known, (_, mechanism, _) in zip(charged, wanted, strict=False):
        expected = mechanism if mechanism.noise_multiplier > 0 else None
        if known != expected:
            raise RunError(
                "the ledger has moments with another noise than the run would take now: its configuration was "
                "changed.  Undo the change, or start a new run."
            )
    for what, mechanism, sensitivity in wanted[len(charged) :]:
        bound = {} if sensitivity is None else {"l2_sensitivity": sensitivity}
        ledger.charge(mechanism, what, query=QUERY, **(bound if mechanism.noise_multiplier else UNBOUNDED))


def release_moments(
    path: Path,
    dataset: ImageDataset,
    shape: Shape,
    plan: MomentsPlan,
    randomness: Randomness,
    *,
    rank: int,
    stopped: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> None:
    """Estimate the moments and write them; nothing is written if `stopped`, asked now and then, says so."""
    with ranks.lead(MOMENTS):
        try:
            moments = estimate_moments(
                dataset, shape.num_classes, shape.records, plan, randomness, rank=rank, stopped=stopped, ranks=ranks
            )
        except Stopped:
            return
    write_atomically(path, lambda p: save_file(moments.to_tensors(), p))


def load_gaussian(path: Path, shape: Shape) -> GaussianDenoiser:
    """The denoiser of released moments.

    Raises:
        RunError: they are damaged.
    """
    try:
        moments = ClassGaussians.from_tensors(load_file(path))
        return GaussianDenoiser(moments, (shape.channels, shape.resolution, shape.resolution))
    except (SafetensorError, OSError, ConfigError) as error:
        raise RunError(
            f"{path} is damaged: {str(error).splitlines()[0]}.  Remove it and resume: the same moments are taken "
            "again, with the same noise."
        ) from None
