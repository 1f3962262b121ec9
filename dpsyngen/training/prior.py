"""Training of the prior: one network for thousands of families of programs, each with DP moments of its own.

A task is a data set of one to six families (:class:`dpsyngen.programs.tasks.Family`; in colour, where photographs have
to be expected, :class:`dpsyngen.programs.tasks.Scene`), which stand for its classes.  Its moments are estimated by the
code that a private run uses, with noise as anything from ε = 0.1 on 2,000 images to ε = 10 on 2 million would bring.
F is trained on fresh images of the same families, which the moments have not seen.
No private data can reach the result: it follows from a seed and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpsyngen.data import ImageDataset
from dpsyngen.diffusion.denoiser import Ema
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.prior import PRIOR_SIZE, SEEN, Prior
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.diffusion.standalone import network_input
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import ConfigError, require
from dpsyngen.files import write_atomically
from dpsyngen.full_precision import ordinary_modes
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import Program, make_program
from dpsyngen.training.moments import estimate_moments
from dpsyngen.training.plan import plan_moments
from dpsyngen.training.public import set_learning_rate

MOST_CLASSES = 6
IMAGES, FRESH = 1200, 120  # of a family: for its moments, and to train on
NOISE = (-6.5, -1.9)  # log₁₀ of z/n: from ε = 10 on 2 million images to ε = 0.1 on 2,000
LEVELS = (-3.7, -3.0, -2.3, -1.6, -0.9, -0.2, 0.5, 1.2)
"""log σ at which a prior is compared with the Wiener filter."""

PROGRAMS = {1: "family", 3: "scene"}  # that tasks are made of, by channels

_ROWS = 16  # of a task in a step


class _Size(NamedTuple):
    share: float  # of the steps
    pool: int  # tasks at a time
    rows: int  # of a batch
    fresh: float  # new tasks for a step of the training


# Large images cost most: eigenvectors of their moments, and convolutions.
SIZES: dict[int, dict[int, _Size]] = {
    1: {
        8: _Size(0.12, 8, 256, 0.02),
        16: _Size(0.16, 12, 256, 0.03),
        28: _Size(0.40, 32, 128, 0.08),
        32: _Size(0.24, 16, 96, 0.04),
        48: _Size(0.08, 3, 48, 0.003),
    },
    3: {
        8: _Size(0.15, 8, 256, 0.03),
        16: _Size(0.35, 16, 256, 0.05),
        24: _Size(0.30, 12, 128, 0.015),
        32: _Size(0.20, 8, 96, 0.003),
    },
}


@dataclass(frozen=True)
class PriorSettings:
    """What a prior follows from, to the last bit on one kind of machine.

    Attributes:
        channels: 1 or 3.
        seed: of families, moments, batches and initial weights; public.
        steps: of Muon, 1 to 10⁸.
        learning_rate: of Muon at its highest, and ten times that of Adam, which trains what is no matrix; it rises over
            100 steps and falls as a cosine.
        ema: of the weights, < 1.
    """

    channels: int = 1
    seed: int = 0
    steps: int = 3000
    learning_rate: float = 0.02
    ema: float = 0.998

    def __post_init__(self) -> None:
        require(self.channels in SIZES, "channels", self.channels, "1 (grey) or 3 (colour)")
        require(1 <= self.steps <= 10**8, "steps", self.steps, "from 1 to 100,000,000")
        require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2⁶³ − 1")


@dataclass(frozen=True)
class Task:
    """Images of each class that its moments have not seen, uint8 [K, n, C, S, S], and the moments' Wiener filter."""

    images: Tensor
    gaussian: GaussianDenoiser


def make_task(programs: list[Program], noise: float, seed: int, images: int = IMAGES, fresh: int = FRESH) -> Task:
    """A data set whose classes are images of programs of one size.

    `noise` is z/n of the moments: the noise multiplier of all queries together over the number of records; `seed` is of
    that noise.  `images` of each class are for the moments, `fresh` for the task.
    """
    classes = len(programs)
    drawn = [p.batch(range(images + fresh)) for p in programs]
    known, n = np.concatenate([d[:images] for d in drawn]), images * classes
    labels = np.repeat(np.arange(classes), images) if classes > 1 else None
    names = tuple(f"{i}" for i in range(classes)) if classes > 1 else ()
    moments = estimate_moments(
        ImageDataset(known, labels, names, "families of programs"),
        classes if classes > 1 else 0,
        n,
        plan_moments(noise * n, classes),
        Randomness.from_insecure_seed(seed),
        rank=200,
    )
    shape = (programs[0].channels, programs[0].resolution, programs[0].resolution)
    return Task(torch.from_numpy(np.stack([d[images:] for d in drawn])), GaussianDenoiser(moments, shape))


