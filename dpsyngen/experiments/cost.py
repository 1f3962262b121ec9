"""What an experiment costs: ε of each run and of all of them if all were released, and how long they take.

Times come from a few steps of each kind on noise; the rest is arithmetic.  A step's time is taken to be linear in its
images, which holds well for batches beyond a few dozen: per image it is measured on a batch that a CPU can do in
seconds, also where the planned batch has thousands.  On a machine without a GPU the GPU-hours come from counted
floating-point operations and an assumed rate, and say so.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen import fit
from dpsyngen.config import Config, merge_settings, validate, with_batch
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import denoising_loss, make_noisy
from dpsyngen.diffusion.noise_levels import NoiseLevels
from dpsyngen.diffusion.stages import USE_MOMENTS
from dpsyngen.errors import BudgetExceeded
from dpsyngen.evaluation import FeatureSpec, classification_accuracy
from dpsyngen.evaluation.cas import HELD_OUT, default_epochs
from dpsyngen.experiments.experiment import networks_of
from dpsyngen.experiments.spec import Job, Spec
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.privacy.accounting import default_delta, epsilon, merge
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import Ledger, check_affordable
from dpsyngen.training.log import Event, Step
from dpsyngen.training.moments import MOMENTS
from dpsyngen.training.networks import make_denoiser
from dpsyngen.training.plan import Plan, Shape, make_plan, stages_of

GPU_TERAFLOPS = 3.0
"""Sustained rate that GPU-hours assume, in 10^12 floating-point operations a second.

DPDM's published MNIST runs (1.5 million parameters, batch 4096, K = 32, 300 epochs) took 70 A100-hours and more
(METHOD.md); by our count of operations that is what such small networks keep of an A100's 19.5 (docs/comparing.md).
"""

_FEWEST, _MOST, _FLOPS = 16, 128, 1e11  # noisy images of a measured step: as many as a CPU core does in some seconds
_NUMBERS, _MOST_IMAGES = 1 << 23, 20_000  # pixels and images that moments are measured on, at most


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

    Raises:
        LedgerError: the ledger of an earlier run is damaged.
        ConfigError: the settings of a run do not fit the data.
        BudgetExceeded: all together cost more than ``cost.total_epsilon``.
    """
    configs = [job.config for job in jobs if job.config is not None]
    plans = [plan for plan in _plans(configs, shape) if all(m.noise_multiplier > 0 for m in plan.mechanisms)]
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
            f"refused: the {len(plans) + len(earlier)} private runs of this experiment would cost ε = {_bound(total)} "
            f"at δ = {delta:.3g} together, above cost.total_epsilon = {limit:g}.  Take fewer runs or smaller ε, or "
            "compare on public images."
        )
    return PrivacyCost(
        len(plans), len(configs) - len(plans), len(earlier), total, delta, spec.noise == "seeded", limit, group
    )


def require_budget(spec: Spec, new: Sequence[Job], shape: Shape) -> None:
    """Refuse an experiment whose runs do not all fit into the budget file, rather than run some of them.

    `new` are the jobs that have not begun, so that they have reserved nothing yet.

    Raises:
        BudgetExceeded: they do not fit beside what is reserved.
    """
    if spec.cost.budget_file is None:
        return
    budget = Budget(Path(spec.cost.budget_file))
    plans = _plans([job.config for job in new if job.config is not None], shape)
    check_affordable(
        (*budget.mechanisms(), *(m for plan in plans for m in plan.mechanisms)),
        budget.epsilon_limit,
        budget.delta,
        budget.group_size,
        f"budget of {budget.path}, with all {len(plans)} runs that are still to begin,",
    )


def _plans(configs: Sequence[Config], shape: Shape) -> list[Plan]:
    """What each run does to the private images; runs alike are calibrated once."""
    known: dict[str, Plan] = {}
    plans = []
    for c in configs:
        privacy = c.privacy.model_copy(update={"insecure_seed": None})
        alike = repr((privacy, c.private, c.moments, c.data.records, c.stages.variant in USE_MOMENTS and c.stages))
        plans.append(known.get(alike) or known.setdefault(alike, make_plan(c, shape)))
    return plans


# ---------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class StepTimes:
    """What was measured for one network and shape, on one device.

    Seconds a noisy image of a `public` step and of a `private` (DP-SGD) one, 0 where there is no network; seconds an
    image and `sampling` step; `flops` of training on one noisy image, forward and backward; seconds an image of all
    queries of DP `moments`.
    """

    public: float
    private: float
    sampling: float
    flops: float
    moments: float = 0.0


