"""A trained generator: everything it needs is in the release half of a run, so a copy of that folder is enough."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen.diffusion.denoiser import (
    UNIFORM_PRIOR_SIGMA,
    Denoiser,
    GuidedDenoiser,
    NetworkDenoiser,
    PreconditionedDenoiser,
)
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.diffusion.residual import ResidualDenoiser
from dpsyngen.diffusion.samplers import Observer, Start, Step, evenly_in_log, karras_steps, sample_batches, to_uint8
from dpsyngen.diffusion.stages import GAUSSIAN, Stage, StagedDenoiser
from dpsyngen.diffusion.start import sampling_start
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.generator_file import GeneratorDescription, load_weights, moments_shapes, read_description
from dpsyngen.sampling_settings import SamplingSettings
from dpsyngen.shown import listed, printable, shown


@dataclass(frozen=True)
class Samples:
    """Generated images.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], or None.
        class_names: names of the classes.
        settings: sampler, steps, seed, guidance: enough to draw them again.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Trajectory:
    """How some images came about, at K of the sampler's steps, from pure noise to the image.

    Attributes:
        sigmas: [K] noise levels, from σ_max down to σ_min.
        stages: [K] the stage that owns each.
        noisy: uint8 [K, N, C, H, W], what the sampler had, dimmed by σ_d/√(σ² + σ_d²) with σ_d = √(1/3), so that it is
            not saturated.
        denoised: uint8 [K, N, C, H, W], D(x; σ): the images that were expected of it.
        samples: the images that it became, as :meth:`Generator.sample` gives them.
    """

    sigmas: tuple[float, ...]
    stages: tuple[Stage, ...]
    noisy: NDArray[np.uint8]
    denoised: NDArray[np.uint8]
    samples: Samples


