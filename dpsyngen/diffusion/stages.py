"""Stages: who trains which noise levels, and which network answers there.

A :class:`StageMap` cuts the log σ axis into pieces.  The published variants (DPDM, FineTune, Cleaning, Coarse), their
union (Both) and ours (Gaussian, Instant, Residual) are values of this one type.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser, GuidedDenoiser
from dpsyngen.errors import ConfigError, require

Trainer = Literal["public", "private", "moments", "prior"]
Networks = Literal["experts", "shared"]
Pretrain = bool | Literal["matched"]

_TRAINERS: dict[str, tuple[Trainer | None, Trainer, Trainer | None]] = {
    "dpdm": (None, "private", None),
    "finetune": (None, "private", None),
    "cleaning": ("public", "private", None),
    "coarse": (None, "private", "public"),
    "both": ("public", "private", "public"),
    "gaussian": (None, "moments", None),
    "instant": (None, "prior", "moments"),
    "residual": ("prior", "private", "moments"),
}
"""For each variant who trains below τ_cleaning, in between and above τ_coarse; None: there is no such stage."""

TAU_COARSE = {"instant": -0.3, "residual": 1.5}
"""τ_coarse where none is given (2 for others): below it the network does better than the moments (docs/prior.md)."""

VARIANTS = tuple(_TRAINERS)
USE_MOMENTS = tuple(variant for variant, trainers in _TRAINERS.items() if "moments" in trainers)
"""Variants that release DP moments of the private images, see :mod:`dpsyngen.diffusion.gaussian`."""

GAUSSIAN = "gaussian"
"""Name of what answers where DP moments are all that is known: no network, but it has weights of that name."""


def coarse_of(variant: str, given: float | None) -> float:
    """τ_coarse as it is given, or by the variant: ``TAU_COARSE``, else the paper's 2."""
    return TAU_COARSE.get(variant, 2.0) if given is None else given


@dataclass(frozen=True)
class Stage:
    """One piece of the log σ axis.

    Attributes:
        name: "coarse", "context" or "cleaning"; "gaussian" where it is the only one.
        low, high: its ends in log σ; -inf at the clean end, inf at the noisy end.
        trainer: "public" (programmatic images only), "private" (DP-SGD on private images) or "moments" (DP moments of
            private images, from which the optimal denoiser of a Gaussian follows in closed form) or "prior" (a network
            that programs trained to read such moments, :mod:`dpsyngen.diffusion.prior`).
        network: name of the network that owns the piece; ``GAUSSIAN`` where none does.
    """

    name: str
    low: float
    high: float
    trainer: Trainer
    network: str


