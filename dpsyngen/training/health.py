"""The health of a run: ending it when its network breaks, and writing down at the end what looks wrong.

Weights are the mechanism's output and the noise that a network is asked about here is public, so a run may stop because
of them.  Whether an image's loss or gradient was finite is private, and nothing stops for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.sampling import SamplingSettings
from dpsyngen.errors import RunError
from dpsyngen.files import write_text
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.checkpoint import TrainState, describe_checkpoints
from dpsyngen.training.findings import Facts, Finding, by_severity, of_losses, of_private_training, released
from dpsyngen.training.log import JsonLines, Step
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


def require_finite(
    private: Path, state: TrainState, report: Step, learning_rate: float, shape: tuple[int, int, int], *, last: bool
) -> None:
    """End a phase whose network is no longer finite, and write that down in the run's private folder.

    It looks at the weights, and after steps 1, 2, 4, 8, … and where `last` is set (before a checkpoint or a release) at
    their average and the network's answers: a network that breaks mostly does so early, and a forward pass costs.

    Raises:
        RunError: something is not finite.  No checkpoint may be written then.
    """
    good = weights_finite(state.module)
    if good and (last or report.step & (report.step - 1) == 0):
        assert isinstance(state.module, NetworkDenoiser)
        good = tensors_finite(state.ema.average.values()) and answers_finite(state.module, shape)
    if not good:
        option = "--lr" if report.private else "--set public.learning_rate=…"
        finding = not_finite_weights(report.phase, report.step, learning_rate, option)
        write_text(_record(private), json.dumps(finding.to_dict(), ensure_ascii=False) + "\n", 0o600)
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
    defaults: SamplingSettings

    @property
    def networks(self) -> Mapping[str, nn.Module]: ...

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


# --------------------------------------------------------------------------------------------- images

SAME = 0.02
"""Root mean square difference of pixels in [0, 1] below which two images are one: 5 of 255 grey levels, which the eye
does not tell apart.  Different digits or dead leaves are 0.1 to 0.6 apart."""

FLAT = 0.02
"""Standard deviation of the pixels of a blank image, by the same reasoning; digits and dead leaves have 0.2 to 0.4."""

SMOOTH = 0.15
"""Correlation of neighbouring pixels, median over images, below which they are noise.  White noise has 0; digits of 8×8
pixels have 0.6 (none below 0.4), dead leaves of 28×28 pixels 0.5."""

_PERMUTATIONS = 999


def of_images(
    images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None, class_names: Sequence[str] = ()
) -> list[Finding]:
    """What is wrong with generated images, as far as it shows in a few dozen.

    Args:
        images: uint8 [N, C, H, W], N ≥ 2, not selected in any way.
        labels: their classes [N], several images each; None: unconditional.
        class_names: names of the classes.
    """
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    apart = _distances(flat)
    out = list(_of_pictures(images, flat, apart))
    if labels is not None and not any(f.severity == "error" for f in out):
        out += _of_classes(apart, labels, class_names)
    return out


def _of_pictures(images: NDArray[np.uint8], flat: NDArray[np.float64], apart: NDArray[np.float64]) -> Iterator[Finding]:
    blank = flat.std(1) < FLAT
    if blank.mean() > 0.1:
        level = float(flat[blank].mean())
        colour = "black" if level < 0.05 else "white" if level > 0.95 else "of one grey or colour"
        yield released(
            "blank-images",
            "error" if blank.mean() > 0.5 else "warning",
            f"{int(blank.sum())} of {len(images)} generated images are {colour} all over",
            "the network diverged, or never learned what the images look like",
            "lower --lr by a factor of 10; if the loss fell as it should, draw with lower guidance",
        )
    count = distinct(apart)
    pairs = apart[np.triu_indices(len(images), 1)]
    if count <= len(images) / 2 and blank.mean() <= 0.5:
        one = float(np.median(pairs)) < SAME
        yield released(
            "collapsed",
            "error" if one or count <= len(images) / 10 else "warning",
            f"{len(images)} generated images show {count} different ones; half of the pairs differ by less than "
            f"{float(np.median(pairs)):.2g} (two images count as one below {SAME:g})",
            "the generator draws the same image over and over"
            if one
            else "the generator knows few images and repeats them",
            "lower --lr, draw with lower guidance, and see whether another finding says that the loss rose",
        )
    correlation = neighbour_correlation(images[~blank])
    if correlation is not None and correlation < SMOOTH:
        yield released(
            "noise-images",
            "error",
            f"neighbouring pixels of generated images correlate by {correlation:.2f} (pictures: 0.4 and more)",
            "the images are noise: the network removes too little of it",
            "take more --steps, raise --lr if the loss is still falling, and see whether another finding says that "
            "DP noise dominates.  If your images are meant to look like noise, all is well",
        )


def _of_classes(apart: NDArray[np.float64], labels: NDArray[np.int64], class_names: Sequence[str]) -> Iterator[Finding]:
    single = []
    for number in np.unique(labels):
        rows = np.flatnonzero(labels == number)
        within = apart[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)]
        if len(within) and np.median(within) < SAME:
            single.append(class_names[number] if number < len(class_names) else str(number))
    if single:
        yield released(
            "classes-collapsed",
            "error" if 2 * len(single) > len(np.unique(labels)) else "warning",
            f"the images of a class look all alike in {len(single)} of {len(np.unique(labels))} classes: "
            + ", ".join(single[:10]),
            "such a class has one image, not a distribution",
            "draw with lower guidance (`dpsyngen sample --guidance 1`); lower --lr",
        )
    ratio, p = label_effect(apart, labels)
    if p > 0.01:
        yield released(
            "label-ignored",
            "warning",
            f"images of different classes differ no more than images of one (pseudo-F = {ratio:.2f}, where 1 is no "
            f"difference; p = {p:.2g})",
            "the generator does not use the class: labelled images from it teach a classifier nothing",
            "draw with guidance (--set sampling.guidance=2, or `dpsyngen sample --guidance 2`; the network must "
            "have been trained with network.label_dropout above 0), take more --steps, or train --unconditional if "
            "classes do not matter",
        )


def _distances(flat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square differences [N, N]."""
    squares = (flat**2).sum(1)
    total = squares[:, None] + squares[None] - 2 * flat @ flat.T
    return np.sqrt(np.maximum(total, 0) / flat.shape[1])


