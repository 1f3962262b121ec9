"""Which noise levels may programs own?  Measured with denoisers that saw public images only.

Denoisers are trained on each family of programs (and on a public proxy, if there is one) and compared on the images of
each: see :mod:`dpsyngen.thresholds.gap`.  What the private images are like, nobody may look at without paying, so
something stands in for them:

1. the other families of programs (always),
2. a public proxy that the user declares to resemble them, or
3. the private images themselves, through the Gaussian mechanism (:mod:`dpsyngen.thresholds.private_gap`).

The first family is the one that a training would use; its curve against the last of the three that is there decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen.diffusion.denoiser import Denoiser, NetworkDenoiser, loss_weight
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.thresholds.denoisers import Family, GivenImages, PublicDenoisers
from dpsyngen.thresholds.gap import Answers, GapCurve, measure, seeded_noise
from dpsyngen.thresholds.private_gap import public_clipping_norm, weighted_vectors
from dpsyngen.thresholds.references import Moments, WienerFilter, wiener_loss, zero_information_loss
from dpsyngen.thresholds.results import PROXY, WIENER, Measured

_NOISE_SEED = 0


@dataclass(frozen=True)
class Proxy:
    """Public images that the user declares to resemble the private ones.

    Attributes:
        family: what the proxy's network is trained on.
        held_out: other images, to measure on, uint8 [N, C, H, W].
    """

    family: Family
    held_out: NDArray[np.uint8]


def split_proxy(images: NDArray[np.uint8], measured: int, resolution: int, channels: int) -> Proxy:
    """Set aside `measured` of the images, chosen by a fixed public seed.

    Raises:
        DataError: there are fewer than twice as many.
    """
    if len(images) < 2 * measured:
        raise DataError(
            f"the proxy has {len(images):,} images, but {measured:,} are set aside for measuring and at least as many "
            "are needed for training.  Give more images, or measure on fewer: --images."
        )
    order = np.random.default_rng(0).permutation(len(images))
    kept = np.ascontiguousarray(images[np.sort(order[measured:])])
    program = GivenImages(resolution=resolution, channels=channels, images=kept)
    return Proxy(Family(PROXY, program), np.ascontiguousarray(images[np.sort(order[:measured])]))


Tell = Callable[[str, int, int, str], None]
"""Progress: what is being done, how many units are done, of how many, and the unit's name in the plural."""