def family_task(settings: PriorSettings, size: int, number: int) -> Task:
    """Task `number` of the endless stream at a size."""
    rng = np.random.default_rng([settings.seed, size, number])
    count = int(rng.integers(1, MOST_CLASSES + 1))
    programs = [
        make_program(
            PROGRAMS[settings.channels],
            resolution=size,
            channels=settings.channels,
            seed=settings.seed,
            number=8 * number + k,
        )
        for k in range(count)
    ]
    return make_task(programs, 10 ** rng.uniform(*NOISE), int(rng.integers(2**62)))


class _Rows(NamedTuple):
    clean: Tensor  # x₀, [N, C, S, S]
    noisy: Tensor  # x
    sigma: Tensor  # σ, [N]
    base: Tensor  # G
    left: Tensor  # s


@torch.no_grad()
def _rows(task: Task, sigma: Tensor, generator: torch.Generator) -> _Rows:
    count, (classes, images) = len(sigma), task.images.shape[:2]
    labels = torch.randint(0, classes, (count,), generator=generator)
    clean = to_float(task.images[labels, torch.randint(0, images, (count,), generator=generator)])
    noisy = clean + sigma.view(-1, 1, 1, 1) * torch.randn(clean.shape, generator=generator)
    return _Rows(clean, noisy, sigma, task.gaussian(noisy, sigma, labels), task.gaussian.left(sigma, labels))


def _denoised(network: UNet, r: _Rows) -> Tensor:
    """D = G + s ⊙ F."""
    return r.base + r.left * network(network_input(r.noisy, r.sigma, r.base, r.left), r.sigma.log() / 4)


@torch.no_grad()
def error_ratios(network: UNet, task: Task, count: int = 256) -> list[float]:
    """The squared error of D over that of the Wiener filter, at each of ``LEVELS``; below 1 where the prior helps."""
    generator, out = torch.Generator().manual_seed(5), []
    for level in LEVELS:
        r = _rows(task, torch.full((count,), math.exp(level)), generator)
        out.append(float((_denoised(network, r) - r.clean).square().mean() / (r.base - r.clean).square().mean()))
    return out


def held_out(settings: PriorSettings) -> dict[str, Task]:
    """Tasks that no training sees: families of another stream, and a program that is in no family."""
    other = PriorSettings(settings.channels, seed=(settings.seed + 1) % 2**63)
    sizes = [s for s in SIZES[settings.channels] if s <= 28]
    alien = make_program("random-network", resolution=16, channels=settings.channels, seed=settings.seed)
    name = {1: "families", 3: "scenes"}[settings.channels]
    return {f"{name} at {s}": family_task(other, s, 0) for s in sizes} | {
        "random-network at 16": make_task([alien], 1e-4, 0)
    }


