"""Findings about the private phase: steps, examples, clipping and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpsyngen.training.health import Finding, Trend, of_losses

_ADAM_EPS = 1e-8

_CHOOSE_C = (
    "Choose C on public images, such as a named set or what `dpsyngen programs save` draws: a C that is chosen by this "
    "private norm is tuned on private images, which ε does not cover"
)


@dataclass(frozen=True)
class Facts:
    """What the rules have to know of the settings.

    Attributes:
        steps, batch, records: planned steps, expected batch, declared number of records.
        noise_multiplier: z; 0 without privacy.
        clipping_norm, clipping: C and the style.
        ema: decay of the moving average of the private phase.
        parameters: d, trainable numbers; 0 if unknown.
        pretrained: whether the private network started from programmatic images.
        residual: whether it is a residual on DP moments, which draw images without it.
        complete: whether all steps were taken.
    """

    steps: int
    batch: int
    records: int
    noise_multiplier: float
    clipping_norm: float
    clipping: str
    ema: float
    parameters: int
    pretrained: bool
    complete: bool
    residual: bool = False


def of_private_training(log: Sequence[dict[str, Any]], facts: Facts) -> list[Finding]:
    """Everything that the log of the private phase and its settings say.

    Args:
        log: lines of ``private/training.jsonl``.
        facts: the settings.
    """
    out = of_settings(facts)
    if not log:
        return out
    out += of_losses(log, str(log[0]["phase"]), "--lr", "private", facts.residual)
    losses = np.array([float(v["loss"]) for v in log])
    settled = losses[np.isfinite(losses)]
    if len(settled) >= 20 and not any(f.code in ("diverged", "loss-not-finite") for f in out):
        t = Trend.of(settled)
        if not t.learned:
            begun = facts.pretrained or facts.residual
            beside = "; after pre-training that may be so" if facts.pretrained else ""
            if facts.residual:
                beside = ", beyond what the DP moments say: the generator is little more than these"
            out.append(
                Finding(
                    "nothing-learned",
                    "error" if t.end > 0.98 * t.start and facts.complete and not begun else "warning",
                    f"the loss began at {t.start:.3g} and was {t.end:.3g} at the end (standard error {t.error:.2g})",
                    f"the private images taught the network nothing that shows above the noise of the loss{beside}",
                    "raise --lr (the presets use 1e-3 to 1e-2), take more --steps, and see whether another finding "
                    "says that noise or clipping is in the way"
                    + ("; variant gaussian spends all of ε on the moments" if facts.residual else ""),
                )
            )
    out += _of_examples(log, facts)
    if facts.noise_multiplier:
        out += _of_clipping(log, facts)
    return out


def of_settings(f: Facts) -> list[Finding]:
    """What is plain before any image is seen."""
    out: list[Finding] = []
    if f.steps < 50:
        out.append(
            Finding(
                "few-steps",
                "warning",
                f"the private phase has {f.steps:,} steps",
                "Adam needs tens of steps to begin with; the presets take 200 and more",
                "raise --steps (see `dpsyngen plan` for what that costs in noise)",
                "released",
            )
        )
    epochs = f.steps * f.batch / f.records
    if epochs < 1:
        out.append(
            Finding(
                "few-epochs",
                "warning",
                f"{f.steps:,} steps of {f.batch:,} images see an image {epochs:.2g} times on average; "
                f"{100 * (1 - f.batch / f.records) ** f.steps:.0f} % of the images are never used",
                "most of the images add nothing",
                "raise --batch first (less noise an image), then --steps",
                "released",
            )
        )
    # Root mean square of a coordinate of the averaged gradient, at most: noise, and gradients that all have norm C.
    coordinate = f.clipping_norm * math.hypot(f.noise_multiplier / f.batch, 1 / math.sqrt(max(f.parameters, 1)))
    if f.noise_multiplier and coordinate < 10 * _ADAM_EPS:
        out.append(
            Finding(
                "steps-vanish",
                "error",
                f"with C = {f.clipping_norm:g} a coordinate of the noisy gradient is {coordinate:.1e} at most, and "
                f"Adam's ε is {_ADAM_EPS:g}",
                "Adam then divides by its ε, and the steps shrink to nothing",
                "raise --clip to between 0.1 and 1: noise grows with it, and Adam takes the scale out",
                "released",
            )
        )
    if f.ema and 1 / (1 - f.ema) > f.steps:
        out.append(
            Finding(
                "ema-longer-than-run",
                "note",
                f"the moving average spans {1 / (1 - f.ema):,.0f} steps (ema {f.ema:g}), the run {f.steps:,}",
                f"its warm-up shortens it to about {max(1.0, (10 + f.steps) / 9):,.0f} steps at the end, so the random "
                "start does not linger",
                "nothing",
                "released",
            )
        )
    return out


def _of_examples(log: Sequence[dict[str, Any]], f: Facts) -> list[Finding]:
    out: list[Finding] = []
    counts = [int(v["examples"]) for v in log]
    mean = sum(counts) / len(counts)
    if mean < 1 or (f.batch * len(counts) >= 50 and mean < 0.5 * f.batch):
        out.append(
            Finding(
                "few-examples",
                "error" if mean < max(1.0, 0.05 * f.batch) else "warning",
                f"a step saw {mean:.3g} images on average, where {f.batch:,} were to be expected of {f.records:,} "
                "records",
                "the noise is for the expected batch, so the images drown in it",
                "if --records declares far more images than there are, declare a number near the true one; raise "
                "--batch if it is small",
            )
        )
    total, bad = sum(counts), sum(int(v["not_finite"]) for v in log)
    if bad:
        share = bad / max(total, 1)
        out.append(
            Finding(
                "gradients-not-finite",
                "error" if share > 0.1 else "warning",
                f"{bad:,} of {total:,} gradients of single images were NaN or infinite and counted as zero",
                "those images taught nothing" + (", and what is left is mostly noise" if share > 0.1 else ""),
                "lower --lr; if only a few images do it, they may be damaged",
            )
        )
    return out


def _of_clipping(log: Sequence[dict[str, Any]], f: Facts) -> list[Finding]:
    """Clipping and noise, of a run with noise."""
    out: list[Finding] = []
    norm = float(np.median([float(v["median_norm"]) for v in log]))
    clipped = float(np.mean([float(v["clipped"]) for v in log]))
    c = f.clipping_norm
    if f.clipping == "automatic":
        shrink = norm / (norm + 0.01)  # γ of automatic clipping
        if 0 < norm < 0.01:
            out.append(
                Finding(
                    "gradients-below-gamma",
                    "warning",
                    f"the median gradient has norm {norm:.2g}, below γ = 0.01 of automatic clipping",
                    f"gradients use only {100 * shrink:.0f} % of the sensitivity that the noise is made for",
                    "--set private.clipping=flat with a smaller --clip.  " + _CHOOSE_C,
                )
            )
    else:
        shrink = min(1.0, norm / c)
        if clipped < 0.01 and 0 < norm < c / 10:
            out.append(
                Finding(
                    "nothing-clipped",
                    "error" if norm < c / 1000 else "warning",
                    f"{100 * clipped:.1f} % of the gradients were clipped at C = {c:g}; the median norm is {norm:.2g}",
                    f"the noise is made for C: it is about {c / norm:,.0f} times as large as these gradients need",
                    "lower --clip.  " + _CHOOSE_C,
                )
            )
        elif clipped > 0.95:
            out.append(
                Finding(
                    "everything-clipped",
                    "note",
                    f"{100 * clipped:.1f} % of the gradients were clipped at C = {c:g}; the median norm is {norm:.2g}",
                    "every image has the same weight, whatever its gradient.  That is common and works well: noise "
                    "shrinks with C, and Adam does not mind the scale",
                    "nothing, unless another finding says that steps vanish",
                )
            )
    if f.parameters:
        mean = sum(int(v["examples"]) for v in log) / len(log)
        one = mean * shrink / (f.noise_multiplier * math.sqrt(f.parameters))
        whole = one * math.sqrt(f.steps)
        # At ε = 0.2 the published MNIST setting, which still learns, has 3.  Real gradients are far from parallel.
        if whole < 1:
            out.append(
                Finding(
                    "noise-dominates",
                    "error" if whole < 0.3 else "warning",
                    f"a step adds noise of norm z·C·√d = {f.noise_multiplier * c * math.sqrt(f.parameters):.3g} to a "
                    f"sum of clipped gradients of {mean * shrink * c:.3g} at most; over all {f.steps:,} steps the "
                    f"ratio of signal to noise is {whole:.2g} at best",
                    "even if all images pulled in one direction in all steps, noise would pull as hard: the network "
                    "walks at random",
                    "raise --batch first, then --epsilon; use a smaller --network; or "
                    + (
                        "spend all of ε on DP moments (--variant gaussian)"
                        if f.residual
                        else "start from programs (--pretrain)"
                    )
                    + ".  More images help most",
                )
            )
    return out
