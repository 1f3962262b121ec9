"""Releases of every kind, with weights that matter, for the tests of what reads them without dpsyngen."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dpsyngen
from tests.conftest import TINY_SETTINGS, tiny_arrays

# Name: settings, whether there are classes, channels.
KINDS: dict[str, tuple[dict[str, Any], bool, int]] = {
    "dpdm": ({"stages": {"variant": "dpdm"}}, True, 1),
    "both": ({"stages": {"variant": "both"}}, True, 1),
    "shared": ({"stages": {"variant": "both", "networks": "shared", "pretrain": True}}, True, 1),
    "cleaning": ({"stages": {"variant": "cleaning"}, "network": {"size": "tiny"}}, False, 3),
    "residual": ({"stages": {"variant": "residual", "tau_coarse": 1.0}}, False, 1),
    "residual-prior": (
        {"stages": {"variant": "residual", "tau_coarse": 1.0}, "network": {"prior": "shipped"}},
        *(True, 1),
    ),
    "instant": (
        {"stages": {"variant": "instant", "tau_coarse": 1.0}},
        *(True, 1),
    ),
    "gaussian": ({"stages": {"variant": "gaussian"}}, True, 1),
    "gaussian-colour": ({"stages": {"variant": "gaussian"}}, False, 3),
}


def make_release(kind: str, folder: Path, **privacy: Any) -> Path:
    """The release of a tiny run whose networks were then filled with random numbers.

    A few steps leave a network's answers next to nothing, and whatever were wrong with it would not show.
    """
    changes, with_classes, channels = KINDS[kind]
    settings = {k: v | changes.get(k, {}) for k, v in TINY_SETTINGS.items()} | ({"privacy": privacy} if privacy else {})
    if not with_classes:
        settings["sampling"] = settings["sampling"] | {"guidance": 1.0}
    images, labels = tiny_arrays()
    if channels == 3:
        images = np.stack([images, images[::-1], 255 - images], -1)
    data = (images, labels if with_classes else None)
    release = dpsyngen.train(data, epsilon=4.0, out=folder / kind, settings=settings).release
    for file in (release / "weights").glob("*.safetensors"):
        if file.stem != "gaussian":
            rng = torch.Generator().manual_seed(zlib.crc32(file.stem.encode()))
            tensors = {k: torch.randn(v.shape, generator=rng) * 0.15 for k, v in load_file(file).items()}
            save_file(tensors, file)
    return release


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A release of each of ``KINDS``; do not change them."""
    folder = tmp_path_factory.mktemp("releases")
    return {kind: make_release(kind, folder) for kind in KINDS}
