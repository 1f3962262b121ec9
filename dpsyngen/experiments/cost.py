"""What an experiment costs in privacy: each run on its own, and all of them if all were released."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpsyngen.config import Config, with_batch
from dpsyngen.diffusion.stages import USE_MOMENTS
from dpsyngen.errors import BudgetExceeded
from dpsyngen.experiments.grid import Job
from dpsyngen.experiments.spec import Spec
from dpsyngen.privacy.accounting import Mechanism, default_delta, epsilon, merge
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import Ledger, check_affordable
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
        earlier: runs in the experiment's folder that the specification no longer has; what they have done counts.
        total_epsilon: upper bound on ε of all with noise together.
        delta: δ of that.
        seeded: whether the noise is reproducible, so that nothing of this is private.
        limit: what the specification allows; None: no limit.
        group_size: g; for up to g images of one person.
    """

    runs: int
    without_noise: int
    earlier: int
    total_epsilon: float
    delta: float
    seeded: bool
    limit: float | None
    group_size: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        total = "inf" if math.isinf(self.total_epsilon) else self.total_epsilon
        return {**asdict(self), "total_epsilon": total, "note": self.note()}

    def note(self) -> str:
        """In words."""
        if self.seeded:
            return (
                "The noise is reproducible (noise: seeded): no run of this experiment is private.  That is for public "
                "data only."
            )
        past = f" and {self.earlier} earlier ones in its folder" if self.earlier else ""
        without = ""
        if self.without_noise:
            without = f"  The {self.without_noise} runs of ε = ∞ must never be published."
        cost = f"ε = {_bound(self.total_epsilon)} at δ = {self.delta:.3g}"
        return (
            f"Publishing all {self.runs} private runs of this experiment{past} would cost {cost} together; one run "
            f"alone costs its own ε.{without}  The figures cost privacy that no ε here covers, and so does choosing by "
            "them which run to publish: choose on public images."
        )


def _bound(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{math.ceil(epsilon * 100) / 100:.2f}"


def privacy_cost(spec: Spec, jobs: Sequence[Job], shape: Shape, out: Path | None = None) -> PrivacyCost:
    """Plan every run, and compose them with what other runs in the experiment's folder have done.

    A specification may drop runs that were begun; what they did to the images is done all the same.

    References are not counted: nothing of them is kept but figures, which are private.

    Args:
        spec: the experiment.
        jobs: its jobs.
        shape: of the images.
        out: its folder, which need not exist.

    Raises:
        LedgerError: the ledger of an earlier run is damaged.
        ConfigError: the settings of a run do not fit the data.
        BudgetExceeded: all together cost more than ``cost.total_epsilon``.
    """
    configs = [job.config for job in jobs if job.config is not None]
    plans = [plan for plan in _plans(configs, shape) if plan.noisy]
    earlier = [] if out is None else _earlier(out, {job.name for job in jobs})
    deltas = [*(p.delta for p in plans), *(ledger.delta for ledger in earlier)]
    delta = spec.cost.delta or min(deltas, default=default_delta(shape.records))
    group = max([1, *(c.privacy.group_size for c in configs), *(ledger.group_size for ledger in earlier)])
    done = [m for ledger in earlier for m in ledger.mechanisms]
    mechanisms = merge([*(m for p in plans for m in p.mechanisms), *done])
    total = epsilon(mechanisms, delta, group_size=group) if mechanisms else 0.0
    if any(ledger.non_private or not ledger.secure for ledger in earlier):
        total = math.inf
    limit = spec.cost.total_epsilon
    if limit is not None and not total <= limit:
        raise BudgetExceeded(
            f"refused: the {len(plans) + len(earlier)} private runs of this experiment would cost ε = {_bound(total)} "
            f"at δ = {delta:.3g} together, above cost.total_epsilon = {limit:g}.  Take fewer runs or smaller ε, or "
            "compare on public images."
        )
    return PrivacyCost(
        len(plans), len(configs) - len(plans), len(earlier), total, delta, spec.noise == "seeded", limit, group
    )


def _earlier(out: Path, known: set[str]) -> list[Ledger]:
    """Ledgers of runs in the folder that are none of the jobs."""
    paths = (p / "private" / "ledger.jsonl" for p in sorted((out / "runs").glob("*")) if p.name not in known)
    return [Ledger(p) for p in paths if p.exists()]


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
        (*budget.mechanisms(), *(m for p in plans for m in p.mechanisms)),
        budget.epsilon_limit,
        budget.delta,
        budget.group_size,
        f"budget of {budget.path}, with all {len(plans)} runs that are still to begin,",
    )


@dataclass(frozen=True)
class _Planned:
    mechanisms: tuple[Mechanism, ...]
    delta: float

    @property
    def noisy(self) -> bool:
        return all(m.noise_multiplier > 0 for m in self.mechanisms)


def _plans(configs: Sequence[Config], shape: Shape) -> list[_Planned]:
    """What each run does to the private images; runs alike are calibrated once."""
    known: dict[tuple[Any, ...], _Planned] = {}
    out = []
    for c in configs:
        p = c.privacy
        batch = with_batch(c, shape.records).private.batch
        key = (p.epsilon, p.delta, p.group_size, batch, c.private.steps, c.data.records)
        key = (*key, *((c.stages.variant, c.moments.share) if c.stages.variant in USE_MOMENTS else ()))
        if key not in known:
            plan = make_plan(c, shape)
            known[key] = _Planned(plan.mechanisms, plan.delta)
        out.append(known[key])
    return out
