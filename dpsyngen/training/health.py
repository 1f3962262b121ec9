"""The health of a run: ending it when its network breaks, and writing down at the end what looks wrong.

Weights are the mechanism's output and the noise that a network is asked about here is public, so a run may stop because
of them.  Whether an image's loss or gradient was finite is private, and nothing stops for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.errors import RunError
from dpsyngen.files import write_text
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.checkpoint import TrainState, describe_checkpoints
from dpsyngen.training.findings import Facts, Finding, by_severity, of_images, of_losses, of_private_training
from dpsyngen.training.log import JsonLines
from dpsyngen.training.plan import stages_of
from dpsyngen.training.private import charged_mechanisms
from dpsyngen.training.run import Run

# ---------------------------------------------------------------------------------------------- weights


def weights_finite(module: nn.Module) -> bool:
    """Whether the network can still compute: no weight is NaN or infinite, or so large that its square is.

    Weights are the mechanism's output, so stopping by them costs no privacy.  Two small operations for each tensor.
    """
    return tensors_finite(module.state_dict().values())


def tensors_finite(tensors: Iterable[Tensor]) -> bool:
    """The same for tensors."""
    with torch.no_grad():
        sums = [t.detach().float().square().sum() for t in tensors if t.is_floating_point()]
        return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def not_finite_weights(phase: str, step: int, learning_rate: float, option: str) -> Finding:
    """The finding for a phase that had to be stopped at `step`."""
    return Finding(
        "weights-not-finite",
        "error",
        f"after step {step:,} of the phase {phase!r} some weights are NaN, infinite or too large to compute with "
        f"(learning rate {learning_rate:g})",
        "such a network draws nothing; training on would spend the rest of the budget for nothing",
        f"start a new run with a much lower learning rate, {option} (the presets use 3e-4 to 1e-2).  Resuming repeats "
        "the same steps and ends in the same place",
        "released",
    )


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


# -------------------------------------------------------------------------------------------- assessment

_EACH, _CLASSES, _UNLABELLED = 8, 10, 64  # generated images looked at: of a class, classes, or in all
_SAMPLER_STEPS = 20  # at most, so that looking takes seconds


class Drawer(Protocol):
    """A generator that a release holds."""

    class_names: tuple[str, ...]
    networks: Mapping[str, nn.Module]
    defaults: Mapping[str, Any]

    def labels(self, count: int, classes: list[int]) -> Any: ...

    def sample(self, count: int, *, labels: Any, steps: int) -> Any: ...


def assess(run: Run, open_release: Callable[[Path], Drawer]) -> list[Finding]:
    """Findings about the training and the generated images of a run, finished or not, by severity.

    It reads logs, settings, weights and the ledger, and draws a few images; the run is not changed.

    Args:
        run: the run.
        open_release: loads the generator from the release half of a finished run.

    Raises:
        RunError: the configuration cannot be read.
        LedgerError: the ledger is damaged.
    """
    out: list[Finding] = []
    stopped = stopped_because(run.private)
    if stopped is not None:
        out.append(stopped)
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in _whole(JsonLines(run.release / "public_training.jsonl", 0o644), "loss"):
        phases.setdefault(line["phase"], []).append(line)
    for name, lines in phases.items():
        out += of_losses(lines, name, "--set public.learning_rate=…", "released")
    ledger, config = Ledger(run.ledger_path), run.config
    stages = stages_of(config)
    if not stages.gaussian:
        c = config.private
        noise = [m.noise_multiplier for m in charged_mechanisms(ledger)]
        facts = Facts(
            steps=c.steps,
            batch=c.batch,
            records=ledger.records,
            noise_multiplier=noise[0] if noise else 0.0,
            clipping_norm=config.privacy.clipping_norm,
            clipping=c.clipping,
            ema=c.ema,
            parameters=_parameters(run),
            pretrained=stages.pretrain,
            residual=stages.moments,
            complete=run.complete,
        )
        log = JsonLines(run.private / "training.jsonl", 0o600)
        out += of_private_training(_whole(log, "loss", "examples", "clipped", "median_norm", "not_finite"), facts)
    if run.complete:
        found = _of_generator(run, open_release)
        out += [_without_network(f) for f in found] if stages.gaussian else found
    return by_severity(out)


def write_health(run: Run, findings: list[Finding]) -> None:
    """Keep findings in ``private/health.json``."""
    kept = {
        "private": "findings with basis 'private' rest on figures of private images: publishing them costs privacy",
        "findings": [f.to_dict() for f in findings],
    }
    write_text(run.private / "health.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n", 0o600)


def damage(code: str, seen: str, why: str) -> Finding:
    """The finding for a file that cannot be read."""
    change = "put private/ and release/ back from one backup, or start a new run"
    return Finding(code, "error", seen.rstrip("."), why, change, "released")


def _whole(log: JsonLines, *keys: str) -> list[dict[str, Any]]:
    """Lines that have numbers under all of `keys`; a damaged log must not hide what the rest of it says."""
    return [v for v in log.read() if all(isinstance(v.get(k), int | float) for k in keys)]


def _parameters(run: Run) -> int:
    """Trainable numbers of the private network, from its weights or a checkpoint; 0 if there is neither."""
    names = [(run.weights(n), "") for n in ("context", "shared")]
    names += [(run.private / n, "model/") for n, phase, _ in describe_checkpoints(run.private)[0] if phase == "context"]
    for path, prefix in names:
        if path.exists():
            try:
                with safe_open(path, framework="pt") as f:
                    shapes = [f.get_slice(k).get_shape() for k in f.keys() if k.startswith(prefix)]  # noqa: SIM118
                return sum(math.prod(shape) for shape in shapes)
            except (SafetensorError, OSError):
                continue
    return 0


def _of_generator(run: Run, open_release: Callable[[Path], Drawer]) -> list[Finding]:
    try:
        generator = open_release(run.release)
    except RunError as error:
        return [damage("release-damaged", str(error), "no image can be drawn from this release")]
    broken = [name for name, net in generator.networks.items() if not weights_finite(net)]
    if broken:
        return [
            Finding(
                "released-weights-not-finite",
                "error",
                f"weights of {', '.join(broken)} in the release are NaN, infinite or too large to compute with",
                "such a network draws nothing",
                "do not publish this release; train again with a lower --lr",
                "released",
            )
        ]
    classes = len(generator.class_names)
    labels = None
    if classes:
        chosen = np.unique(np.linspace(0, classes - 1, min(classes, _CLASSES)).astype(int)).tolist()
        labels = generator.labels(_EACH * len(chosen), chosen)
    count = _UNLABELLED if labels is None else len(labels)
    steps = min(generator.defaults.steps, _SAMPLER_STEPS)
    samples = generator.sample(count, labels=labels, steps=steps)
    return of_images(samples.images, samples.labels, generator.class_names)


def _without_network(f: Finding) -> Finding:
    """What to do about images where there is no network that could be trained otherwise."""
    if f.basis != "released" or f.code == "release-damaged":
        return f
    return replace(
        f,
        why="the images come from DP moments alone, so that is what these say: noise hides the rest, or the images "
        "have little in common",
        change="raise --epsilon, use more images, or choose a variant with a network (residual)",
    )
