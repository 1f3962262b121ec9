"""Stages: who trains which noise levels, and which network answers there.

A :class:`StageMap` cuts the log σ axis into pieces.  The published variants (DPDM, FineTune, Cleaning, Coarse) and
their union (Both) are values of this one type; nothing else in the code knows their names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser
from dpsyngen.errors import ConfigError

Trainer = Literal["public", "private"]
Networks = Literal["experts", "shared"]
VARIANTS = ("dpdm", "finetune", "cleaning", "coarse", "both")


@dataclass(frozen=True)
class Stage:
    """One piece of the log σ axis.

    Attributes:
        name: "coarse", "context" or "cleaning".
        low: lower end in log σ (-inf at the clean end).
        high: upper end in log σ (inf at the noisy end).
        trainer: "public" (programmatic images only) or "private" (DP-SGD on private images).
        network: name of the network that owns the piece.
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
        stages: adjacent pieces that cover (-inf, inf), exactly one of them private.
        pretrain: whether the private network starts from training on programmatic images at all σ.
    """

    stages: tuple[Stage, ...]
    pretrain: bool = False

    def __post_init__(self) -> None:
        s = self.stages
        if not s or s[0].low != -math.inf or s[-1].high != math.inf:
            raise ConfigError("the stages must cover the whole log σ axis, from -inf to inf.")
        for below, above in itertools.pairwise(s):
            if below.high != above.low or not below.low < below.high:
                raise ConfigError(
                    f"stages {below.name!r} and {above.name!r} must meet at one log σ, in ascending order."
                )
        if sum(stage.trainer == "private" for stage in s) != 1:
            raise ConfigError("exactly one stage must be trained on private images.")
        if len({stage.name for stage in s}) != len(s):
            raise ConfigError("each stage needs a name of its own.")

    @property
    def private(self) -> Stage:
        """The stage that private images train."""
        return next(s for s in self.stages if s.trainer == "private")

    @property
    def public(self) -> tuple[Stage, ...]:
        """The stages that programmatic images train."""
        return tuple(s for s in self.stages if s.trainer == "public")

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks, each once, the private one last."""
        names = [s.network for s in self.public if s.network != self.private.network]
        return (*dict.fromkeys(names), self.private.network)

    @property
    def shared(self) -> bool:
        """Whether some public stage is answered by the network that DP-SGD also trains."""
        return any(s.network == self.private.network for s in self.public)

    def owner(self, log_sigma: float) -> Stage:
        """The stage that `log_sigma` belongs to; a threshold itself belongs to the private stage."""
        private = self.private
        if private.low <= log_sigma <= private.high:
            return private
        for stage in self.stages:
            if stage.low <= log_sigma < stage.high or (log_sigma == stage.high == math.inf):
                return stage
        raise ValueError(f"log σ = {log_sigma} is not a number.")


def stage_map(
    variant: str,
    *,
    tau_cleaning: float = -3.0,
    tau_coarse: float = 2.0,
    networks: Networks = "experts",
    pretrain: bool | None = None,
) -> StageMap:
    """The stage map of a variant of DP-SynGen (arXiv 2412.09842).

    Args:
        variant: "dpdm", "finetune", "cleaning", "coarse" or "both".
        tau_cleaning: log σ below which programmatic images train (Cleaning, Both).
        tau_coarse: log σ above which programmatic images train (Coarse, Both).
        networks: "experts" (a network for each stage: the public ones never see a private gradient) or "shared"
            (one network that takes public steps at public stages and DP steps at the private one).
        pretrain: start the private network from programmatic training at all σ.  None: what the variant says
            (only FineTune does).

    Raises:
        ConfigError: unknown variant, or τ_cleaning >= τ_coarse.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"variant is {variant!r}, but must be one of {', '.join(VARIANTS)}.")
    for name, tau in (("tau_cleaning", tau_cleaning), ("tau_coarse", tau_coarse)):
        if not math.isfinite(tau):
            raise ConfigError(f"{name} is {tau}, but must be a finite log σ (choose another variant for no threshold).")
    if variant == "both" and not tau_cleaning < tau_coarse:
        raise ConfigError(
            f"tau_cleaning = {tau_cleaning} must be below tau_coarse = {tau_coarse}: between them lies the stage that "
            "private images train."
        )
    if networks not in ("experts", "shared"):
        raise ConfigError(f"networks is {networks!r}, but must be 'experts' or 'shared'.")
    if pretrain is False and variant == "finetune":
        raise ConfigError("variant 'finetune' is pre-training; without it choose 'dpdm'.")
    low = tau_cleaning if variant in ("cleaning", "both") else -math.inf
    high = tau_coarse if variant in ("coarse", "both") else math.inf

    def network(stage: str) -> str:
        return "shared" if networks == "shared" else stage

    pieces: list[Stage] = []
    if low > -math.inf:
        pieces.append(Stage("cleaning", -math.inf, low, "public", network("cleaning")))
    pieces.append(Stage("context", low, high, "private", network("context")))
    if high < math.inf:
        pieces.append(Stage("coarse", high, math.inf, "public", network("coarse")))
    return StageMap(tuple(pieces), pretrain=variant == "finetune" if pretrain is None else pretrain)


class StagedDenoiser:
    """A Denoiser made of Denoisers: each row is answered by the network that owns its σ.

    Labels reach the private stage only: programmatic images have none, so at a public stage the network that answers
    was trained without.

    Args:
        stages: who owns what.
        denoisers: one Denoiser for each name in ``stages.networks``.
        private: the Denoiser of the private stage where it differs from its network's (guidance); None: the same.
    """

    def __init__(self, stages: StageMap, denoisers: Mapping[str, Denoiser], private: Denoiser | None = None) -> None:
        missing = [n for n in stages.networks if n not in denoisers]
        if missing:
            raise ConfigError(f"no denoiser for {', '.join(missing)}; given: {', '.join(denoisers) or 'none'}.")
        self.stages = stages
        self._of_stage: dict[str, Denoiser] = {s.name: denoisers[s.network] for s in stages.stages}
        if private is not None:
            self._of_stage[stages.private.name] = private

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        owners = [self.stages.owner(log_sigma) for log_sigma in sigma.detach().double().log().tolist()]
        present = list(dict.fromkeys(owners))
        if len(present) == 1:
            return self._answer(present[0], x, sigma, labels)
        out = torch.empty_like(x)
        for stage in present:
            rows = torch.tensor([i for i, o in enumerate(owners) if o is stage], device=x.device)
            out[rows] = self._answer(stage, x[rows], sigma[rows], None if labels is None else labels[rows])
        return out

    def _answer(self, stage: Stage, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        return self._of_stage[stage.name](x, sigma, labels if stage.trainer == "private" else None)
