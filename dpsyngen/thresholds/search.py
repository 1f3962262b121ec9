"""Which noise levels may programs own?  Measured with denoisers that saw public images only.

Denoisers are trained on each family of programs (and on a public proxy, if there is one) and compared on the images of
each: see :mod:`dpsyngen.thresholds.gap`.  Nobody may look at the private images without paying, so something stands in
for them:

1. the other families of programs (always),
2. a public proxy that the user declares to resemble them, by its Wiener filter and by networks trained on it, or
3. the private images themselves, through the Gaussian mechanism (:mod:`dpsyngen.thresholds.private`).

The first family is the one that a training would use; its curve against the last of these that is there decides.

Where a training would have DP moments and a prior, programs own by the prior, and each stand-in has moments: its
networks start from the prior that is shown them, as the private one does.  The prior as it was is held against them for
the cleaning stage, and the Wiener filter for the coarse one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser, NetworkDenoiser
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.errors import ConfigError
from dpsyngen.thresholds.denoisers import (
    PRIOR,
    PROXY,
    WIENER,
    Family,
    GivenImages,
    PublicDenoisers,
    wiener_filter,
)
from dpsyngen.thresholds.gap import (
    METHODS,
    SIDES,
    Array,
    Elbow,
    GapCurve,
    MeanCurve,
    Method,
    Pair,
    Side,
    find_elbow,
    mean_curve,
    measure,
    seeded_noise,
)
from dpsyngen.thresholds.private import gap_weights, public_clipping_norm, weighted_vectors

StandIn = Literal["programs", "wiener", "proxy", "private"]
"""The most direct one last."""


class Tell(Protocol):
    """Progress: what is being done, how many units are done, of how many, and the unit's name in the plural."""

    def __call__(self, title: str, done: int, total: int, unit: str) -> None: ...


@dataclass
class Measured:
    """All that was measured.

    Attributes:
        log_sigma: [M].
        curves: programs in place of others ("programs"), of the proxy's Wiener filter ("wiener") and of networks that
            were trained on it ("proxy"), and networks in place of others of their own family ("floor"); on private
            images, with noise, the student in place of the teacher ("private").  With a prior, that and the Wiener
            filter of each stand-in are what is in place of others.
        clipping_norm: C that public images suggest for a private estimate.
    """

    log_sigma: Array
    curves: list[GapCurve] = field(default_factory=list)
    clipping_norm: float = 1.0

    def of(self, stand_in: str) -> list[GapCurve]:
        """The curves of one kind."""
        return [c for c in self.curves if c.stand_in == stand_in]


