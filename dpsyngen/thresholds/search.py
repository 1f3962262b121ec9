"""Which noise levels may programs own?  Measured with denoisers that saw public images only.

Denoisers are trained on each family of programs (and on a public proxy, if there is one) and compared on the images of
each: see :mod:`dpsyngen.thresholds.gap`.  Nobody may look at the private images without paying, so something stands in
for them:

1. the other families of programs (always),
2. a public proxy that the user declares to resemble them, by its Wiener filter and by networks trained on it, or
3. the private images themselves, through the Gaussian mechanism (:mod:`dpsyngen.thresholds.private`).

The first family is the one that a training would use; its curve against the last of these that is there decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser, NetworkDenoiser
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.errors import ConfigError
from dpsyngen.thresholds.denoisers import (
    PROXY,
    WIENER,
    ZERO,
    Family,
    GivenImages,
    PublicDenoisers,
    ZeroInformation,
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
from dpsyngen.thresholds.private import PrivateCurve, gap_weights, public_clipping_norm, weighted_vectors

StandIn = Literal["programs", "wiener", "proxy", "private"]
BINS: tuple[tuple[str, float, float], ...] = (
    ("below -3", -np.inf, -3.0),
    ("-3 to -1", -3.0, -1.0),
    ("-1 to 0", -1.0, 0.0),
    ("0 to 2", 0.0, 2.0),
    ("above 2", 2.0, np.inf),
)
"""Pieces of the log σ axis in which losses are averaged."""


class Tell(Protocol):
    """Progress: what is being done, how many units are done, of how many, and the unit's name in the plural."""

    def __call__(self, title: str, done: int, total: int, unit: str) -> None: ...


_NOISE_SEED = 0


@dataclass
class Measured:
    """All that was measured without private images.

    Attributes:
        log_sigma: [M].
        pixels: d, of an image.
        curves: programs in place of others ("programs"), of the proxy's Wiener filter ("wiener") and of networks that
            were trained on it ("proxy"), and networks in place of others of their own family ("floor").
        proxy_losses: on the held-out proxy images, [S, N, M]: of each family's networks, and of the predictors that
            know moments of the proxy, S = 1; {} without a proxy.
        clipping_norm: C that public images suggest for a private estimate.
    """

    log_sigma: Array
    pixels: int
    curves: list[GapCurve] = field(default_factory=list)
    proxy_losses: dict[str, Array] = field(default_factory=dict)
    clipping_norm: float = 1.0