@dataclass(frozen=True)
class StageMap:
    """A partition of the log σ axis, from the clean end to the noisy end.

    The thresholds themselves belong to the private stage: τ_cleaning <= log σ <= τ_coarse.

    Attributes:
        stages: adjacent pieces that cover (-inf, inf), exactly one of them private; or none, but moments are used.
        pretrain: whether the private network starts from training on programmatic images: at all σ, or "matched", at
            those of its own stage alone.
    """

    stages: tuple[Stage, ...]
    pretrain: Pretrain = False

    def __post_init__(self) -> None:
        s = self.stages
        if not s or s[0].low != -math.inf or s[-1].high != math.inf:
            raise ConfigError("the stages must cover the whole log σ axis, from -inf to inf.")
        for below, above in itertools.pairwise(s):
            if below.high != above.low or not below.low < below.high:
                raise ConfigError(f"stages {below.name!r} and {above.name!r} must meet at one log σ, ascending.")
        if sum(stage.trainer == "private" for stage in s) != 1 and not self.gaussian:
            raise ConfigError("exactly one stage must be trained on private images.")
        if len({stage.name for stage in s}) != len(s):
            raise ConfigError("each stage needs a name of its own.")
        if any((stage.trainer == "moments") != (stage.network == GAUSSIAN) for stage in s):
            raise ConfigError(f"stages of moments, and no others, are answered by {GAUSSIAN!r}.")

    @property
    def private(self) -> Stage:
        """The stage that private images train by DP-SGD; where their moments are all that is used, the lowest stage."""
        return next((s for s in self.stages if s.trainer == "private"), self.stages[0])

    @property
    def gaussian(self) -> bool:
        """Whether DP moments are all that is used of the private images: no step of DP-SGD."""
        return sorted(s.trainer for s in self.stages) in (["moments"], ["moments", "prior"])

    @property
    def moments(self) -> bool:
        """Whether DP moments of the private images are used."""
        return any(s.trainer == "moments" for s in self.stages)

    @property
    def public(self) -> tuple[Stage, ...]:
        """The stages that programmatic images train."""
        return tuple(s for s in self.stages if s.trainer == "public")

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks, each once, the private one last."""
        last = self.private.network
        names = dict.fromkeys(s.network for s in self.stages if s.network not in (GAUSSIAN, last))
        return (*names, *(() if last == GAUSSIAN else (last,)))

    @property
    def reading(self) -> frozenset[str]:
        """Names of the networks that are shown the DP moments: not those that programmatic images train."""
        return frozenset(s.network for s in self.stages if self.moments and s.trainer in ("private", "prior"))

    def owner(self, log_sigma: float) -> Stage:
        """The stage that `log_sigma` belongs to; a threshold itself belongs to the private stage."""
        for stage in (self.private, *reversed(self.stages)):
            if stage.low <= log_sigma <= stage.high:
                return stage
        raise ValueError(f"log σ = {log_sigma} is not a number.")


def stage_map(
    variant: str,
    *,
    tau_cleaning: float = -3.0,
    tau_coarse: float | None = None,
    networks: Networks = "experts",
    pretrain: Pretrain | None = None,
    prior: bool = True,
) -> StageMap:
    """The stage map of a variant of DP-SynGen (arXiv 2412.09842).

    Args:
        variant: of the paper "dpdm", "finetune", "cleaning", "coarse"; "both" of the last two.  Ours: "gaussian"
            (DP moments alone), "instant" (DP moments above τ_coarse, below a network that programs trained to read
            moments), "residual" (DP moments above τ_coarse, that network below τ_cleaning; in between it is the start
            of the private one, which learns what the moments lack).
        tau_cleaning: log σ below which programmatic images train.
        tau_coarse: log σ above which programmatic images train or DP moments answer; None: by ``TAU_COARSE``.
        networks: "experts" (a network for each stage: the public ones never see a private gradient) or "shared"
            (one network that takes public steps at public stages and DP steps at the private one).
        pretrain: start the private network from programmatic training at all σ, or ("matched") at those of its own
            stage alone.  None: what the variant says (only FineTune does, at all σ).
        prior: whether there is a network that programs trained to read moments; "residual" without one has no cleaning
            stage, and its private network starts at what the moments say.

    Raises:
        ConfigError: unknown variant, τ_cleaning >= τ_coarse, or networks or pretrain that the variant cannot have.
    """
    require(variant in VARIANTS, "variant", variant, VARIANTS)
    tau_coarse = coarse_of(variant, tau_coarse)
    for name, tau in (("tau_cleaning", tau_cleaning), ("tau_coarse", tau_coarse)):
        require(math.isfinite(tau), name, tau, "a finite log σ (choose another variant for no threshold)")
    below, middle, above = _TRAINERS[variant]
    if variant == "residual" and not prior:
        below = None
    if below is not None and above is not None and not tau_cleaning < tau_coarse:
        raise ConfigError(
            f"tau_cleaning = {tau_cleaning} must be below tau_coarse = {tau_coarse}: between them lies the stage that "
            "private images train."
        )
    require(networks in ("experts", "shared"), "networks", networks, "'experts' or 'shared'")
    if pretrain is False and variant == "finetune":
        raise ConfigError("variant 'finetune' is pre-training; without it choose 'dpdm'.")
    if middle != "private" and pretrain:
        raise ConfigError(f"variant {variant!r} has no network that could be pre-trained.")
    if variant == "residual" and networks == "shared":
        raise ConfigError(
            f"variant {variant!r} has a network of its own for each stage: use networks = 'experts'.  One that learns "
            "what the moments of the private images lack is no denoiser of programmatic ones."
        )
    if variant == "residual" and pretrain:
        raise ConfigError(
            f"variant {variant!r} starts its private network at the denoiser of the moments, so it cannot start from "
            "programmatic images, too: leave pretrain out, or choose 'dpdm', 'cleaning', 'coarse' or 'both'."
        )
    low = -math.inf if below is None else tau_cleaning
    high = math.inf if above is None else tau_coarse
    stages: list[Stage] = []
    for name, start, end, trainer in (
        ("cleaning", -math.inf, low, below),
        ("gaussian" if middle == "moments" else "context", low, high, middle),
        ("coarse", high, math.inf, above),
    ):
        if trainer is not None:
            own = "shared" if networks == "shared" else name
            network = {"moments": GAUSSIAN, "prior": "prior"}.get(trainer, own)
            stages.append(Stage(name, start, end, trainer, network))
    return StageMap(tuple(stages), pretrain=variant == "finetune" if pretrain is None else pretrain)


class StagedDenoiser:
    """A Denoiser made of Denoisers: each row is answered by the network that owns its σ.

    Labels do not reach the public stages: programmatic images have none, so the network that answers there was trained
    without.  They reach a prior's: it knows no classes, but it is shown the moments of one.  `denoisers` has one for
    each name in ``stages.networks``, and for ``GAUSSIAN`` where that is an owner; else ConfigError.
    """

    def __init__(self, stages: StageMap, denoisers: Mapping[str, Denoiser]) -> None:
        missing = sorted({s.network for s in stages.stages} - denoisers.keys())
        if missing:
            raise ConfigError(f"no denoiser for {', '.join(missing)}; given: {', '.join(denoisers) or 'none'}.")
        self.stages, self.denoisers = stages, dict(denoisers)
        self._of_stage: dict[str, Denoiser] = {s.name: denoisers[s.network] for s in stages.stages}

    def guided(self, weight: float) -> StagedDenoiser:
        """The same with classifier-free guidance of the private stage, whose network alone knows classes."""
        out = StagedDenoiser(self.stages, self.denoisers)
        private = self.stages.private
        out._of_stage[private.name] = GuidedDenoiser(self.denoisers[private.network], weight)
        return out

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        owners = [self.stages.owner(log_sigma) for log_sigma in sigma.detach().double().log().tolist()]
        present = list(dict.fromkeys(owners))
        # In a sampler all rows are at one σ, so this is the usual way.
        if len(present) == 1:
            return self._answer(present[0], x, sigma, labels)
        out = torch.empty_like(x)
        for stage in present:
            rows = torch.tensor([i for i, o in enumerate(owners) if o is stage], device=x.device)
            out[rows] = self._answer(stage, x[rows], sigma[rows], None if labels is None else labels[rows])
        return out

    def _answer(self, stage: Stage, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        return self._of_stage[stage.name](x, sigma, None if stage.trainer == "public" else labels)
