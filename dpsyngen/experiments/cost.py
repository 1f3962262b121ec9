"""What an experiment costs: ε of each run and of all of them if all were released, and how long they take.

Times come from a few steps of each kind on noise; the rest is arithmetic.  A step's time is taken to be linear in its
images, which holds well for batches beyond a few dozen.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen import fit
from dpsyngen.config import Config, merge_settings, validate, with_batch
from dpsyngen.data import ImageDataset
from dpsyngen.errors import BudgetExceeded
from dpsyngen.experiments.experiment import networks_of
from dpsyngen.experiments.spec import Job, Spec
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.privacy.accounting import default_delta, epsilon, merge
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.certificate import number
from dpsyngen.privacy.ledger import Ledger, check_affordable
from dpsyngen.training.log import Event, Step
from dpsyngen.training.moments import MOMENTS
from dpsyngen.training.plan import Plan, Shape, make_plan, stages_of

_NOISY, _MOST_IMAGES = 64, 10_000  # noisy images of a measured step, and images that moments are measured on


@dataclass(frozen=True)
class PrivacyCost:
    """All runs of an experiment as one composition.

    Formal guarantee: publishing the release half of *every* run is (``total_epsilon``, ``delta``)-differentially
    private.  Figures of an experiment, and a choice between runs by them, are not: they come from private images
    without noise.

    Attributes:
        runs, without_noise: how many runs look at the private images with noise, and without (ε = ∞).
        earlier: runs in the experiment's folder that the specification no longer has; what they have done counts.
        total_epsilon, delta: upper bound on ε of all with noise together, at that δ.
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
            return "The noise is reproducible (noise: seeded), for public data: no run of this experiment is private."
        past = f" and {self.earlier} earlier ones in its folder" if self.earlier else ""
        without = f"  The {self.without_noise} runs of ε = ∞ must never be published." if self.without_noise else ""
        cost = f"ε = {number(self.total_epsilon, up=True)} at δ = {self.delta:.3g}"
        return (
            f"Publishing all {self.runs} private runs of this experiment{past} would cost {cost} together; one run "
            f"alone costs its own ε.{without}  The figures cost privacy that no ε here covers, and so does choosing by "
            "them which run to publish: choose on public images."
        )


def privacy_cost(spec: Spec, jobs: Sequence[Job], shape: Shape, out: Path | None = None) -> PrivacyCost:
    """Plan every run, and compose them with what other runs in the experiment's folder have done.

    A specification may drop runs that were begun; what they did to the images is done all the same.

    References are not counted: nothing of them is kept but figures, which are private.  BudgetExceeded if all together
    cost more than ``cost.total_epsilon``.
    """
    configs = [job.config for job in jobs if job.config is not None]
    planned = [make_plan(c, shape) for c in configs]  # runs alike are calibrated once: the accountant remembers
    plans = [plan for plan in planned if all(m.noise_multiplier > 0 for m in plan.mechanisms)]
    names = {job.name for job in jobs}
    paths = [] if out is None else sorted((out / "runs").glob("*/private/ledger.jsonl"))
    earlier = [Ledger(path) for path in paths if path.parts[-3] not in names]
    charged: list[Plan | Ledger] = [*plans, *earlier]
    delta = spec.cost.delta or min((each.delta for each in charged), default=default_delta(shape.records))
    group = max([1, *(c.privacy.group_size for c in configs), *(ledger.group_size for ledger in earlier)])
    mechanisms = merge([m for each in charged for m in each.mechanisms])
    total = epsilon(mechanisms, delta, group_size=group) if mechanisms else 0.0
    if any(ledger.non_private or not ledger.secure for ledger in earlier):
        total = math.inf
    limit = spec.cost.total_epsilon
    if limit is not None and not total <= limit:
        raise BudgetExceeded(
            f"refused: the {len(plans) + len(earlier)} private runs of this experiment would cost ε = "
            f"{number(total, up=True)} at δ = {delta:.3g} together, above cost.total_epsilon = {limit:g}.  Take fewer "
            "runs or smaller ε, or compare on public images."
        )
    return PrivacyCost(
        len(plans), len(configs) - len(plans), len(earlier), total, delta, spec.noise == "seeded", limit, group
    )


def require_budget(spec: Spec, new: Sequence[Job], shape: Shape) -> None:
    """BudgetExceeded if the runs do not all fit into the budget file, rather than run some of them.

    `new` are the jobs that have not begun, so that they have reserved nothing yet.
    """
    if spec.cost.budget_file is None:
        return
    budget = Budget(Path(spec.cost.budget_file))
    plans = [make_plan(job.config, shape) for job in new if job.config is not None]
    check_affordable(
        (*budget.mechanisms(), *(m for plan in plans for m in plan.mechanisms)),
        budget.epsilon_limit,
        budget.delta,
        budget.group_size,
        f"budget of {budget.path}, with all {len(plans)} runs that are still to begin,",
    )


# ---------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class StepTimes:
    """Seconds that were measured for one network and shape, on one device; 0 where a run has no such steps.

    `public` and `private` (DP-SGD) are of a noisy image in a step, `sampling` of an image in a sampler step, `moments`
    of an image in all queries of DP moments.
    """

    public: float
    private: float
    sampling: float
    moments: float = 0.0