@dataclass
class StageSearch:
    """Trains what is needed and measures.

    The first family, or the prior, is the `student`, and the proxy, or else the second family, the `teacher` of a
    private estimate.
    ConfigError if nothing would stand in for the private images, or two families are called the same.
    """

    families: Sequence[Family]  # programs, the one that a training would use first
    proxy: Family | None  # public images that the user gives, with some held out
    networks: PublicDenoisers  # where trained networks come from
    seeds: int  # networks of each family; their seeds are 0, 1, …
    images: int  # of each source, to measure on
    log_sigma: tuple[float, ...]  # M levels

    def __post_init__(self) -> None:
        labels = [f.label for f in self.families]
        taken = (PROXY, WIENER, PRIOR)
        if len({*labels, *taken}) != len(labels) + len(taken):
            raise ConfigError(
                f"the families are called {', '.join(labels)}, but each needs a name of its own other than "
                f"{', '.join(taken)}."
            )
        if not labels or (len(labels) == 1 and self.proxy is None):
            raise ConfigError(
                "something has to stand in for the private images: give two programs or more (--programs "
                "dead-leaves,contours), or public images that resemble them (--proxy)."
            )
        self.all_families = [*self.families, *([] if self.proxy is None else [self.proxy])]
        self.student, self.teacher = self.families[0].label, self.proxy or self.families[1]
        if self.networks.prior is not None:
            # Programs own by the prior: there is one of it, and a proxy leaves nothing for other stand-ins to say.
            self.student, self.all_families = PRIOR, self.all_families if self.proxy is None else [self.proxy]

    def compared_on_private(self, trained: Mapping[tuple[str, int], NetworkDenoiser]) -> dict[str, NetworkDenoiser]:
        """Teacher and student of a private estimate, by name."""
        teacher = trained[self.teacher.label, 0]
        if self.student != PRIOR:
            return {self.teacher.label: teacher, self.student: trained[self.student, 0]}
        return {self.teacher.label: teacher, PRIOR: self.networks.reading(self.networks.filter(self.teacher))}

    def train(self, tell: Tell) -> dict[tuple[str, int], NetworkDenoiser]:
        """All networks, by family and seed; those that are there are read."""
        out: dict[tuple[str, int], NetworkDenoiser] = {}
        steps = self.networks.config.public.steps
        for family, seed in itertools.product(self.all_families, range(self.seeds)):
            told = partial(tell, f"training on {family.label}, seed {seed}", total=steps, unit="steps")
            out[family.label, seed] = self.networks.get(family, seed, told)
        return out

    def measure(self, trained: Mapping[tuple[str, int], Denoiser], tell: Tell) -> Measured:
        """Compare all networks on the images of each family."""
        result = Measured(np.array(self.log_sigma))
        weights = gap_weights(self.log_sigma, self.networks.config.network.sigma_data)
        vectors: list[Tensor] = []
        for family in self.all_families:
            images = torch.from_numpy(np.array(family.measuring_images(self.images))).to(self.networks.device)
            denoisers: dict[str, Denoiser] = {f"{label}/{seed}": d for (label, seed), d in trained.items()}
            asked: Pair = (f"{self.teacher.label}/0", f"{self.student}/0")  # what a private estimate will compare
            if self.student == PRIOR:
                wiener, asked = self.networks.filter(family), (f"{family.label}/0", PRIOR)
                denoisers = {f"{family.label}/{s}": trained[family.label, s] for s in range(self.seeds)}
                denoisers |= {WIENER: wiener, PRIOR: self.networks.reading(wiener)}
            elif isinstance(family.program, GivenImages) and (its := wiener_filter(family.program.images)):
                denoisers[WIENER] = its.to(self.networks.device)
            compared = self._compared(family, WIENER in denoisers)
            answers = measure(
                denoisers,
                to_float(images),
                self.log_sigma,
                [*(pair for *_, pairs in compared for pair in pairs), asked],
                seeded_noise(tuple(images.shape[1:]), seed=0),
                workers=self.networks.workers,
                on_progress=partial(tell, f"measuring on images of {family.label}", total=len(images), unit="images"),
            )
            for stand_in, teacher, student, pairs in compared:
                gap = np.stack([answers.gaps[pair] for pair in pairs])
                losses = (np.stack([answers.losses[pair[who]] for pair in pairs]) for who in (0, 1))
                result.curves.append(GapCurve(stand_in, teacher, student, gap, *losses))
            if self.proxy is None or family is self.proxy:
                vectors.append(weighted_vectors(answers, asked, weights))
        result.clipping_norm = public_clipping_norm(vectors)
        return result

    def _compared(self, family: Family, filtered: bool) -> list[tuple[str, str, str, list[Pair]]]:
        """(stand-in, teacher, student, pairs of networks) of all comparisons on the images of a family.

        `filtered`: there is a Wiener filter of it.
        """
        own, seeds = family.label, range(self.seeds)
        others = {f.label: [f"{f.label}/{s}" for s in seeds] for f in self.families if f is not family}
        if self.student == PRIOR:
            others = {name: [name for _ in seeds] for name in (PRIOR, WIENER)}  # there is one of each
        stand_in = PROXY if family is self.proxy else "programs"
        out = [(stand_in, own, o, [(f"{own}/{s}", n) for s, n in enumerate(names)]) for o, names in others.items()]
        if filtered and family is self.proxy:
            others.pop(WIENER, None)
            out += [(WIENER, WIENER, o, [(WIENER, n) for n in dict.fromkeys(names)]) for o, names in others.items()]
        if self.seeds > 1:
            # Each network against the next of its family; two networks make one pair.
            count = self.seeds if self.seeds > 2 else 1
            pairs = [(f"{own}/{s}", f"{own}/{(s + 1) % self.seeds}") for s in range(count)]
            out.append(("floor", own, own, pairs))
        return out


# ------------------------------------------------------------------------------------- what follows from it


@dataclass(frozen=True)
class StandInElbows:
    """The elbows of one student against one stand-in for the private images."""

    by: StandIn
    student: str  # label of the family
    mean: MeanCurve
    elbows: Mapping[tuple[Side, Method], Elbow]


def stand_in_elbows(measured: Measured, tolerance: float, replicates: int) -> list[StandInElbows]:
    """The elbows of every student against every stand-in, the most direct stand-in last.

    `tolerance` is the relative gap or excess that is allowed, `replicates` the number of those of the bootstrap.
    """
    out = []
    for by in get_args(StandIn):
        for student in dict.fromkeys(c.student for c in measured.of(by)):
            mean = mean_curve([c for c in measured.of(by) if c.student == student], replicates)
            elbows = {}
            for side, method in itertools.product(SIDES, METHODS):
                estimate = mean.excess if method == "loss" else mean.relative
                elbows[side, method] = find_elbow(measured.log_sigma, *estimate, side, method, tolerance)
            out.append(StandInElbows(by, student, mean, elbows))
    return out


def deciding(found: Sequence[StandInElbows], student: str) -> StandInElbows:
    """The elbows that decide: of `student`, against the most direct stand-in there is."""
    return [f for f in found if f.student == student][-1]