class Generator:
    """Draws images.

    Args:
        release: the ``release`` folder of a run, or a copy of it.  It may come from a stranger: nothing in it is run,
            and it is checked before memory is taken for it (see :mod:`dpsyngen.generator_file`).
        device: where to compute.

    Raises:
        RunError: not a finished release, or damaged.

    Attributes:
        class_names: () if unconditional.
        stages: who answers at which noise level.
        networks: the denoiser of each network.
        gaussian: the denoiser of the DP moments; None if there are none.
    """

    def __init__(self, release: str | os.PathLike[str], device: str = "cpu") -> None:
        self.device = device
        release = Path(release)
        about, self.stages = read_description(release)
        self.resolution, self.channels = about.resolution, about.channels
        self.class_names: tuple[str, ...] = tuple(about.class_names)
        self.defaults: dict[str, Any] = about.sampling.model_dump()
        self.private = about.private
        # None: an earlier version did not say.
        self._label_dropout = about.label_dropout
        self.gaussian = self._load_gaussian(release, about)
        self.networks: dict[str, NetworkDenoiser] = {n: self._load(release, about, n) for n in self.stages.networks}

    def _load_gaussian(self, release: Path, about: GeneratorDescription) -> GaussianDenoiser | None:
        if about.moments is None:
            return None
        path = release / "weights" / f"{GAUSSIAN}.safetensors"
        tensors = load_weights(path, moments_shapes(about))
        try:
            moments = ClassGaussians.from_tensors(tensors)
        except ConfigError as error:
            raise RunError(f"the weights {printable(path)} are damaged: {error}") from None
        return GaussianDenoiser(moments, (about.channels, about.resolution, about.resolution)).to(self.device)

    def _load(self, release: Path, about: GeneratorDescription, name: str) -> NetworkDenoiser:
        classes = len(self.class_names) if about.conditional[name] else 0
        gaussian = self.gaussian if name == self.stages.private.network else None
        inputs = None if gaussian is None else 2 * about.channels

        def make() -> UNet:
            return UNet(about.network.size, about.resolution, about.channels, classes, inputs)

        def around(unet: UNet) -> NetworkDenoiser:
            if gaussian is None:
                return PreconditionedDenoiser(unet, classes, about.network.sigma_data)
            return ResidualDenoiser(unet, classes, gaussian)

        with torch.device("meta"):
            unet = make()
        expected = {f"network.{k}": v for k, v in unet.state_dict().items()}
        weights = load_weights(release / "weights" / f"{name}.safetensors", expected)
        denoiser = around(make())
        denoiser.load_state_dict(weights)
        return denoiser.to(self.device).eval()

    def denoiser(self, guidance: float = 1.0) -> StagedDenoiser:
        """The staged denoiser, with classifier-free guidance of the private stage if asked for."""
        denoisers: dict[str, Denoiser] = dict(self.networks)
        if self.gaussian is not None:
            denoisers[GAUSSIAN] = self.gaussian
        private = denoisers[self.stages.private.network]
        return StagedDenoiser(
            self.stages,
            denoisers,
            private=GuidedDenoiser(private, guidance) if self.class_names and guidance != 1 else None,
        )

    def _start(self, s: SamplingSettings) -> tuple[int, float, Start | None]:
        """Steps, the noise level where they start, and what draws there; see :func:`sampling_start`."""
        sigma, start = sampling_start(self.stages, self.gaussian, s.sigma_min, s.sigma_max)
        # Where all is Gaussian images are drawn at σ_min, and a single step takes that noise off.
        return 1 if self.stages.gaussian else s.steps, sigma, start

    def labels(self, count: int, classes: Sequence[int | str] | None = None) -> NDArray[np.int64] | None:
        """Labels for `count` images: all classes (or those given, by name or number) in turn; None if unconditional."""
        if not self.class_names:
            if classes is not None:
                raise ConfigError("this generator has no classes, so none can be chosen.")
            return None
        chosen = range(len(self.class_names)) if classes is None else [self._class(c) for c in classes]
        if not chosen:
            raise ConfigError("no class was given.")
        return np.array([chosen[i % len(chosen)] for i in range(count)], dtype=np.int64)

    def _class(self, given: int | str) -> int:
        if isinstance(given, str) and given in self.class_names:
            return self.class_names.index(given)
        try:
            number = int(given)
        except (ValueError, TypeError, OverflowError):
            number = -1
        if not 0 <= number < len(self.class_names):
            raise ConfigError(
                f"there is no class {shown(given)}; the classes are {listed(self.class_names)} (or 0 to "
                f"{len(self.class_names) - 1})."
            )
        return number

    def settings(
        self,
        *,
        seed: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        churn: float | None = None,
    ) -> SamplingSettings:
        """How to draw: the run's own settings where None is given; see :class:`SamplingSettings`.

        Raises:
            ConfigError: a value that is not allowed, or guidance by a network that cannot give it.
        """
        d = self.defaults
        if guidance not in (None, 1) and self.class_names and self.networks and self._label_dropout == 0:
            raise ConfigError(
                f"guidance is {shown(guidance)}, but this generator's network always saw the class of an image "
                "(network.label_dropout = 0), so there is nothing to compare with: use guidance 1."
            )
        name = sampler or d["sampler"]
        if churn is None:
            # A churn set for the run belongs to its sampler; asking for another sampler drops it.
            churn = d["churn"] if name == d["sampler"] else 0.0
        return SamplingSettings(
            sampler=name,
            steps=d["steps"] if steps is None else steps,
            sigma_min=d["sigma_min"],
            sigma_max=d["sigma_max"],
            rho=d["rho"],
            guidance=d["guidance"] if guidance is None else guidance,
            churn=churn,
            seed=seed,
        )

    def stream(
        self,
        count: int,
        settings: SamplingSettings | None = None,
        *,
        labels: NDArray[np.int64] | None = None,
        batch_size: int = 256,
    ) -> Iterator[NDArray[np.uint8]]:
        """Draw `count` images batch by batch, so that any number fits in memory.

        Args:
            count: how many.
            settings: from :meth:`settings`; None: the run's.
            labels: [count] a class for each image; None: no class is asked for.
            batch_size: images at a time.

        Yields:
            uint8 [n, C, H, W].

        Raises:
            ConfigError: a value that is not allowed.
        """
        for batch in self._batches(count, settings or self.settings(), labels, batch_size):
            yield batch.numpy()

    def _batches(
        self,
        count: int,
        s: SamplingSettings,
        labels: NDArray[np.int64] | None,
        batch_size: int,
        observe: Observer | None = None,
    ) -> Iterator[torch.Tensor]:
        if count < 1:
            raise ConfigError(f"the number of images is {count}, but must be at least 1.")
        if labels is not None:
            if len(labels) != count:
                raise ConfigError(f"{len(labels)} labels were given for {count} images.")
            if labels.min() < 0 or labels.max() >= len(self.class_names):
                raise ConfigError(f"labels must lie in 0 to {len(self.class_names) - 1}.")
        options: dict[str, Any] = {"churn": s.churn} if s.churn else {}
        steps, sigma_max, start = self._start(s)
        return sample_batches(
            self.denoiser(s.guidance),
            None if labels is None else torch.from_numpy(labels),
            count,
            (self.channels, self.resolution, self.resolution),
            sampler=s.sampler,
            steps=steps,
            sigma_min=s.sigma_min,
            sigma_max=sigma_max,
            rho=s.rho,
            seed=s.seed,
            batch_size=batch_size,
            device=self.device,
            observe=observe,
            start_from=start,
            **options,
        )

    def sample(
        self,
        count: int,
        *,
        labels: NDArray[np.int64] | None = None,
        classes: Sequence[int | str] | None = None,
        batch_size: int = 256,
        on_progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> Samples:
        """Draw `count` images into memory; free of privacy cost, however many.

        Args:
            count: how many.
            labels: [count] a class for each image; None: `classes` in turn, balanced.
            classes: which classes, by name or number; None: all.
            batch_size: images at a time.
            on_progress: called with (images done, images in all).
            settings: ``seed``, ``sampler``, ``steps``, ``guidance``, ``churn``, as for :meth:`settings`.

        Raises:
            ConfigError: a value that is not allowed.
        """
        chosen = self.settings(**settings)
        if labels is None:
            labels = self.labels(max(count, 0), classes)
        out = []
        done = 0
        for batch in self.stream(count, chosen, labels=labels, batch_size=batch_size):
            out.append(batch)
            done += len(batch)
            if on_progress:
                on_progress(done, count)
        return Samples(np.concatenate(out), labels, self.class_names, asdict(chosen))

    def trajectory(
        self, count: int, columns: int = 9, *, labels: NDArray[np.int64] | None = None, **settings: Any
    ) -> Trajectory:
        """Draw `count` images and keep what the sampler saw on its way; free of privacy cost, as samples are.

        Args:
            count: how many; they are drawn in one batch.
            columns: how many steps to keep, evenly in log σ; fewer where the sampler has fewer.
            labels: as for :meth:`sample`.
            settings: as for :meth:`sample`.

        Raises:
            ConfigError: a value that is not allowed.
        """
        s = self.settings(**settings)
        count_steps, sigma_max, _ = self._start(s)
        kept = evenly_in_log(karras_steps(count_steps, s.sigma_min, sigma_max, s.rho), columns)
        if labels is None:
            labels = self.labels(max(count, 0))
        steps: list[tuple[float, NDArray[np.uint8], NDArray[np.uint8]]] = []

        def observe(step: Step) -> None:
            if step.index in kept:
                dimmed = step.x * (UNIFORM_PRIOR_SIGMA / math.hypot(step.sigma, UNIFORM_PRIOR_SIGMA))
                steps.append((step.sigma, to_uint8(dimmed).cpu().numpy(), to_uint8(step.denoised).cpu().numpy()))

        (images,) = self._batches(count, s, labels, max(count, 1), observe)
        sigmas, noisy, denoised = zip(*steps, strict=True)
        return Trajectory(
            sigmas=sigmas,
            stages=tuple(self.stages.owner(math.log(sigma)) for sigma in sigmas),
            noisy=np.stack(noisy),
            denoised=np.stack(denoised),
            samples=Samples(images.numpy(), labels, self.class_names, asdict(s)),
        )
