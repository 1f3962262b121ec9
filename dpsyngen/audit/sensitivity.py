"""One step of the audited run's training code, with its settings: what it releases, and what it clips.

Does one record change the clipped sum by at most C?  And is it the right gradient that is clipped?  Asked of the real
engine on a real network, with examples of the auditor's own: small, huge, equal to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dpsyngen.audit.canaries import lively_denoiser
from dpsyngen.audit.distinguish import StepGame, play_step_game
from dpsyngen.audit.report import Finding
from dpsyngen.config import Config
from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.loss import NoiseLevels, NoisyBatch, denoising_loss, make_noisy
from dpsyngen.privacy.clipping import AUTOMATIC_GAMMA, ClippingStyle
from dpsyngen.privacy.per_example import layer_numbers
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.plan import Shape
from dpsyngen.training.private import Computing, DpSgd, PrivateStep

_SLOTS_OF_DISCRETE_NOISE = 64  # its sampler takes a millisecond a call, however few numbers are asked for
_HUGE = 300.0  # pixels of an image that is as far from the others as a hostile one could be

_SLACK = 1e-4  # of C, for the rounding of sums in fp32
_ENOUGH = 0.5  # of C: the largest move, at least, for a check of sensitivity to show anything
_TOLERANCE = 5e-3  # of C, for rounding (of a network in fp32, and of a grid)

Summed = Callable[[Sequence[int]], list[Tensor]]
"""The clipped sum over some of the examples, which may be named more than once; one tensor a parameter."""


def check_sensitivity(summed: Summed, examples: int, clipping_norm: float) -> Finding:
    """Take each example away from all, add it a second time, and look at it alone: the sum may move by C at most.

    Of the `examples`, B >= 2, a good part must have gradients far above C, or nothing is shown.
    """
    everyone = list(range(examples))
    whole = _flat(summed(everyone))
    moves: dict[str, float] = {}
    for i in everyone:
        rest = [j for j in everyone if j != i]
        for how, move in {
            "taken away": whole - _flat(summed(rest)),
            "added a second time": _flat(summed([*everyone, i])) - whole,
            "alone": _flat(summed([i])),
        }.items():
            moves[f"example {i} {how}"] = _finite(float(move.norm()) / clipping_norm)
    where, worst = max(moves.items(), key=lambda move: move[1])
    enough = worst >= _ENOUGH
    return Finding(
        "one record moves the clipped sum by at most C",
        enough and worst <= 1 + _SLACK,
        f"at most {worst:.6g} C, over {examples} examples in three ways",
        f"at most 1 C (and {_SLACK:g} C for rounding)",
        where if enough else f"{where}; no example comes near C, so nothing was shown",
    )


def check_gradients(
    summed: Summed,
    reference: Callable[[int], list[list[Tensor]]],
    layers: Sequence[int],
    examples: int,
    clipping_norm: float,
    style: ClippingStyle,
) -> Finding:
    """What the engine adds for an example is clip(mean over its K copies of their gradients), by plain autograd.

    Args:
        reference: for an example, the gradient of the loss of each of its K copies: K lists, one tensor a parameter.
        layers: for each parameter the number of its layer.
    """
    errors = []
    for i in range(examples):
        mean = [torch.stack(of_copies).double().mean(0) for of_copies in zip(*reference(i), strict=True)]
        wanted = _flat(clip_by_hand(mean, layers, clipping_norm, style))
        errors.append(_finite(float((_flat(summed([i])) - wanted).norm()) / clipping_norm))
    worst = max(errors)
    return Finding(
        "an example's gradient is averaged over its copies, then clipped",
        worst <= _TOLERANCE,
        f"differs by at most {worst:.3g} C from a plain autograd loop, over {examples} examples",
        f"at most {_TOLERANCE:g} C, for rounding",
        f"example {errors.index(worst)}",
    )


def clip_by_hand(
    gradient: list[Tensor], layers: Sequence[int], clipping_norm: float, style: ClippingStyle
) -> list[Tensor]:
    """One gradient, clipped as :func:`dpsyngen.privacy.clipping.clip` describes, written a second time."""
    # What shares a norm: a layer with style "per-layer", otherwise everything.
    groups = list(layers) if style == "per-layer" else [0] * len(gradient)
    squares: dict[int, float] = {}
    for group, g in zip(groups, gradient, strict=True):
        squares[group] = squares.get(group, 0.0) + float(g.square().sum())
    bound = clipping_norm / math.sqrt(len(squares))
    factors = {
        group: bound / (math.sqrt(square) + AUTOMATIC_GAMMA)
        if style == "automatic"
        else min(1.0, bound / max(math.sqrt(square), 1e-300))
        for group, square in squares.items()
    }
    return [g * factors[group] for group, g in zip(groups, gradient, strict=True)]


def _finite(value: float) -> float:
    """What is not a number is worse than any number."""
    return math.inf if math.isnan(value) else value


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten().cpu() for t in tensors])


def step_of(config: Config, mechanism: DpSgd) -> PrivateStep:
    """The training step with the audited run's constants, a fresh key, and no private image."""
    n = config.network
    blank = ImageDataset(np.zeros((1, 1, 8, 8), dtype=np.uint8), None, (), "none")
    return PrivateStep(
        blank,
        NoiseLevels(n.noise_mean, n.noise_std),
        n.label_dropout,
        mechanism,
        Randomness.from_system(),
        Computing(config.private.physical_batch or 16),
    )


