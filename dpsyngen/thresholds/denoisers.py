"""The denoisers that are compared: networks trained on public images alone, and what two moments of images give.

Each network is kept in a file that is named by all that decides its weights.  Unlike the experts of a run they are
trained on *all* noise levels alike (log σ uniform), so that what they answer at the ends of the axis is learned there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import Ema, NetworkDenoiser
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.diffusion.loss import NoiseLevels
from dpsyngen.errors import DataError, RunError
from dpsyngen.files import write_atomically
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import Program
from dpsyngen.thresholds.gap import HIGHEST, LOWEST
from dpsyngen.training.checkpoint import TrainState, save_file
from dpsyngen.training.networks import load_weights, make_denoiser, with_prior
from dpsyngen.training.plan import Shape
from dpsyngen.training.public import PublicStep, train_public
from dpsyngen.workers import Workers

FIRST_IMAGE = 10**12
"""Programs' images from here on are for measuring and for the networks of this module; no run gets that far."""

_PER_SEED = 10**9

PROXY, WIENER, PRIOR = "proxy", "wiener", "prior"
"""What the proxy, the filter that knows its mean and covariance, and the network that programs trained to read these
are called among the families."""

MOST_PIXELS = 4096
"""Beyond that the Wiener filter is left out: its covariance matrix would take minutes and gigabytes."""

_CHUNK = 4096  # images in float64 at a time
_FOR_MOMENTS = 8192  # images of a program


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenImages(Program):
    """Public images of the user's in the place of a program: image i is the i-th of `images`, uint8 [N, C, H, W]."""

    name: ClassVar[str] = "given-images"
    prior_tier: ClassVar[int] = 2
    images: NDArray[np.uint8] = field(repr=False)

    def _draw(self, indices: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
        out[:] = self.images[indices.astype(np.int64)]

    def config(self) -> dict[str, Any]:
        """What tells these images from others."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data).hexdigest()
        return {"name": self.name, "images": len(self.images), "sha256": digest}


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of public images."""

    label: str  # what it is called in tables; unique
    program: Program  # what draws the images that a network is trained on
    held_out: NDArray[np.uint8] | None = None  # of given images, those to measure on, [N, C, H, W]

    def measuring_images(self, count: int) -> NDArray[np.uint8]:
        """Images that no network here was trained on: those held out, or the first `count` that a program has there."""
        return self.program.batch(range(FIRST_IMAGE, FIRST_IMAGE + count)) if self.held_out is None else self.held_out


def split_proxy(images: NDArray[np.uint8], measured: int) -> Family:
    """Images that the user declares public: `measured` of them, chosen by a fixed seed, are set aside to measure on.

    DataError if there are fewer than twice as many.
    """
    if len(images) < 2 * measured:
        raise DataError(
            f"the proxy has {len(images):,} images, but {measured:,} are set aside to measure on, and as many are the "
            "least to train on: give more, or measure on fewer, --images."
        )
    order = np.random.default_rng(0).permutation(len(images))
    kept, held_out = (np.ascontiguousarray(images[np.sort(part)]) for part in (order[measured:], order[:measured]))
    return Family(PROXY, GivenImages(resolution=kept.shape[-1], channels=kept.shape[1], images=kept), held_out)


def every_level() -> NoiseLevels:
    """log σ uniform over the whole axis (to 0.2 %: a normal density much wider than the interval it is cut to)."""
    return NoiseLevels((LOWEST + HIGHEST) / 2, 10 * (HIGHEST - LOWEST), LOWEST, HIGHEST)


@dataclass(frozen=True)
class PublicDenoisers:
    """Trains unconditional denoisers and keeps them.

    They start from nothing, or from a prior that is shown the moments of the same images, as a run's private network.
    """

    folder: Path  # of the files, made if need be
    config: Config  # network and public training; the rest is not looked at
    shape: Shape  # resolution and channels; classes are not looked at
    device: str  # where to compute
    workers: Workers  # share a batch
    prior: str | None = None  # SHA-256 of the prior to start from

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
        } | ({} if self.prior is None else {"prior": self.prior})
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def path(self, family: Family, seed: int) -> Path:
        """The file of the weights."""
        return self.folder / f"{family.label}-{seed}-{self.key(family, seed)[:16]}.safetensors"

    def get(self, family: Family, seed: int, on_progress: Callable[[int], None] | None = None) -> NetworkDenoiser:
        """The network of a family and seed: read, or trained.

        The seed, which is public, decides the start, the images and the noise levels; `on_progress` is called with the
        number of steps that are done.  RunError if the file of the weights is damaged, or training diverged.
        """
        # The start differs between families, too: networks with a common start would share their errors.
        start, path = int(self.key(family, seed)[:15], 16), self.path(family, seed)
        if self.prior is None:
            denoiser = make_denoiser(self.config, self.shape, False, start).to(self.device)
        else:
            denoiser = self.reading(self.filter(family)).train()
        if not path.exists():
            c, offset = self.config.public, FIRST_IMAGE + _PER_SEED * (seed + 1)
            if isinstance(family.program, GivenImages):
                c, offset = c.model_copy(update={"distinct": len(family.program.images)}), 0
            randomness = Randomness.from_insecure_seed(start)
            take = PublicStep(family.program, every_level(), c, randomness, offset, self.workers)
            optimizer = torch.optim.Adam(denoiser.parameters(), lr=c.learning_rate)
            state = TrainState(denoiser, Ema(denoiser, c.ema), {"public": optimizer})
            for progress in train_public("public", state, take):
                if not math.isfinite(progress.values["loss"]):
                    where = f"training on {family.label} diverged at step {progress.step}"
                    raise RunError(f"{where}: use a lower learning rate, --set public.learning_rate=….")
                if on_progress is not None:
                    on_progress(progress.step)
            weights = {name: tensor.detach().cpu() for name, tensor in state.ema.average.items()}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: save_file(weights, temporary))
        load_weights(path, denoiser)
        return denoiser.eval()

    def filter(self, family: Family) -> GaussianDenoiser:
        """The Wiener filter of images that networks of a family are trained on, of ``MOST_PIXELS`` at most."""
        program, first = family.program, FIRST_IMAGE + _PER_SEED
        drawn = range(first, first + _FOR_MOMENTS)
        found = wiener_filter(program.images if isinstance(program, GivenImages) else program.batch(drawn))
        assert found is not None
        return found.to(self.device)

    def reading(self, moments: GaussianDenoiser) -> NetworkDenoiser:
        """The prior that a training by these settings starts from, shown `moments`."""
        return make_denoiser(with_prior(self.config), self.shape, False, 0, moments).to(self.device).eval()


def wiener_filter(images: NDArray[np.uint8]) -> GaussianDenoiser | None:
    """The best affine denoiser of images, uint8 [n, C, H, W]: the optimal one of a Gaussian with their mean and
    covariance; None with more than ``MOST_PIXELS`` pixels.
    """
    d = int(np.prod(images.shape[1:]))
    if d > MOST_PIXELS:
        return None
    total, second = np.zeros(d), np.zeros((d, d))
    for start in range(0, len(images), _CHUNK):
        x = images[start : start + _CHUNK].reshape(-1, d).astype(np.float64) / 127.5 - 1
        total += x.sum(0)
        second += x.T @ x
    mean = total / len(images)
    covariance = second / len(images) - np.outer(mean, mean)
    tensors = mean[None], np.eye(d), covariance[None], np.zeros(d), np.ones(d), np.ones(1)
    c, h, w = images.shape[1:]
    return GaussianDenoiser(ClassGaussians(*map(torch.from_numpy, tensors)), (c, h, w))
