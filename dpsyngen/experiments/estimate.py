"""How long an experiment will take: a few steps of each kind are run on noise, and the rest is arithmetic.

A step's time is taken to be linear in its images, which holds well for batches beyond a few dozen: per image it is
measured on a batch that a CPU can do in seconds, also where the planned batch has thousands.  On a machine without a
GPU the GPU-hours come from counted floating-point operations and an assumed rate, and say so.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpsyngen import fit as api
from dpsyngen.config import Config, validate, with_batch
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import denoising_loss, make_noisy
from dpsyngen.diffusion.noise_levels import NoiseLevels
from dpsyngen.experiments.grid import Job
from dpsyngen.experiments.moments_time import MomentsTime, coarse_noise
from dpsyngen.experiments.public_networks import networks_of
from dpsyngen.experiments.spec import Spec
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.training.moments_phase import MOMENTS
from dpsyngen.training.networks import make_denoiser
from dpsyngen.training.plan import Shape, stages_of

GPU_TERAFLOPS = 3.0
"""Sustained rate that GPU-hours assume, in 10^12 floating-point operations a second.

DPDM's published MNIST runs (1.5 million parameters, batch 4096, K = 32, 300 epochs) took 70 A100-hours and more
(METHOD.md); by our count of operations that is what such small networks keep of an A100's 19.5 (docs/comparing.md).
"""

_FEWEST, _MOST, _FLOPS = 16, 128, 1e11  # noisy images of a measured step: as many as a CPU core does in some seconds


@dataclass(frozen=True)
class StepTimes:
    """What was measured for one network and shape, on one device.

    Attributes:
        public: seconds a noisy image of a public step; 0 where there is no network.
        private: seconds a noisy image of a DP-SGD step; 0 where there is no network.
        sampling: seconds an image and sampler step.
        flops: floating-point operations of training on one noisy image, forward and backward.
    """

    public: float
    private: float
    sampling: float
    flops: float


@dataclass(frozen=True)
class Estimate:
    """Seconds of one process that has the device to itself, or on a CPU, core-seconds.

    Attributes:
        public: public networks, each trained once and shared.
        private: DP-SGD, and DP moments.
        sampling: drawing images.
        evaluation: features and classifiers.
        private_flops, public_flops: floating-point operations of the training.
        device: what was measured.
    """

    public: float
    private: float
    sampling: float
    evaluation: float
    public_flops: float
    private_flops: float
    device: str

    @property
    def total(self) -> float:
        return self.public + self.private + self.sampling + self.evaluation

    def gpu_hours(self, teraflops: float = GPU_TERAFLOPS) -> float:
        """GPU-hours of the training, at an assumed rate."""
        return (self.public_flops + self.private_flops) / (teraflops * 1e12) / 3600

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "seconds": {
                "public": self.public,
                "private": self.private,
                "sampling": self.sampling,
                "evaluation": self.evaluation,
                "total": self.total,
            },
            "training_flops": {"public": self.public_flops, "private": self.private_flops},
            "device": self.device,
            "gpu_hours": self.gpu_hours(),
            "gpu_teraflops_assumed": GPU_TERAFLOPS,
        }


def measure(config: Config, shape: Shape, device: str = "cpu") -> StepTimes:
    """Run a few steps of each kind on images of noise, in a folder that is removed afterwards.

    Args:
        config: whose network and steps; batches are cut to what takes seconds.
        shape: of the images.
        device: where.
    """
    config = with_batch(config, shape.records)
    copies = config.private.copies
    flops = _flops(make_denoiser(config, shape, conditional=True, seed=0), shape)
    noisy = min(max(round(_FLOPS / flops), _FEWEST), _MOST)
    batch = max(2, min(config.private.batch, noisy // copies))
    public_batch = max(2, min(config.public.batch, noisy // config.public.copies))
    n = 4 * batch
    images = coarse_noise(n, shape)
    labels = np.arange(n, dtype=np.int64) % shape.num_classes if shape.num_classes else None
    dataset = ImageDataset(images, labels, shape.class_names, "noise")
    values = config.model_dump()
    values["data"] |= {"source": "noise", "records": None, "resolution": shape.resolution}
    # The noise is seeded: the images are no images, and the run is thrown away.
    values["privacy"] |= {"epsilon": 10.0, "delta": 1e-6, "insecure_seed": 0, "budget": None, "group_size": 1}
    stages = stages_of(config)
    variant = "gaussian" if stages.gaussian else "residual-cleaning" if stages.moments else "both"
    values["stages"] |= {"variant": variant, "pretrain": None, "networks": "experts"}
    values["stages"] |= {"tau_cleaning": -3.0, "tau_coarse": 2.0}
    values["public"] |= {"steps": 3, "batch": public_batch, "warmup": 0, "checkpoint_every": 10}
    values["private"] |= {"steps": 5, "batch": batch, "warmup": 0, "checkpoint_every": 10}
    taken: dict[str, list[float]] = {}
    now_is = _clock(device)
    with tempfile.TemporaryDirectory(prefix="dpsyngen-estimate-") as folder:
        training = api.prepare(validate(values), Path(folder) / "run", dataset, device)
        name = training.plan.stages.private.name
        last = now_is()
        for p in training.steps():
            now = now_is()
            # The first of a phase builds and measures things; moments are measured with as many images as there are.
            if p.step > 1 and p.phase != MOMENTS:
                taken.setdefault("private" if p.phase == name else "public", []).append(now - last)
            last = now_is()
        generator = ReleasedGenerator(training.run.release, device)
        count = 16
        generator.sample(2, steps=1, sampler="ddim")
        begun = now_is()
        generator.sample(count, steps=2, sampler="ddim")
        drawing = (now_is() - begun) / (2 * count)
    public, private = (min(taken.get(part, [0.0])) for part in ("public", "private"))  # no steps without a network
    return StepTimes(public / (public_batch * config.public.copies), private / (batch * copies), drawing, flops)


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
    with contextlib.redirect_stdout(io.StringIO()), FlopCounterMode(display=False) as counter:
        denoising_loss(denoiser, batch).sum().backward()
    return float(counter.get_total_flops())


def estimate(spec: Spec, jobs: Sequence[Job], shape: Shape, device: str = "cpu") -> Estimate:
    """Time of all `jobs` together, none of them begun.

    Raises:
        ConfigError: a setting is not allowed.
    """
    times: dict[str, StepTimes] = {}
    moments = MomentsTime(_clock(device))
    known: set[str] = set()
    public = private = sampling = evaluation = public_flops = private_flops = 0.0
    for job in jobs:
        if job.config is None:
            continue
        c = with_batch(job.config, shape.records)
        stages = stages_of(c)
        kind = (stages.moments, stages.gaussian)
        sizes = (c.network.size, c.private.copies, c.public.copies, min(c.private.batch, 64), c.program.name)
        signature = repr((*kind, *sizes))
        if signature not in times:
            times[signature] = measure(c, shape, device)
        t = times[signature]
        for network in networks_of(c, stages, shape):
            if network.key not in known:
                known.add(network.key)
                noisy = c.public.steps * c.public.batch * c.public.copies
                public += noisy * t.public
                public_flops += noisy * t.flops
        private += moments.of(c, shape)
        if not stages.gaussian:
            noisy = c.private.steps * c.private.batch * c.private.copies
            private += noisy * t.private
            private_flops += noisy * t.flops
        steps = 1 if stages.gaussian else spec.sampling.steps or c.sampling.steps
        evaluations = 2 * steps - 1 if (spec.sampling.sampler or c.sampling.sampler) == "heun" else steps
        sampling += spec.sampling.images * evaluations * t.sampling
    measured = [job for job in jobs if job.kind in ("run", "programs")]
    if measured:
        evaluation = len(measured) * _evaluation_seconds(spec, shape, device)
    return Estimate(public, private, sampling, evaluation, public_flops, private_flops, device)


def _evaluation_seconds(spec: Spec, shape: Shape, device: str) -> float:
    """Features and classifiers of one run, from a few hundred images of noise."""
    from dpsyngen.evaluation import FeatureSpec, classification_accuracy
    from dpsyngen.evaluation.cas import HELD_OUT, default_epochs

    e, count = spec.evaluation, 200
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, shape.channels, shape.resolution, shape.resolution), dtype=np.uint8)
    seconds, now_is = 0.0, _clock(device)
    for name in e.features:
        if name == "inception" and e.inception_weights is None:
            continue  # it would have to be downloaded first
        weights = None if e.inception_weights is None or name != "inception" else Path(e.inception_weights)
        extractor = FeatureSpec(name, weights).make(device)
        extractor.fit(images)
        begun = now_is()
        extractor(images)
        seconds += (now_is() - begun) / count * min(e.max_images, spec.sampling.images)
    if shape.num_classes > 1:
        labels = np.arange(count, dtype=np.int64) % shape.num_classes
        made = round((1 - HELD_OUT) * spec.sampling.images)

        def train(name: str, epochs: int) -> float:
            begun = now_is()
            classification_accuracy(
                images,
                labels,
                images,
                labels,
                num_classes=shape.num_classes,
                classifiers=(name,),
                epochs=epochs,
                device=device,
            )
            return now_is() - begun

        for name in e.classifiers:
            if name == "logreg":
                seconds += train(name, 1) / count * spec.sampling.images
            else:
                # The difference leaves out what is done once, such as compiling and scoring.
                train(name, 1)
                epoch = max(train(name, 6) - train(name, 1), 0.0) / 5 / count
                seconds += epoch * spec.sampling.images * default_epochs(name, made)
    return seconds


def hours(seconds: float, core: str = "") -> str:
    """In words; `core` is put before the unit."""
    if seconds < 90:
        return f"{seconds:.0f} {core}seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} {core}minutes"
    return f"{seconds / 3600:.1f} {core}hours" if seconds < 360_000 else f"{seconds / 3600:,.0f} {core}hours"
