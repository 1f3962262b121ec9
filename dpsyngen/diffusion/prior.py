"""A denoiser that reads the moments of a set: D = G + s ⊙ F(c_in·x, G, s/σ, r(x - x̄); log σ).

G is the Wiener filter of the set's DP moments and s the standard deviation of each pixel that it leaves.  F is trained
on thousands of families of programs, each with moments of its own, and is shown which family it is in by G and s only.
So it learns what a picture with such moments looks like, and denoises a set that it has never seen, given that set's
moments (amortised empirical Bayes), at no privacy cost but theirs.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.diffusion.denoiser import UNIFORM_PRIOR_SIGMA, NetworkDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.unet import UNet, shapes_alone
from dpsyngen.errors import ConfigError
from dpsyngen.files import write_bytes

SHIPPED = "shipped"
"""Name of the priors that come with the package, one for grey images and one for colour."""

PRIOR_SIZE = "prior"
"""Of the network F, in :data:`dpsyngen.diffusion.unet.SIZES`."""

PRIOR_FORMAT = "dpsyngen prior 1"
_FILES = {1: "grey", 3: "colour"}


class PriorDenoiser(NetworkDenoiser):
    """D = G(x; σ, y) + s(σ, y) ⊙ F([c_in·x, G, s/σ, r(x - x̄)], c_noise, y).

    c_in = 1/√(σ² + 1), and λ = 1 / mean s²: the loss of each σ is 1 where F = 0 and the data are as their moments say,
    as EDM's is at the start.  F ends in a layer that starts at almost 0, so training starts from G.

    The moments are constants: only the network F(input [N, 4C, H, W], c_noise [N], classes [N] or None) has parameters
    and an entry in ``state_dict``; it knows no class where `num_classes` is 0.
    """

    def __init__(self, network: nn.Module, num_classes: int, gaussian: GaussianDenoiser) -> None:
        super().__init__(network, num_classes, UNIFORM_PRIOR_SIGMA, gaussian)

    @property
    def gaussian(self) -> GaussianDenoiser:
        """G, which is not trained, saved or released with the network."""
        gaussian = self._gaussian[0]
        assert isinstance(gaussian, GaussianDenoiser)
        return gaussian

    def weight(self, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """λ = 1 / mean s², [N]."""
        with torch.no_grad():
            return self.gaussian.left(sigma, labels).square().flatten(1).mean(1).reciprocal()

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move G along with the network (``.to(device)``)."""
        self._gaussian[0] = self.gaussian._apply(fn, recurse)
        return super()._apply(fn, recurse)


SEEN = 4
"""Channels that F sees for each channel of an image."""


def network_input(x: Tensor, sigma: Tensor, base: Tensor, left: Tensor) -> Tensor:
    """What F sees of rows x [N, C, H, W] at levels sigma [N], [N, 4C, H, W].

    c_in·x, G, s/σ, and the difference of x from its mean x̄ over 3x3 pixels in units of the noise, r(d) = 2 tanh(d/2σ).
    At small σ the noise is far below the size of x, but it is what F has to tell from the picture.
    """
    level = sigma.view(-1, 1, 1, 1)
    near = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    grain = 2 * torch.tanh((x - near) / (2 * level))
    return torch.cat([x * (level.square() + 1).rsqrt(), base, left / level, grain], 1)


@dataclass(frozen=True)
class Prior:
    """Weights of F that programs alone trained, and how.

    Attributes:
        weights: of a network of size "prior" without classes, fp32.
        about: ``format``, ``channels``, ``sha256`` of the weights, and how they were trained: ``seed``, ``steps``, ….
    """

    weights: dict[str, Tensor]
    about: dict[str, Any]

    @classmethod
    def of(cls, weights: dict[str, Tensor], **about: Any) -> Prior:
        """A prior of weights, which are rounded to 16 bits, as its file keeps them."""
        rounded = {name: w.detach().cpu().half().float().contiguous() for name, w in sorted(weights.items())}
        return cls(rounded, {"format": PRIOR_FORMAT, **about, "sha256": digest(rounded)})

    def save(self, path: Path) -> None:
        """Write a safetensors file with 16-bit weights."""
        halves = {name: w.half() for name, w in self.weights.items()}
        write_bytes(path, save(halves, {"prior": json.dumps(self.about, sort_keys=True)}), 0o644)


def read_prior(prior: str, channels: int) -> Prior:
    """Read a prior: "shipped", or a file of ``dpsyngen prior train``; ConfigError if it is none for `channels`."""
    if prior == SHIPPED:
        path = Path(str(resources.files("dpsyngen") / "diffusion" / "priors" / f"{_FILES[channels]}.safetensors"))
    else:
        path = Path(prior)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["prior"])
            weights = {name: file.get_tensor(name).float() for name in sorted(file.keys())}
        if about["format"] != PRIOR_FORMAT or about["sha256"] != digest(weights):
            raise ValueError("its weights are not those that its description was written for")
        with shapes_alone():
            wanted = UNet(PRIOR_SIZE, 32, about["channels"], 0, inputs=SEEN * about["channels"]).state_dict()
        if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in wanted.items()}:
            raise ValueError("its weights are of another network")
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("its weights are not finite")
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"network.prior is {prior!r}, which is no prior ({reason}).  Give {SHIPPED!r}, or a file that "
            "dpsyngen prior train made."
        ) from None
    if about.get("channels") != channels:
        raise ConfigError(
            f"the prior {prior!r} is for images of {about.get('channels')} channels, but these have {channels}: give "
            "another to network.prior."
        )
    return Prior(weights, about)


def digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes and 16-bit values, so of a prior's weights in its file and in a release alike."""
    made = hashlib.sha256()
    for name, w in sorted(weights.items()):
        made.update(f"{name} {list(w.shape)}\n".encode() + w.half().numpy().tobytes())
    return made.hexdigest()