class StageSearch:
    """Trains what is needed and measures.

    Args:
        families: programs, the one that a training would use first.
        proxy: public images that the user gives, with some held out; or None.
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
        proxy: Family | None,
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
        self.all_families = self.families if proxy is None else (*self.families, proxy)
        self.student = self.families[0]
        # What the student is compared with on private images.
        self.teacher = self.families[1] if proxy is None else proxy

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
        shape = self.networks.shape
        result = Measured(np.array(self.log_sigma), shape.channels * shape.resolution**2)
        asked: Pair = (f"{self.teacher.label}/0", f"{self.student.label}/0")  # what a private estimate will compare
        weights = gap_weights(self.log_sigma, self.networks.config.network.sigma_data)
        vectors: list[Tensor] = []
        for family in self.all_families:
            images = family.measuring_images(self.images)
            denoisers: dict[str, Denoiser] = {f"{label}/{seed}": d for (label, seed), d in trained.items()}
            if isinstance(family.program, GivenImages):
                denoisers[ZERO] = ZeroInformation(family.program.images)
                if (wiener := wiener_filter(family.program.images)) is not None:
                    denoisers[WIENER] = wiener.to(self.networks.device)
            compared = self._compared(family, WIENER in denoisers)
            answers = measure(
                denoisers,
                to_float(torch.from_numpy(np.array(images)).to(self.networks.device)),
                self.log_sigma,
                [*(pair for *_, pairs in compared for pair in pairs), asked],
                seeded_noise(tuple(images.shape[1:]), _NOISE_SEED),
                workers=self.networks.workers,
                on_progress=partial(tell, f"measuring on images of {family.label}", total=len(images), unit="images"),
            )
            for stand_in, teacher, student, pairs in compared:
                squares = (
                    [answers.gaps[pair] for pair in pairs],
                    [answers.losses[a] for a, _ in pairs],
                    [answers.losses[b] for _, b in pairs],
                )
                result.curves.append(GapCurve(stand_in, teacher, student, *map(np.stack, squares)))
            if self.proxy is None or family is self.proxy:
                vectors.append(weighted_vectors(answers, asked, weights))
            if ZERO in denoisers:
                names = {f.label: [f"{f.label}/{s}" for s in range(self.seeds)] for f in self.all_families}
                names |= {name: [name] for name in (ZERO, WIENER) if name in denoisers}
                result.proxy_losses = {k: np.stack([answers.losses[n] for n in v]) for k, v in names.items()}
        result.clipping_norm = public_clipping_norm(vectors)
        return result

    def _compared(self, family: Family, wiener: bool) -> list[tuple[str, str, str, list[Pair]]]:
        """(stand-in, teacher, student, pairs of networks) of all comparisons on the images of a family."""
        own, seeds = family.label, range(self.seeds)
        others = [f.label for f in self.families if f is not family]
        stand_in = PROXY if family is self.proxy else "programs"
        out = [(stand_in, own, o, [(f"{own}/{s}", f"{o}/{s}") for s in seeds]) for o in others]
        if wiener:
            out += [(WIENER, WIENER, o, [(WIENER, f"{o}/{s}") for s in seeds]) for o in others]
        if self.seeds > 1:
            # Each network against the next of its family; two networks make one pair.
            count = self.seeds if self.seeds > 2 else 1
            pairs = [(f"{own}/{s}", f"{own}/{(s + 1) % self.seeds}") for s in range(count)]
            out.append(("floor", own, own, pairs))
        return out


# ------------------------------------------------------------------------------------- what follows from it


@dataclass(frozen=True)
class StandInElbows:
    """The elbows of one student against one stand-in for the private images.

    Attributes:
        by: what stands in for the private images.
        student: label of the family.
        mean: relative gap and excess, averaged over networks.
        elbows: by (side, method).
    """

    by: StandIn
    student: str
    mean: MeanCurve
    elbows: Mapping[tuple[Side, Method], Elbow]


def stand_in_elbows(
    measured: Measured, tolerance: float, replicates: int, private: tuple[str, PrivateCurve] | None = None
) -> list[StandInElbows]:
    """The elbows of every student against every stand-in, the most direct stand-in last.

    Args:
        measured: see :class:`StageSearch`.
        tolerance: relative gap that the method "tolerance" allows.
        replicates: of the bootstrap.
        private: label of the student of a private estimate, and the estimate.
    """
    means: list[tuple[StandIn, str, MeanCurve]] = []
    stand_ins: tuple[StandIn, ...] = ("programs", "wiener", "proxy")
    for by in stand_ins:
        curves = [c for c in measured.curves if c.stand_in == by]
        for student in dict.fromkeys(c.student for c in curves):
            means.append((by, student, mean_curve([c for c in curves if c.student == student], replicates)))
    if private is not None:
        means.append(("private", private[0], private[1].mean_curve(replicates)))
    out = []
    for by, student, mean in means:
        elbows = {}
        for side, method in itertools.product(SIDES, METHODS):
            estimate = mean.excess if method == "loss" else mean.relative
            elbows[side, method] = find_elbow(measured.log_sigma, *estimate, side, method, tolerance)
        out.append(StandInElbows(by, student, mean, elbows))
    return out


def deciding(found: Sequence[StandInElbows], student: str, moments: bool = False) -> StandInElbows:
    """The elbows that decide: of `student`, against the most direct stand-in there is.

    With `moments` a training has the private images' mean and covariance, so programs must be better than what follows
    from these in closed form: they are held against the Wiener filter, where there is one.
    """
    mine = [f for f in found if f.student == student]
    return next((f for f in mine if f.by == WIENER), mine[-1]) if moments else mine[-1]


def proxy_loss_rows(measured: Measured, replicates: int) -> list[dict[str, Any]]:
    """How well each family's networks, and the Wiener filter, denoise the proxy; [] without a proxy.

    Returns:
        a row for each family ("proxy" for the networks trained on it) and each of ``BINS``: the loss over that of the
        zero-information predictor, with a 95 % interval over images and seeds, over that of the proxy's networks, and
        over that of the Wiener filter (unless there are too many pixels); means over the levels.
    """
    losses = dict(measured.proxy_losses)
    if not losses:
        return []
    zero = losses.pop(ZERO)[0]
    over = {"over_zero": zero.mean(0), "over_proxy": losses[PROXY].mean((0, 1))}
    if WIENER in losses:
        over["over_wiener"] = losses[WIENER].mean((0, 1))
    rng = np.random.default_rng(0)
    # The bootstrap: images by multinomial weights, the same for all families, then seeds.
    weights = rng.multinomial(len(zero), np.full(len(zero), 1 / len(zero)), size=replicates) / len(zero)
    rows = []
    for name, values in losses.items():
        seeds = rng.integers(len(values), size=(replicates, len(values)))
        drawn = np.einsum("bn,snm->bsm", weights, values)
        drawn = np.take_along_axis(drawn, seeds[:, :, None], 1).mean(1) / (weights @ zero)
        mean = values.mean((0, 1))
        for title, low, high in BINS:
            inside = (measured.log_sigma >= low) & (measured.log_sigma < high)
            if not inside.any():
                continue
            ends = np.percentile(drawn[:, inside].mean(1), [2.5, 97.5]) if replicates else (np.nan, np.nan)
            row = {"family": name, "log_sigma": title, "seeds": len(values)}
            row |= {column: float((mean / loss)[inside].mean()) for column, loss in over.items()}
            rows.append(row | {"over_zero_low": float(ends[0]), "over_zero_high": float(ends[1])})
    return rows
