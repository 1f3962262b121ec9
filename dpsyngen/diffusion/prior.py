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

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dpsyngen.diffusion.unet import UNet, shapes_alone
from dpsyngen.errors import ConfigError
from dpsyngen.files import write_bytes

SHIPPED = "shipped"
"""Name of the priors that come with the package, one for grey images and one for colour."""

PRIOR_SIZE = "prior"
"""Of the network F, in :data:`dpsyngen.diffusion.unet.SIZES`."""

PRIOR_FORMAT = "dpsyngen prior 1"
_FILES = {1: "grey", 3: "colour"}

SEEN = 4
"""Channels that F sees for each channel of an image."""


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