class StageSearch:
    """Trains what is needed and measures.

    Args:
        families: programs, the one that a training would use first.
        proxy: public images, or None.
        networks: where trained networks come from.
        seeds: networks of each family; their seeds are 0, 1, …
        images: of each source, to measure on.
        log_sigma: M levels.

    Raises:
        ConfigError: nothing would stand in for the private images, or two families are called the same.
    """

    def __init__(
        self,
        families: Sequence[Family],
        proxy: Proxy | None,
        networks: PublicDenoisers,
        *,
        seeds: int,
        images: int,
        log_sigma: tuple[float, ...],
    ) -> None:
        labels = [f.label for f in families]
        if len(set(labels)) != len(labels) or PROXY in labels:
            raise ConfigError(
                f"the families are called {', '.join(labels)}, but each needs a name of its own other than {PROXY!r}."
            )
        if not families or (len(families) == 1 and proxy is None):
            raise ConfigError(
                "something has to stand in for the private images: give two programs or more (--programs "
                "dead-leaves,contours), or public images that resemble them (--proxy)."
            )
        self.families, self.proxy, self.networks = tuple(families), proxy, networks
        self.seeds, self.images, self.log_sigma = seeds, images, log_sigma

    @property
    def student(self) -> Family:
        """The family that a training would use."""
        return self.families[0]

    @property
    def teacher(self) -> Family:
        """The family that the student is compared with on private images: the proxy, or else the second one."""
        return self.families[1] if self.proxy is None else self.proxy.family

    @property
    def all_families(self) -> tuple[Family, ...]:
        return self.families if self.proxy is None else (*self.families, self.proxy.family)

    def train(self, tell: Tell) -> dict[tuple[str, int], NetworkDenoiser]:
        """All networks, by family and seed; those that are there are read."""
        out: dict[tuple[str, int], NetworkDenoiser] = {}
        steps = self.networks.config.public.steps
        for family, seed in itertools.product(self.all_families, range(self.seeds)):
            title = f"training on {family.label}, seed {seed}"

            def on_progress(step: int, loss: float, title: str = title) -> None:
                tell(title, step, steps, "steps")

            out[family.label, seed] = self.networks.get(family, seed, on_progress)
        return out

    def measure(self, trained: Mapping[tuple[str, int], NetworkDenoiser], tell: Tell) -> Measured:
        """Compare all networks on the images of each family."""
        result = Measured(np.array(self.log_sigma), self.networks.shape.channels * self.networks.shape.resolution**2)
        vectors = []
        for family in self.all_families:
            is_proxy = self.proxy is not None and family is self.proxy.family
            images = self._images(family)
            moments = Moments.of(family.program.images) if isinstance(family.program, GivenImages) else None
            answers = self._answers(trained, family, images, moments, tell)
            curves = [self._curve(answers, family, other) for other in self.families if other is not family]
            (result.proxy if is_proxy else result.programs).extend(curves)
            if self.seeds > 1:
                result.floors.append(self._floor(answers, family))
            if is_proxy or self.proxy is None:
                pair = (f"{self.teacher.label}/0", f"{self.student.label}/0")
                weights = loss_weight(
                    torch.tensor(self.log_sigma, dtype=torch.float64).exp(), self.networks.config.network.sigma_data
                )
                vectors.append(weighted_vectors(answers, pair, weights))
            if moments is not None:
                self._add_proxy_losses(result, answers, images, moments)
        result.clipping_norm = public_clipping_norm(vectors)
        return result

    def _images(self, family: Family) -> NDArray[np.uint8]:
        if self.proxy is not None and family is self.proxy.family:
            return self.proxy.held_out
        return family.measuring_images(self.images)

    def _answers(
        self,
        trained: Mapping[tuple[str, int], NetworkDenoiser],
        family: Family,
        images: NDArray[np.uint8],
        moments: Moments | None,
        tell: Tell,
    ) -> Answers:
        device = self.networks.device
        denoisers: dict[str, Denoiser] = {f"{label}/{seed}": d for (label, seed), d in trained.items()}
        others = [f for f in self.families if f is not family]
        pairs = [(f"{family.label}/{s}", f"{o.label}/{s}") for o in others for s in range(self.seeds)]
        pairs += _floor_pairs(family.label, self.seeds)
        # The private estimate compares the teacher with the student, on whatever images.
        pairs.append((f"{self.teacher.label}/0", f"{self.student.label}/0"))
        if moments is not None and moments.covariance is not None:
            denoisers[WIENER] = WienerFilter(moments, device)
            pairs += [(WIENER, f"{o.label}/{s}") for o in others for s in range(self.seeds)]
        title = f"measuring on images of {family.label}"
        return measure(
            denoisers,
            to_float(torch.from_numpy(np.array(images)).to(device)),
            self.log_sigma,
            pairs,
            seeded_noise(tuple(images.shape[1:]), _NOISE_SEED),
            run=self.networks.workers.map,
            on_progress=lambda done: tell(title, done, len(images), "images"),
        )

    def _curve(self, answers: Answers, teacher: Family, student: Family) -> GapCurve:
        pairs = [(f"{teacher.label}/{s}", f"{student.label}/{s}") for s in range(self.seeds)]
        return _curve(answers, teacher.label, teacher.label, student.label, pairs)

    def _floor(self, answers: Answers, family: Family) -> GapCurve:
        return _curve(answers, family.label, family.label, family.label, _floor_pairs(family.label, self.seeds))

    def _add_proxy_losses(
        self, result: Measured, answers: Answers, images: NDArray[np.uint8], moments: Moments
    ) -> None:
        for family in self.all_families:
            losses = [answers.losses[f"{family.label}/{s}"] for s in range(self.seeds)]
            result.proxy_losses[family.label] = np.stack(losses)
        result.zero_loss = zero_information_loss(images, moments, self.log_sigma)
        result.wiener_loss = wiener_loss(images, moments, self.log_sigma)
        if WIENER in answers.losses:
            for student in self.families:
                pairs = [(WIENER, f"{student.label}/{s}") for s in range(self.seeds)]
                result.wiener.append(_curve(answers, PROXY, WIENER, student.label, pairs))


def _floor_pairs(label: str, seeds: int) -> list[tuple[str, str]]:
    """Each network against the next of its family; two networks make one pair."""
    count = seeds if seeds > 2 else seeds - 1
    return [(f"{label}/{s}", f"{label}/{(s + 1) % seeds}") for s in range(count)]


def _curve(answers: Answers, images: str, teacher: str, student: str, pairs: Sequence[tuple[str, str]]) -> GapCurve:
    return GapCurve(
        images,
        teacher,
        student,
        answers.log_sigma,
        np.stack([answers.gaps[pair] for pair in pairs]),
        np.stack([answers.losses[a] for a, _ in pairs]),
        np.stack([answers.losses[b] for _, b in pairs]),
    )