def distinct(apart: NDArray[np.float64]) -> int:
    """Images that are left if each one that is the same as an earlier one is taken away."""
    kept: list[int] = []
    for i in range(len(apart)):
        if not kept or apart[i, kept].min() >= SAME:
            kept.append(i)
    return len(kept)


def neighbour_correlation(images: NDArray[np.uint8]) -> float | None:
    """Correlation of horizontal and vertical neighbours within an image, median over images; None if there is none."""
    if not len(images):
        return None
    x = images.astype(np.float64)
    x = x - x.mean((2, 3), keepdims=True)
    variance = (x**2).mean((1, 2, 3))
    across = ((x[..., 1:] * x[..., :-1]).mean((1, 2, 3)) + (x[:, :, 1:] * x[:, :, :-1]).mean((1, 2, 3))) / 2
    return float(np.median(across / np.maximum(variance, 1e-12)))


def label_effect(apart: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Pseudo-F of distances between and within classes, and its permutation p (PERMANOVA, Anderson 2001)."""
    squares = apart**2
    n, classes = len(labels), len(np.unique(labels))
    if classes < 2 or n <= classes:
        return 1.0, 0.0  # nothing to compare, so nothing to report
    total = squares.sum() / (2 * n)

    def ratio(of: NDArray[np.int64]) -> float:
        same = of[:, None] == of[None]
        within = (squares * same / same.sum(1)[:, None]).sum() / 2
        return float(((total - within) / (classes - 1)) / max(within / (n - classes), 1e-300))

    seen = ratio(labels)
    rng = np.random.default_rng(0)  # of the permutations: the same run gives the same finding
    larger = sum(ratio(rng.permutation(labels)) >= seen for _ in range(_PERMUTATIONS))
    return seen, (1 + larger) / (1 + _PERMUTATIONS)