@dataclass
class Estimate:
    """Seconds of one process that has the `device` to itself, or on a CPU, core-seconds.

    `public` networks are each trained once and shared; `private` is DP-SGD and DP moments; `evaluation` features and
    classifiers; `flops` are floating-point operations of the training.
    """

    device: str
    public: float = 0.0
    private: float = 0.0
    sampling: float = 0.0
    evaluation: float = 0.0
    flops: float = 0.0

    @property
    def total(self) -> float:
        return self.public + self.private + self.sampling + self.evaluation

    def gpu_hours(self, teraflops: float = GPU_TERAFLOPS) -> float:
        """GPU-hours of the training, at an assumed rate."""
        return self.flops / (teraflops * 1e12) / 3600

    def to_dict(self, teraflops: float = GPU_TERAFLOPS) -> dict[str, Any]:
        """JSON-able."""
        return {
            "seconds": {k: getattr(self, k) for k in ("public", "private", "sampling", "evaluation", "total")},
            "training_flops": self.flops,
            "device": self.device,
            "gpu_hours": self.gpu_hours(teraflops),
            "gpu_teraflops_assumed": teraflops,
        }


def measure(config: Config, shape: Shape, device: str = "cpu") -> StepTimes:
    """Run a few steps of each kind on images of noise, in a folder that is removed; batches are cut to seconds."""
    config = with_batch(config, shape.records)
    copies, public_copies = config.private.copies, config.public.copies
    flops = _flops(make_denoiser(config, shape, conditional=True, seed=0), shape)
    noisy = min(max(round(_FLOPS / flops), _FEWEST), _MOST)
    batch = max(2, min(config.private.batch, noisy // copies))
    public_batch = max(2, min(config.public.batch, noisy // public_copies))
    stages, n = stages_of(config), 4 * batch
    if stages.moments:
        # So many that what moments take whatever the number of images counts for little.
        n = max(n, min(shape.records, _MOST_IMAGES, _NUMBERS // (shape.channels * shape.resolution**2)))
    labels = np.arange(n, dtype=np.int64) % shape.num_classes if shape.num_classes else None
    dataset = ImageDataset(coarse_noise(n, shape), labels, shape.class_names, "noise")
    # The noise is seeded: the images are no images, and the run is thrown away.
    target = config.privacy.epsilon if stages.moments and math.isfinite(config.privacy.epsilon) else 10.0
    variant = config.stages.variant if stages.gaussian else "residual-cleaning" if stages.moments else "both"
    few = {"warmup": 0, "checkpoint_every": 10}
    changes = {
        "data": {"source": "noise", "records": None, "resolution": shape.resolution},
        "privacy": {"epsilon": target, "delta": 1e-6, "insecure_seed": 0, "budget": None, "group_size": 1},
        "stages": {"variant": variant, "pretrain": None, "networks": "experts", "tau_cleaning": -3, "tau_coarse": 2},
        "public": {"steps": 3, "batch": public_batch, **few},
        "private": {"steps": 5, "batch": batch, **few},
    }
    taken: dict[str, list[float]] = {"public": [], "private": [], MOMENTS: []}
    now_is = _clock(device)
    last = now_is()

    def on_event(event: Event) -> None:
        nonlocal last
        if isinstance(event, Step):
            # The first step of a phase builds and measures things.
            if event.phase == MOMENTS or event.step > 1:
                part = MOMENTS if event.phase == MOMENTS else "private" if event.private else "public"
                taken[part].append(now_is() - last)
            last = now_is()

    with tempfile.TemporaryDirectory(prefix="dpsyngen-estimate-") as folder:
        settings = validate(merge_settings(config.model_dump(), changes))
        training = fit.prepare(settings, Path(folder) / "run", dataset, device, on_event=on_event)
        last = now_is()
        fit.carry_out(training)
        generator = ReleasedGenerator(training.run.release, device)
        count = 16
        generator.sample(2, steps=1, sampler="ddim")
        begun = now_is()
        generator.sample(count, steps=2, sampler="ddim")
        drawing = (now_is() - begun) / (2 * count)
    public, private = (min(taken[part], default=0.0) for part in ("public", "private"))  # no steps without a network
    moments = sum(taken[MOMENTS]) / n
    return StepTimes(public / (public_batch * public_copies), private / (batch * copies), drawing, flops, moments)


def _clock(device: str) -> Callable[[], float]:
    """What an experiment counts: core-seconds on a CPU, which mean the same on a busy machine; else seconds."""

    def wall() -> float:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return time.process_time if device == "cpu" else wall


def _flops(denoiser: NetworkDenoiser, shape: Shape) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    batch = make_noisy(
        torch.zeros(1, shape.channels, shape.resolution, shape.resolution),
        None,
        NoiseLevels(-1.2, 1.2),
        copies=1,
        num_classes=denoiser.num_classes,
        label_dropout=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    with FlopCounterMode(display=False) as counter:
        denoising_loss(denoiser, batch).sum().backward()
    return float(counter.get_total_flops())


def estimate(spec: Spec, jobs: Sequence[Job], shape: Shape, device: str = "cpu") -> Estimate:
    """Time of all `jobs` together, none of them begun.

    Raises:
        ConfigError: a setting is not allowed.
    """
    times: dict[str, StepTimes] = {}
    known: set[str] = set()
    found = Estimate(device)
    for c in (with_batch(job.config, shape.records) for job in jobs if job.config is not None):
        stages = stages_of(c)
        sizes = (c.network.size, c.private.copies, c.public.copies, min(c.private.batch, 64), c.program.name)
        # The noise decides how many frequencies the moments are cut to, and so their time.
        of_moments = (c.privacy.epsilon, c.moments.share, c.moments.rank) if stages.moments else ()
        signature = repr((stages.gaussian and c.stages.variant, *sizes, *of_moments))
        if signature not in times:
            times[signature] = measure(c, shape, device)
        t = times[signature]
        new = {network.key for network in networks_of(c, stages, shape)} - known
        known |= new
        public = len(new) * c.public.steps * c.public.batch * c.public.copies
        private = 0 if stages.gaussian else c.private.steps * c.private.batch * c.private.copies
        found.public += public * t.public
        found.private += private * t.private + (shape.records * t.moments if stages.moments else 0.0)
        found.flops += (public + private) * t.flops
        steps = (spec.sampling.steps or c.sampling.steps) if stages.networks else 1
        evaluations = 2 * steps - 1 if (spec.sampling.sampler or c.sampling.sampler) == "heun" else steps
        found.sampling += spec.sampling.images * evaluations * t.sampling
    if runs := sum(job.kind == "run" for job in jobs):
        found.evaluation = runs * _evaluation_seconds(spec, shape, device)
    return found


def _evaluation_seconds(spec: Spec, shape: Shape, device: str) -> float:
    """Features and classifiers of one run, from a few hundred images of noise."""
    e, count, generated = spec.evaluation, 200, spec.sampling.images
    images, labels = coarse_noise(count, shape), np.arange(count, dtype=np.int64) % max(shape.num_classes, 1)
    now_is = _clock(device)

    def seconds_per_image(work: Callable[[], Any]) -> float:
        begun = now_is()
        work()
        return (now_is() - begun) / count

    seconds = 0.0
    for name in e.features:
        if name == "inception" and e.inception_weights is None:
            continue  # it would have to be downloaded first
        weights = None if e.inception_weights is None or name != "inception" else Path(e.inception_weights)
        extractor = FeatureSpec(name, weights).make(device)
        extractor.fit(images)
        seconds += seconds_per_image(partial(extractor, images)) * min(e.max_images, generated)
    for name in e.classifiers if shape.num_classes > 1 else ():
        options: dict[str, Any] = {"num_classes": shape.num_classes, "classifiers": (name,), "device": device}
        score = partial(classification_accuracy, images, labels, images, labels, **options)
        score(epochs=1)  # leaves out what is done once, such as loading
        epochs = 5 if name == "logreg" else default_epochs(name, round((1 - HELD_OUT) * generated))
        seconds += seconds_per_image(partial(score, epochs=5)) * generated * epochs / 5
    return seconds


def hours(seconds: float, core: str = "") -> str:
    """In words; `core` is put before the unit."""
    if seconds < 90:
        return f"{seconds:.0f} {core}seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} {core}minutes"
    return f"{seconds / 3600:.1f} {core}hours" if seconds < 360_000 else f"{seconds / 3600:,.0f} {core}hours"


def coarse_noise(count: int, shape: Shape) -> NDArray[np.uint8]:
    """[count, C, H, W], noise in squares of two by two pixels: neighbours that agree, as those of pictures do."""
    half = -(-shape.resolution // 2)
    squares = np.random.default_rng(0).integers(0, 256, (count, shape.channels, half, half), dtype=np.uint8)
    return squares.repeat(2, 2).repeat(2, 3)[:, :, : shape.resolution, : shape.resolution]