@ordinary_modes()
def train_prior(
    settings: PriorSettings,
    checkpoint: Path | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    every: int = 25,
) -> Prior:
    """Train a prior; a function of the settings alone.

    `checkpoint` is a file to go on from, where it is there, and to keep the state in `every` so many steps; `on_step`
    is told the number of each step that is done, and its loss (1 for the Wiener filter).
    """
    sizes = SIZES[settings.channels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = UNet(PRIOR_SIZE, 32, settings.channels, 0, inputs=SEEN * settings.channels)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _Optimizer(network)
    ema, begin = Ema(network, settings.ema), 0
    if checkpoint is not None and checkpoint.exists():
        begin = _restore(checkpoint, settings, network, optimizer, ema)
    tasks: dict[tuple[int, int], Task] = {}
    for step in range(begin, settings.steps):
        rng = np.random.default_rng([settings.seed, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        size = int(rng.choice(list(sizes), p=[s.share for s in sizes.values()]))
        about = sizes[size]
        last = about.pool + int(step * about.fresh)  # tasks last - pool … last - 1 are in use
        for old in [key for key in tasks if key[0] == size and key[1] < last - about.pool]:
            del tasks[old]
        parts = []
        for number in rng.integers(last - about.pool, last, about.rows // _ROWS).tolist():
            if (size, number) not in tasks:
                tasks[size, number] = family_task(settings, size, number)
            # Log-normal as in EDM, a little lower and wider, cut to the levels below which a Gaussian says all.
            sigma = (-1.5 + 1.3 * torch.randn(_ROWS, generator=generator)).clamp(-4.5, 1.8).exp()
            parts.append(_rows(tasks[size, number], sigma, generator))
        r = _Rows(*(torch.cat(t) for t in zip(*parts, strict=True)))
        error = (_denoised(network, r) - r.clean).square().flatten(1).mean(1)
        # Over the error of the Wiener filter; a row that the moments got wrong must not rule the step.
        loss = (error / r.left.square().flatten(1).mean(1)).clamp(max=20).mean()
        rate = min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps))
        network.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step(settings.learning_rate * rate)
        ema.update(network)
        on_step(step + 1, float(loss.detach()))
        if checkpoint is not None and (step + 1) % every == 0:
            _keep(checkpoint, settings, step + 1, network, optimizer, ema)
    network.load_state_dict(ema.average)
    ratios = {name: [round(v, 3) for v in error_ratios(network, task)] for name, task in held_out(settings).items()}
    return Prior.of(
        network.state_dict(),
        **_asked(settings),
        error_over_wiener={"log_sigma": list(LEVELS)} | ratios,
    )


def _asked(settings: PriorSettings) -> dict[str, Any]:
    """What a training is known by."""
    return asdict(settings) | {"programs": PROGRAMS[settings.channels]}


class _Optimizer:
    """Muon (Jordan, 2024) for matrices and kernels, Adam for the rest.

    A kernel [O, I, h, w] is the matrix [O, h·w·I].  Those of fewer than 16 rows or columns are Adam's.
    """

    def __init__(self, network: UNet) -> None:
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for p in network.parameters():
            (matrices if p.ndim > 1 and min(len(p), p[0].numel()) >= 16 else rest).append(p)
        self._pairs = [(p, _matrix(p.detach())) for p in matrices]
        self._muon = torch.optim.Muon([m for _, m in self._pairs], weight_decay=0.0)
        self._adam = torch.optim.Adam(rest, betas=(0.9, 0.99))

    def step(self, learning_rate: float) -> None:
        for p, matrix in self._pairs:
            assert p.grad is not None
            matrix.grad = _matrix(p.grad)
        set_learning_rate(self._muon, learning_rate)
        set_learning_rate(self._adam, 0.1 * learning_rate)
        self._muon.step()
        self._adam.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [self._muon.state_dict(), self._adam.state_dict()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self._muon.load_state_dict(states[0])
        self._adam.load_state_dict(states[1])


def _matrix(t: Tensor) -> Tensor:
    """A view of a kernel in channels-last order, or of a matrix, as [O, -1]."""
    return t.permute(0, 2, 3, 1).view(len(t), -1) if t.ndim == 4 else t


def _keep(path: Path, settings: PriorSettings, step: int, network: UNet, optimizer: _Optimizer, ema: Ema) -> None:
    state = {
        "settings": _asked(settings),
        "step": step,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.average,
        "ema_steps": ema.steps,
    }
    write_atomically(path, lambda p: torch.save(state, p))


def _restore(path: Path, settings: PriorSettings, network: UNet, optimizer: _Optimizer, ema: Ema) -> int:
    """Load what :func:`_keep` wrote; returns the number of steps that are done."""
    try:
        state = torch.load(path, weights_only=True)
        known = state["settings"]
        if known == _asked(settings):
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            ema.average, ema.steps = state["ema"], state["ema_steps"]
            return int(state["step"])
    except Exception as error:  # PyTorch has many for a damaged file
        raise ConfigError(f"{path} is damaged ({type(error).__name__}): remove it to begin anew.") from None
    raise ConfigError(
        f"{path} holds a training with {known}, but {_asked(settings)} were asked for: remove it to begin anew, or go "
        "on with the settings, and the version of dpsyngen, that began it."
    )
