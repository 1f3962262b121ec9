"""The health of a run: ending it when its network breaks, and writing down at the end what looks wrong.

Weights are the mechanism's output and the noise that a network is asked about here is public, so a run may stop because
of them.  Whether an image's loss or gradient was finite is private, and nothing stops for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.errors import RunError
from dpsyngen.files import write_json
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.checkpoint import TrainState
from dpsyngen.training.findings import Facts, Finding, by_severity, finding, of_images, of_losses, of_private_training
from dpsyngen.training.log import JsonLines, Step
from dpsyngen.training.plan import stages_of
from dpsyngen.training.private import DpSgd, charged_mechanisms
from dpsyngen.training.run import Run
from dpsyngen.training.session import pinned

# ---------------------------------------------------------------------------------------------- weights


def weights_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether a network can still compute with such weights: their squares are finite."""
    with torch.no_grad():
        sums = [t.detach().float().square().sum() for t in tensors if t.is_floating_point()]
        return not sums or bool(torch.isfinite(torch.stack(sums)).all())


PUBLIC_RATE = "--set public.learning_rate=…"
_STOPPED = "stopped.json"  # in the private folder: the finding for which a run was stopped
_SIGMAS = (0.02, 0.5, 20.0)


def answers_finite(denoiser: NetworkDenoiser, shape: tuple[int, int, int]) -> bool:
    """Whether the network answers public noise of three strengths with numbers; `shape` is (C, H, W) of an image."""
    device = next(denoiser.parameters()).device
    sigma = torch.tensor(_SIGMAS)
    noise = torch.randn(len(_SIGMAS), *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer = denoiser((noise * sigma.view(-1, 1, 1, 1)).to(device), sigma.to(device))
    return bool(torch.isfinite(answer).all())


def require_finite(
    private: Path, state: TrainState, report: Step, learning_rate: float, shape: tuple[int, int, int], *, last: bool
) -> None:
    """End a phase whose network is no longer finite with a RunError, and keep that in the run's private folder.

    It looks at the weights, and after steps 1, 2, 4, 8, … and where `last` is set (before a checkpoint or a release) at
    their average and the network's answers: a network that breaks mostly does so early, and a forward pass costs.
    """
    good = weights_finite(state.module.state_dict().values())
    if good and (last or report.step & (report.step - 1) == 0):
        assert isinstance(state.module, NetworkDenoiser)
        good = weights_finite(state.ema.average.values()) and answers_finite(state.module, shape)
    if not good:
        found = finding(
            "weights-not-finite",
            "error",
            f"after step {report.step:,} of the phase {report.phase!r} some weights are NaN, infinite or too large to "
            f"compute with (learning rate {learning_rate:g})",
            "released",
            lower="--lr" if report.private else PUBLIC_RATE,
        )
        write_json(private / _STOPPED, found.to_dict(), 0o600)
        require_not_stopped(private)


def stopped_because(private: Path) -> Finding | None:
    """Why the run was stopped; None if it was not."""
    try:
        return Finding(**json.loads((private / _STOPPED).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return finding("weights-not-finite", "error", "weights were not finite", "released", lower="--lr")


def require_not_stopped(private: Path) -> None:
    """Raise RunError if the run was stopped because its weights were not finite: it would only do it again."""
    found = stopped_because(private)
    if found is not None:
        raise RunError(f"training was stopped: {found.seen}.  Nothing is released.  Do this: {found.change}.")


# -------------------------------------------------------------------------------------------- assessment

_EACH, _CLASSES, _UNLABELLED = 8, 10, 64  # generated images looked at: of a class, classes, or in all
_SAMPLER_STEPS = 20  # at most, so that looking takes seconds


def assess(run: Run, open_release: Callable[[Path], Any]) -> list[Finding]:
    """Findings about the training and the generated images of a run, finished or not, by severity.

    It reads logs, settings, weights and the ledger, and draws a few images by the generator that `open_release` loads;
    the run is not changed.  RunError or LedgerError if the configuration or the ledger is damaged.
    """
    stopped = stopped_because(run.private)
    out = [] if stopped is None else [stopped]
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in _whole(JsonLines(run.release / "public_training.jsonl", 0o644), "loss"):
        phases.setdefault(line["phase"], []).append(line)
    for name, lines in phases.items():
        out += of_losses(lines, name, PUBLIC_RATE, "released")
    ledger, config = Ledger(run.ledger_path), run.config
    stages = stages_of(config)
    if not stages.gaussian:
        noise = [m.noise_multiplier for m in charged_mechanisms(ledger)]
        about = pinned(run.data_path) if run.data_path.exists() else {}
        facts = Facts(
            DpSgd(ledger.records, noise[0] if noise else 0.0, config.privacy.clipping_norm, config.private),
            parameters=int(about.get("parameters", 0)),
            pretrained=bool(stages.pretrain) or (stages.moments and config.network.prior is not None),
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
    write_json(run.private / "health.json", kept, 0o600)


def damage(code: str, seen: str, why: str) -> Finding:
    """The finding for a file that cannot be read."""
    mend = "put private/ and release/ back from one backup, or start a new run"
    return Finding(code, "error", seen.rstrip("."), why, mend, "released")


def _whole(log: JsonLines, *keys: str) -> list[dict[str, Any]]:
    """Lines that have numbers under all of `keys`; a damaged log must not hide what the rest of it says."""
    return [v for v in log.read() if all(isinstance(v.get(k), int | float) for k in keys)]


def _of_generator(run: Run, open_release: Callable[[Path], Any]) -> list[Finding]:
    try:
        generator = open_release(run.release)
    except RunError as error:
        return [damage("release-damaged", str(error), "no image can be drawn from this release")]
    classes, chosen = len(generator.class_names), None
    if classes:
        chosen = np.unique(np.linspace(0, classes - 1, min(classes, _CLASSES)).astype(int)).tolist()
    labels = generator.labels(_EACH * len(chosen) if chosen else _UNLABELLED, chosen)
    steps = min(generator.defaults.steps, _SAMPLER_STEPS)
    samples = generator.sample(None if classes else _UNLABELLED, labels=labels, steps=steps)
    return of_images(samples.images, samples.labels, generator.class_names)


def _without_network(f: Finding) -> Finding:
    """What to do about images where there is no network that could be trained otherwise."""
    if f.code == "release-damaged":
        return f
    why = "the images come from DP moments alone: noise hides the rest, or the images have little in common"
    return replace(f, why=why, change="raise --epsilon, use more images, or choose a variant with a network (residual)")
