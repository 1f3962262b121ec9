"""What an experiment costs in privacy: each run on its own, and all of them if all were released."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpsyngen.config import Config
from dpsyngen.errors import BudgetExceeded
from dpsyngen.experiments.grid import Job
from dpsyngen.experiments.spec import Spec
from dpsyngen.privacy.accounting import Mechanism, default_delta, epsilon, merge
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import check_affordable
from dpsyngen.training.plan import Shape, make_plan


@dataclass(frozen=True)
class PrivacyCost:
    """All runs of an experiment as one composition.

    Formal guarantee: publishing the release half of *every* run is (``total_epsilon``, ``delta``)-differentially
    private.  Figures of an experiment, and a choice between runs by them, are not: they come from private images
    without noise.

    Attributes:
        runs: how many runs look at the private images with noise.
        without_noise: how many train on them without (ε = ∞).
        total_epsilon: upper bound on ε of all with noise together.
        delta: δ of that.
        seeded: whether the noise is reproducible, so that nothing of this is private.
        limit: what the specification allows; None: no limit.
        group_size: g; for up to g images of one person.
    """

    runs: int
    without_noise: int
    total_epsilon: float
    delta: float
    seeded: bool
    limit: float | None
    group_size: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "note": self.note()}

    def note(self) -> str:
        """In words."""
        if self.seeded:
            return (
                "The noise is reproducible (noise: seeded): no run of this experiment is private.  That is for public "
                "data only."
            )
        total = math.ceil(self.total_epsilon * 100) / 100
        return (
            f"Publishing all {self.runs} runs of this experiment would cost ε = {total:.2f} at δ = {self.delta:.3g} "
            "together; one run alone costs its own ε.  The figures cost privacy that no ε here covers, and so does "
            "choosing by them which run to publish: choose on public images."
        )


def privacy_cost(spec: Spec, jobs: Sequence[Job], shape: Shape) -> PrivacyCost:
    """Plan every run, and compose them.

    References are not counted: nothing of them is kept but figures, which are private.

    Raises:
        ConfigError: the settings of a run do not fit the data.
        BudgetExceeded: all together cost more than ``cost.total_epsilon``.
    """
    configs = [job.config for job in jobs if job.config is not None]
    plans = [plan for plan in _plans(configs, shape) if plan.noise_multiplier > 0]
    delta = spec.cost.delta or min((p.delta for p in plans), default=default_delta(shape.records))
    group = max((c.privacy.group_size for c in configs), default=1)
    total = epsilon(merge(p.mechanism for p in plans), delta, group_size=group) if plans else 0.0
    limit = spec.cost.total_epsilon
    if limit is not None and not total <= limit:
        raise BudgetExceeded(
            f"refused: the {len(plans)} private runs of this experiment would cost ε = {total:.3f} at δ = {delta:.3g} "
            f"together, above cost.total_epsilon = {limit:g}.  Take fewer runs or smaller ε, or compare on public "
            "images."
        )
    return PrivacyCost(len(plans), len(configs) - len(plans), total, delta, spec.noise == "seeded", limit, group)


def require_budget(spec: Spec, new: Sequence[Job], shape: Shape) -> None:
    """Refuse an experiment whose runs do not all fit into the budget file, rather than run some of them.

    Args:
        spec: the experiment.
        new: jobs that have not begun, so that they have reserved nothing yet.
        shape: of the images.

    Raises:
        BudgetExceeded: they do not fit beside what is reserved.
    """
    if spec.cost.budget_file is None:
        return
    budget = Budget(Path(spec.cost.budget_file))
    plans = _plans([job.config for job in new if job.config is not None], shape)
    check_affordable(
        (*budget.mechanisms(), *(p.mechanism for p in plans)),
        budget.epsilon_limit,
        budget.delta,
        budget.group_size,
        f"budget of {budget.path}, with all {len(plans)} runs that are still to begin,",
    )


@dataclass(frozen=True)
class _Planned:
    mechanism: Mechanism
    delta: float

    @property
    def noise_multiplier(self) -> float:
        return self.mechanism.noise_multiplier


def _plans(configs: Sequence[Config], shape: Shape) -> list[_Planned]:
    """What each run does to the private images; runs alike are calibrated once."""
    known: dict[tuple[Any, ...], _Planned] = {}
    out = []
    for c in configs:
        p = c.privacy
        key = (p.epsilon, p.delta, p.group_size, c.private.batch, c.private.steps, c.data.records)
        if key not in known:
            plan = make_plan(c, shape)
            known[key] = _Planned(plan.mechanism.mechanism(c.private.steps), plan.delta)
        out.append(known[key])
    return out