def measure(config: Config, shape: Shape, device: str = "cpu") -> StepTimes:
    """Take a few steps of each kind on images of noise, in a folder that is removed; batches are cut to seconds."""
    copies, public_copies = config.private.copies, config.public.copies
    batch = max(2, min(with_batch(config, shape.records).private.batch, _NOISY // copies))
    public_batch = max(2, min(config.public.batch, _NOISY // public_copies))
    # What moments take whatever the number of images is to count for little.
    n = max(4 * batch, min(shape.records, _MOST_IMAGES)) if stages_of(config).moments else 4 * batch
    labels = np.arange(n, dtype=np.int64) % shape.num_classes if shape.num_classes else None
    # Noise in squares of two by two pixels: neighbours that agree, as those of pictures do.
    half = -(-shape.resolution // 2)
    squares = np.random.default_rng(0).integers(0, 256, (n, shape.channels, half, half), dtype=np.uint8)
    images = squares.repeat(2, 2).repeat(2, 3)[:, :, : shape.resolution, : shape.resolution]
    dataset = ImageDataset(images, labels, shape.class_names, "noise")
    few = {"warmup": 0, "checkpoint_every": 10}
    changes = {
        "data": {"source": "noise", "records": None, "resolution": shape.resolution},
        # The noise is seeded: the images are no images, and the run is thrown away.
        "privacy": {"delta": 1e-6, "insecure_seed": 0, "budget": None, "group_size": 1},
        "public": {"steps": 3, "batch": public_batch, **few},
        "private": {"steps": 5, "batch": batch, **few},
    }
    taken: dict[str, list[float]] = {"public": [], "private": [], MOMENTS: []}
    now = time.process_time if device == "cpu" else time.perf_counter
    last = now()

    def on_event(event: Event) -> None:
        nonlocal last
        if isinstance(event, Step):
            part = MOMENTS if event.phase == MOMENTS else "private" if event.private else "public"
            if part == MOMENTS or event.step > 1:  # the first step of a phase builds and measures things
                taken[part].append(now() - last)
            last = now()

    with tempfile.TemporaryDirectory(prefix="dpsyngen-estimate-") as folder:
        settings = validate(merge_settings(config.model_dump(), changes))
        training = fit.prepare(settings, Path(folder) / "run", dataset, device, on_event=on_event)
        last = now()
        fit.carry_out(training)
        generator = ReleasedGenerator(training.run.release, device)
        generator.sample(2, steps=1, sampler="ddim")
        begun = now()
        generator.sample(16, steps=2, sampler="ddim")
        sampling = (now() - begun) / 32
    public, private = (min(taken[part], default=0.0) for part in ("public", "private"))
    return StepTimes(
        public / (public_batch * public_copies), private / (batch * copies), sampling, sum(taken[MOMENTS]) / n
    )


def training_seconds(config: Config, shape: Shape, device: str = "cpu") -> float:
    """Seconds of one training, from a few steps on noise; core-seconds on a CPU."""
    c = with_batch(config, shape.records)
    return sum(_training_seconds(c, shape, measure(c, shape, device), len(networks_of(c, stages_of(c), shape))))


def _training_seconds(c: Config, shape: Shape, t: StepTimes, networks: int) -> tuple[float, float]:
    """Seconds of the training of so many public `networks`, and of DP moments and DP-SGD."""
    public = networks * c.public.steps * c.public.batch * c.public.copies * t.public
    private = 0.0 if stages_of(c).gaussian else c.private.steps * c.private.batch * c.private.copies * t.private
    return public, private + shape.records * t.moments


def estimate(spec: Spec, jobs: Sequence[Job], shape: Shape, device: str = "cpu") -> dict[str, float]:
    """Seconds of all runs among `jobs`, none of them begun, in one process that has the device to itself.

    On a CPU they are core-seconds.  ``public`` is training on programs, of which each network is trained once and
    shared, ``private`` DP-SGD and DP moments; figures and references are not counted.
    """
    times: dict[str, StepTimes] = {}
    known: set[str] = set()
    found = {"public": 0.0, "private": 0.0, "sampling": 0.0}
    for c in (with_batch(job.config, shape.records) for job in jobs if job.config is not None):
        stages = stages_of(c)
        # ε decides to how many frequencies moments are cut, and so their time.
        moments = (c.privacy.epsilon, c.moments) if stages.moments else ()
        alike = repr((c.stages.variant, c.network.size, c.private.copies, c.public.copies, c.program.name, moments))
        if alike not in times:
            times[alike] = measure(c, shape, device)
        t = times[alike]
        new = {network.key for network in networks_of(c, stages, shape)} - known
        known |= new
        public, private = _training_seconds(c, shape, t, len(new))
        found["public"] += public
        found["private"] += private
        steps = (spec.sampling.steps or c.sampling.steps) if stages.networks else 1
        evaluations = 2 * steps - 1 if (spec.sampling.sampler or c.sampling.sampler) == "heun" else steps
        found["sampling"] += spec.sampling.images * evaluations * t.sampling
    return found


def hours(seconds: float, core: str = "") -> str:
    """In words; `core` is put before the unit."""
    if seconds < 90:
        return f"{seconds:.0f} {core}seconds"
    return f"{seconds / 60:.0f} {core}minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} {core}hours"
