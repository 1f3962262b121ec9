"""Stopping a run whose network cannot compute any more, before it spends the rest of the budget.

Weights are the mechanism's output and the noise that the network is asked about here is public, so this looks at
nothing private.  Whether an image's loss or gradient was finite would be private, and is not asked.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.errors import RunError
from dpsyngen.files import write_text
from dpsyngen.training.checkpoint import TrainState
from dpsyngen.training.health import Finding, not_finite_weights, tensors_finite, weights_finite

_SIGMAS = (0.02, 0.5, 20.0)


def answers_finite(denoiser: NetworkDenoiser, shape: tuple[int, int, int]) -> bool:
    """Whether the network answers public noise of three strengths with numbers; one small forward pass.

    Args:
        denoiser: the network.
        shape: (C, H, W) of an image.
    """
    device = next(denoiser.parameters()).device
    sigma = torch.tensor(_SIGMAS)
    noise = torch.randn(len(_SIGMAS), *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer = denoiser((noise * sigma.view(-1, 1, 1, 1)).to(device), sigma.to(device))
    return bool(torch.isfinite(answer).all())


class FiniteGuard:
    """Ends a phase when its network is no longer finite, and writes that down.

    Args:
        private: the run's private folder.
        phase: name of the phase.
        learning_rate: its learning rate, for the message.
        option: the option that sets it.
        shape: (C, H, W) of an image.
    """

    def __init__(
        self, private: Path, phase: str, learning_rate: float, option: str, shape: tuple[int, int, int]
    ) -> None:
        self.private, self.phase, self.shape = private, phase, shape
        self.learning_rate, self.option = learning_rate, option

    def check(self, state: TrainState, step: int, *, last: bool = False) -> None:
        """Look at the weights; now and then, and where `last` is set, also at their average and the network's answers.

        Args:
            state: after the step.
            step: steps done, from 1.
            last: before a checkpoint or a release.

        Raises:
            RunError: something is not finite.  No checkpoint may be written then.
        """
        good = weights_finite(state.module)
        # Steps 1, 2, 4, 8, …: a network that breaks mostly does so early, and a forward pass at each step would cost.
        if good and (last or step & (step - 1) == 0):
            assert isinstance(state.module, NetworkDenoiser)
            good = tensors_finite(state.ema.average.values()) and answers_finite(state.module, self.shape)
        if not good:
            finding = not_finite_weights(self.phase, step, self.learning_rate, self.option)
            write_text(_record(self.private), json.dumps(finding.to_dict(), ensure_ascii=False) + "\n", 0o600)
            raise _stopped(finding)


def stopped_because(private: Path) -> Finding | None:
    """Why the run was stopped; None if it was not."""
    try:
        return Finding(**json.loads(_record(private).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return not_finite_weights("unknown", 0, math.nan, "--lr")


def require_not_stopped(private: Path) -> None:
    """Raise RunError if the run was stopped because its weights were not finite: it would only do it again."""
    finding = stopped_because(private)
    if finding is not None:
        raise _stopped(finding)


def _record(private: Path) -> Path:
    return private / "stopped.json"


def _stopped(finding: Finding) -> RunError:
    return RunError(f"training was stopped: {finding.seen}.  Nothing is released.  Do this: {finding.change}.")
