"""A small release, made without training: what a stranger's folder is compared with."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from dpsyngen.config import Config
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.unet import UNet
from dpsyngen.version import FORMAT, __version__


@cache
def weights(classes: int) -> bytes:
    """The weights file of a nano network for 8×8 grey images."""
    torch.manual_seed(0)
    return save(NetworkDenoiser(UNet("nano", 8, 1, classes), classes).state_dict())


def description() -> dict[str, Any]:
    """``generator.json`` of a generator with a public and a private stage."""
    return {
        "format": FORMAT,
        "dpsyngen": __version__,
        "resolution": 8,
        "channels": 1,
        "class_names": ["cat", "dog"],
        "stages": [
            {"name": n, "log_sigma_low": low, "log_sigma_high": high, "trained_by": by, "network": n}
            for n, low, high, by in (("context", None, 2.0, "private"), ("coarse", 2.0, None, "public"))
        ],
        "network": {"size": "nano", "sigma_data": 0.5},
        "conditional": {"context": True, "coarse": False},
        "sampling": {**Config().sampling.model_dump(mode="json"), "steps": 3},
        "private": True,
    }


def make_release(folder: Path) -> Path:
    """Write the release into ``folder``, which is made."""
    (folder / "weights").mkdir(parents=True)
    (folder / "generator.json").write_text(json.dumps(description()))
    (folder / "weights" / "context.safetensors").write_bytes(weights(2))
    (folder / "weights" / "coarse.safetensors").write_bytes(weights(0))
    return folder
