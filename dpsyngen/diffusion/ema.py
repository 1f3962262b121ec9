"""Exponential moving average of weights: post-processing, so free of privacy cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """θ̄ ← m·θ̄ + (1 - m)·θ with m = min(decay, (1 + t)/(10 + t)) at step t.

    The warm-up of m keeps the random start from lingering in short runs, which is what private training has.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.average: dict[str, Tensor] = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards the weights of `module`."""
        self.steps += 1
        momentum = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - momentum)
            else:
                self.average[name].copy_(value)