def audit_noise(config: Config, mechanism: DpSgd, *, trials: int, confidence: float) -> StepGame:
    """The step-level game, played with the code that releases the run's gradients."""
    step = step_of(config, mechanism)
    return play_step_game(
        lambda module, loss, examples: step.summed(step.engine(module), loss, examples),
        lambda total, call: step.mechanism.release(total, step.randomness, call),
        clipping_norm=mechanism.clipping_norm,
        noise_multiplier=mechanism.noise_multiplier,
        expected_examples=float(mechanism.config.batch),
        copies=mechanism.config.copies,
        trials=trials,
        slots=_SLOTS_OF_DISCRETE_NOISE if mechanism.config.noise == "discrete" else 1,
        confidence=confidence,
    )


def audit_clipping(
    config: Config, mechanism: DpSgd, shape: Shape, device: str = "cpu", gaussian: GaussianDenoiser | None = None
) -> list[Finding]:
    """Check sensitivity, and the order of averaging and clipping, of the run's network on hostile images.

    A residual network has the released moments `gaussian`.
    """
    copies = min(max(config.private.copies, 2), 4)  # one copy would not show in which order they are averaged
    private = mechanism.config.model_copy(update={"copies": copies})
    step = step_of(config, replace(mechanism, config=private))
    denoiser = lively_denoiser(config, shape, conditional=True, seed=config.network.seed, gaussian=gaussian).to(device)
    engine = step.engine(denoiser)
    n, num_classes = config.network, denoiser.num_classes
    generator = torch.Generator().manual_seed(0)
    # Two random images, a third equal to the second, a blank one, and two whose pixels are far out of range.
    examples = 6
    images = torch.rand((examples, shape.channels, shape.resolution, shape.resolution), generator=generator) * 2 - 1
    images[2] = images[1]
    images[3] = 0
    images[4] *= _HUGE
    images[5] = _HUGE
    rows = make_noisy(
        images.to(device),
        (torch.arange(examples) % num_classes).to(device) if num_classes else None,
        NoiseLevels(n.noise_mean, n.noise_std),
        copies=copies,
        num_classes=num_classes,
        label_dropout=0.0,
        generator=generator,
    )

    def pick(chosen: Sequence[int]) -> NoisyBatch:
        return rows.rows(torch.tensor([e * copies + k for e in chosen for k in range(copies)]))

    def summed(chosen: Sequence[int]) -> list[Tensor]:
        batch = pick(chosen)

        def loss(part: slice) -> Tensor:
            return denoising_loss(denoiser, batch.rows(slice(part.start * copies, part.stop * copies)))

        return step.summed(engine, loss, len(chosen)).gradient

    def reference(example: int) -> list[list[Tensor]]:
        batch = pick([example])
        losses = [denoising_loss(denoiser, batch.rows(slice(k, k + 1))).sum() for k in range(copies)]
        return [list(torch.autograd.grad(loss, engine.parameters)) for loss in losses]

    c, layers = engine.clipping_norm, layer_numbers(engine.names)
    gradients = check_gradients(summed, reference, layers, examples, c, engine.style)
    return [check_sensitivity(summed, examples, c), gradients]
