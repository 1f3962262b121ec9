"""Denoisers trained on public images alone, for measuring; each is kept in a file named by all that decides it.

Unlike the experts of a run they are trained on *all* noise levels alike (log σ uniform), so that what they answer at
the ends of the axis is what they learned there and not what they guess.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.ema import Ema
from dpsyngen.diffusion.noise_levels import NoiseLevels
from dpsyngen.errors import RunError
from dpsyngen.files import write_atomically
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import Program
from dpsyngen.thresholds.gap import HIGHEST, LOWEST
from dpsyngen.training.checkpoint import TrainState
from dpsyngen.training.networks import load_weights, make_denoiser
from dpsyngen.training.plan import Shape
from dpsyngen.training.public import PublicStep, train_public
from dpsyngen.training.tensor_file import save_file
from dpsyngen.workers import Workers

FIRST_IMAGE = 10**12
"""Programs' images from here on are for measuring and for the networks of this module; no run gets that far."""

_PER_SEED = 10**9


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenImages(Program):
    """Public images of the user's in the place of a program: image i is the i-th of them.

    Attributes:
        images: uint8 [N, C, H, W].
    """

    name: ClassVar[str] = "given-images"
    prior_tier: ClassVar[int] = 2
    images: NDArray[np.uint8] = field(repr=False)

    def _draw(self, indices: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
        out[:] = self.images[indices.astype(np.int64)]

    def config(self) -> dict[str, Any]:
        """What tells these images from others."""
        return {"name": self.name, "images": len(self.images), "sha256": self._digest}

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.images).tobytes()).hexdigest()


@dataclass(frozen=True)
class Family:
    """One kind of public images.

    Attributes:
        label: what it is called in tables; unique.
        program: what draws it.
    """

    label: str
    program: Program

    @property
    def given(self) -> bool:
        """Whether it is a fixed number of images rather than a program."""
        return isinstance(self.program, GivenImages)

    def measuring_images(self, count: int) -> NDArray[np.uint8]:
        """The first `count` images of a program that no network here was trained on, uint8 [count, C, H, W]."""
        if self.given:
            raise ValueError("given images are set aside by whoever gives them.")
        return self.program.batch(range(FIRST_IMAGE, FIRST_IMAGE + count))


def every_level() -> NoiseLevels:
    """log σ uniform over the whole axis (to 0.2 %: a normal density much wider than the interval it is cut to)."""
    return NoiseLevels((LOWEST + HIGHEST) / 2, 10 * (HIGHEST - LOWEST), LOWEST, HIGHEST)


class PublicDenoisers:
    """Trains unconditional denoisers and keeps them.

    Args:
        folder: of the files, made if need be.
        config: network and public training; the rest is not looked at.
        shape: resolution and channels; classes are not looked at.
        device: where to compute.
        workers: threads that share a batch.
    """

    def __init__(self, folder: Path, config: Config, shape: Shape, device: str, workers: Workers) -> None:
        self.folder, self.config, self.shape, self.device, self.workers = folder, config, shape, device, workers

    def key(self, family: Family, seed: int) -> str:
        """A digest of all that decides the weights, 64 hexadecimal digits."""
        decides = {
            "format": "dpsyngen-public-denoiser-1",
            "program": family.program.config(),
            "seed": seed,
            "resolution": self.shape.resolution,
            "channels": self.shape.channels,
            "network": self.config.network.model_dump(mode="json", include={"size", "sigma_data"}),
            "public": self.config.public.model_dump(mode="json", exclude={"checkpoint_every"}),
            "log_sigma": [LOWEST, HIGHEST],
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def path(self, family: Family, seed: int) -> Path:
        """The file of the weights."""
        return self.folder / f"{family.label}-{seed}-{self.key(family, seed)[:16]}.safetensors"

    def get(
        self, family: Family, seed: int, on_progress: Callable[[int, float], None] | None = None
    ) -> NetworkDenoiser:
        """The network of a family and seed: read, or trained from where an interrupted call left it.

        Args:
            family: what to train on.
            seed: decides the start, the images and the noise levels; public.
            on_progress: called with the number of steps that are done and the loss.

        Raises:
            RunError: the file of the weights is damaged, or training diverged.
        """
        # The start is independent between families, too: networks that share it would be alike in their faults.
        start = int(self.key(family, seed)[:15], 16)
        denoiser = make_denoiser(self.config, self.shape, False, start).to(self.device)
        path = self.path(family, seed)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._train(family, seed, start, denoiser, path, on_progress)
        load_weights(path, denoiser)
        return denoiser.eval()

    def _train(
        self,
        family: Family,
        seed: int,
        start: int,
        denoiser: NetworkDenoiser,
        path: Path,
        on_progress: Callable[[int, float], None] | None,
    ) -> None:
        c = self.config.public
        offset = 0 if family.given else FIRST_IMAGE + _PER_SEED * (seed + 1)
        if isinstance(family.program, GivenImages):
            c = c.model_copy(update={"distinct": len(family.program.images)})
        take = PublicStep(family.program, every_level(), c, Randomness.from_insecure_seed(start), offset, self.workers)
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=c.learning_rate)
        state = TrainState(denoiser, Ema(denoiser, c.ema), {"public": optimizer})
        unfinished = path.with_suffix(".unfinished")
        _restore(unfinished, state, c.steps)
        for progress in train_public("public", state, take):
            if not math.isfinite(progress.values["loss"]):
                raise RunError(
                    f"training on {family.label} diverged at step {progress.step}: its loss is not finite.  Use a "
                    "lower learning rate: --set public.learning_rate=…"
                )
            if progress.step % c.checkpoint_every == 0 and progress.step < c.steps:
                _save(unfinished, state)
            if on_progress is not None:
                on_progress(progress.step, progress.values["loss"])
        average = {k: v.detach().cpu().contiguous() for k, v in state.ema.average.items()}
        write_atomically(path, lambda p: save_file(average, p))
        unfinished.unlink(missing_ok=True)


def _save(path: Path, state: TrainState) -> None:
    counts = json.dumps({"step": state.step, "ema_steps": state.ema.steps})
    tensors = {k: v.cpu() for k, v in state.tensors().items()}
    write_atomically(path, lambda p: save_file(tensors, p, {"dpsyngen": counts}))


def _restore(path: Path, state: TrainState, steps: int) -> None:
    """Go on from an unfinished file; one that cannot be read counts for nothing, as it is only time."""
    try:
        with safe_open(path, framework="pt") as f:
            counts = json.loads(f.metadata()["dpsyngen"])
            tensors = {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
        step, ema_steps = int(counts["step"]), int(counts["ema_steps"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return
    if 0 <= step <= steps and state.misfit(tensors) is None:
        state.restore(tensors, step, ema_steps)
