"""A trained generator: everything it needs is in the release half of a run, so a copy of that folder is enough."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dpsyngen.config import ComputeConfig
from dpsyngen.console import Console, html_table
from dpsyngen.diffusion.denoiser import UNIFORM_PRIOR_SIGMA, Denoiser, NetworkDenoiser
from dpsyngen.diffusion.samplers import Observer, Step, evenly_in_log, to_uint8
from dpsyngen.diffusion.sampling import SamplingSettings
from dpsyngen.diffusion.stages import GAUSSIAN, StagedDenoiser
from dpsyngen.errors import ConfigError, DpsyngenError, ReleaseError, RunError, listed, printable, require, shown
from dpsyngen.files import read_yaml_file
from dpsyngen.full_precision import ordinary_modes
from dpsyngen.generator.classes import asked_for, check_count, check_in_memory, in_turn
from dpsyngen.generator.files import Place, load_gaussian, load_network, read_description
from dpsyngen.generator.guarantee import Guarantee
from dpsyngen.generator.samples import Samples, Trajectory
from dpsyngen.hardware import choose


class SamplerOptions(TypedDict, total=False):
    """Keywords of :meth:`ReleasedGenerator.settings`, which all that draws takes."""

    seed: int | None
    sampler: str | None
    steps: int | None
    guidance: float | None
    churn: float | None


class ReleasedGenerator:
    """Draws images from a release; :class:`dpsyngen.Generator` adds training, loading and saving.

    Args:
        release: the ``release`` folder of a run, or a copy of it.  It may come from a stranger: nothing in it is run,
            and it is checked before memory is taken for it (see :mod:`dpsyngen.generator.files`).
        device: where to compute: "cpu", "cuda", "cuda:1", …, or "auto".
        compute: precision, memory format, compiling; None: all automatic.  They change the last digits of images.

    Raises:
        RunError: not a finished release, or damaged.

    Attributes:
        class_names: () if unconditional.
        private: whether there is a privacy guarantee; :attr:`privacy` has all of it.
        place: where it is on the disk.
        stages: who answers at which noise level.
        networks: the denoiser of each network.
        gaussian: the denoiser of the DP moments; None if there are none.
    """

    @ordinary_modes()
    def __init__(
        self, release: str | os.PathLike[str], device: str = "cpu", compute: ComputeConfig | None = None
    ) -> None:
        self.compute = choose(device, compute)
        self.device = device = self.compute.device
        release = Path(release)
        self.place = Place.of_release(release)
        about, self.stages = read_description(release)
        self.resolution, self.channels = about.resolution, about.channels
        self.class_names: tuple[str, ...] = tuple(about.class_names)
        self.defaults = SamplingSettings(**about.sampling.model_dump())
        self.private = about.private
        # None: an earlier version did not say.
        self._label_dropout = about.label_dropout
        self.gaussian = load_gaussian(release, about, device)
        self.networks: dict[str, NetworkDenoiser] = {
            name: load_network(release, about, name, self.gaussian if name in self.stages.reading else None, device)
            for name in self.stages.networks
        }
        for network in self.networks.values():
            self.compute.prepare(network)
            self.compute.compiled(network.network)

    @property
    def privacy(self) -> Guarantee:
        """The guarantee, from the certificate; ReleaseError if that is damaged or contradicts the generator."""
        guarantee = Guarantee.read(self.place.release)
        if guarantee.private != self.private:
            where = printable(self.place.release)
            raise ReleaseError(
                f"privacy.json and generator.json in {where} contradict each other: one says private, the other NOT "
                "PRIVATE.  Do not rely on it."
            )
        return guarantee

    @property
    def parameters(self) -> int:
        """Parameters of all networks together; those of DP moments are not counted."""
        return sum(p.numel() for network in self.networks.values() for p in network.parameters())

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings of the training, all of them public, as scikit-learn's estimators give theirs.

        With `deep` they are flat, ``{"private__steps": 300, …}``, else nested, as ``fit(…, settings=…)`` takes them.
        """
        path = self.place.release / "config.yaml"
        nested = read_yaml_file(path, "the configuration")
        if not isinstance(nested, dict):
            raise RunError(f"{printable(path)} holds no settings.")
        if not deep:
            return nested
        flat: dict[str, Any] = {}
        for section, values in nested.items():
            flat |= {f"{section}__{k}": v for k, v in values.items()} if isinstance(values, dict) else {section: values}
        return flat

    def _about(self) -> dict[str, str]:
        trainers = {"public": "programs", "private": "DP-SGD", "moments": "DP moments", "prior": "programs"}
        try:
            privacy = self.privacy.line
        except DpsyngenError as error:
            privacy = f"UNKNOWN, so NOT PRIVATE: {error}"
        return {
            "images": f"{self.channels}x{self.resolution}x{self.resolution}",
            "classes": f"{len(self.class_names)}: {listed(self.class_names, 10)}" if self.class_names else "none",
            "stages": ", ".join(f"{s.name} ({trainers[s.trainer]})" for s in reversed(self.stages.stages)),
            "parameters": f"{self.parameters:,}",
            "privacy": privacy,
            "where": printable(self.place.path),
        }

    def __repr__(self) -> str:
        return "\n".join(["Generator", *(f"  {name:<10}  {text}" for name, text in self._about().items())])

    def _repr_html_(self) -> str:
        return html_table(self._about().items())

    def denoiser(self, guidance: float = 1.0) -> StagedDenoiser:
        """The staged denoiser, with classifier-free guidance of the private stage if asked for."""
        denoisers: dict[str, Denoiser] = dict(self.networks)
        if self.gaussian is not None:
            denoisers[GAUSSIAN] = self.gaussian
        staged = StagedDenoiser(self.stages, denoisers)
        return staged if guidance == 1 else staged.guided(guidance)

    def labels(self, count: int, classes: Sequence[int | str] | None = None) -> NDArray[np.int64] | None:
        """Labels for `count` images: all classes (or those given, by name or number) in turn; None if unconditional."""
        return in_turn(count, self.class_names, classes)

    def settings(
        self,
        *,
        seed: int | None = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        churn: float | None = None,
    ) -> SamplingSettings:
        """How to draw, see :class:`SamplingSettings`: the run's own settings where None is given.

        Args:
            seed: public; None: a random one, which the result tells.
            sampler, steps, guidance, churn: None: as the run says.

        Raises:
            ConfigError: a value that is not allowed, or guidance by a network that cannot give it, as without classes.
        """
        know = any(network.num_classes for network in self.networks.values())
        if guidance not in (None, 1) and know and self._label_dropout == 0:
            raise ConfigError(
                f"guidance is {shown(guidance)}, but this generator's network always saw the class of an image "
                "(network.label_dropout = 0), so there is nothing to compare with: use guidance 1."
            )
        if guidance not in (None, 1, self.defaults.guidance) and not know:
            lacks = "network that knows classes" if self.class_names else "classes"
            raise ConfigError(f"guidance is {shown(guidance)}, but this generator has no {lacks}: leave guidance out.")
        if churn is None and sampler not in (None, self.defaults.sampler):
            churn = 0.0  # a churn set for the run belongs to its sampler
        seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
        given = {"seed": seed, "sampler": sampler, "steps": steps, "guidance": guidance, "churn": churn}
        return SamplingSettings(**self.defaults.model_dump() | {k: v for k, v in given.items() if v is not None})

    def stream(
        self,
        count: int,
        settings: SamplingSettings | None = None,
        *,
        labels: NDArray[np.int64] | None = None,
        batch_size: int = 256,
        take: slice = slice(None),
        observe: Observer | None = None,
    ) -> Iterator[NDArray[np.uint8]]:
        """Draw `count` images batch by batch, uint8 [n, C, H, W], so that any number fits in memory.

        Args:
            count: how many.
            settings: from :meth:`settings`; None: the run's.
            labels: [count] a class for each image; None: no class is asked for.
            batch_size: images at a time.
            take: which of the batches, by number; default: all.
            observe: is shown each step of the sampler.
        """
        require(count >= 1, "the number of images", count, "at least 1")
        check_count(count)
        if labels is not None:
            if len(labels) != count:
                raise ConfigError(f"{len(labels)} labels were given for {count} images.")
            if labels.min() < 0 or labels.max() >= len(self.class_names):
                raise ConfigError(f"labels must lie in 0 to {len(self.class_names) - 1}.")
        batches = (settings or self.settings()).draw(
            self.denoiser(),
            (self.channels, self.resolution, self.resolution),
            None if labels is None else torch.from_numpy(labels),
            count,
            batch_size=batch_size,
            device=self.device,
            observe=observe,
            take=take,
        )
        # In the modes and the precision that drawing needs, which must not leak into the caller between two batches.
        while True:
            with ordinary_modes(), self.compute.autocast():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch.numpy()

    def sample(
        self,
        count: int | None = None,
        labels: ArrayLike | None = None,
        *,
        classes: Sequence[int | str] | None = None,
        batch_size: int = 256,
        progress: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
        **settings: Unpack[SamplerOptions],
    ) -> Samples:
        """Draw images into memory; free of privacy cost, however many.

        Args:
            count: how many; None: one for each of `labels`.
            labels: a class for each image, by name or by number, or one class for all; None: `classes` in turn,
                balanced.  Numbers count :attr:`class_names` from 0, as ``Samples.labels`` do.
            classes: which classes, by name or number; None: all.
            batch_size: images at a time.
            progress: show a progress bar.
            on_progress: called with (images done, images in all).
            settings: `seed`, `sampler`, `steps`, `guidance` and `churn`, see :meth:`settings`.  Image i depends on the
                seed, i and its label alone, so the same call draws the same images, and a larger `count` more of them.

        Raises:
            ConfigError: a value that is not allowed.
        """
        chosen = self.settings(**settings)
        count, drawn = asked_for(count, labels, classes, self.class_names)
        check_in_memory(count, self.channels * self.resolution**2)
        out: list[NDArray[np.uint8]] = []
        done = 0
        with Console(quiet=not progress).progress("sampling", count, "images") as bar:
            for batch in self.stream(count, chosen, labels=drawn, batch_size=batch_size):
                out.append(batch)
                done += len(batch)
                bar.update(done)
                if on_progress:
                    on_progress(done, count)
        return Samples(np.concatenate(out), drawn, self.class_names, chosen.model_dump(), self.private)

    @ordinary_modes()
    def trajectory(
        self,
        count: int,
        columns: int = 9,
        *,
        labels: ArrayLike | None = None,
        **settings: Unpack[SamplerOptions],
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
        kept = evenly_in_log(s.levels(self.denoiser())[0], columns)
        count, drawn = asked_for(count, labels, None, self.class_names)
        steps: list[tuple[float, NDArray[np.uint8], NDArray[np.uint8]]] = []

        def observe(step: Step) -> None:
            if step.index in kept:
                dimmed = step.x * (UNIFORM_PRIOR_SIGMA / math.hypot(step.sigma, UNIFORM_PRIOR_SIGMA))
                steps.append((step.sigma, to_uint8(dimmed).cpu().numpy(), to_uint8(step.denoised).cpu().numpy()))

        (images,) = self.stream(count, s, labels=drawn, batch_size=count, observe=observe)
        sigmas, noisy, denoised = zip(*steps, strict=True)
        return Trajectory(
            sigmas=sigmas,
            stages=tuple(self.stages.owner(math.log(sigma)) for sigma in sigmas),
            noisy=np.stack(noisy),
            denoised=np.stack(denoised),
            samples=Samples(images, drawn, self.class_names, s.model_dump(), self.private),
        )
