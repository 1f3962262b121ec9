"""A run on a device, from images to drawn images, is that of a CPU up to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpsyngen.config import load_config
from dpsyngen.data import load_images
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.hardware import Compute
from tests.gpu.conftest import needs_gpu
from tests.training.short_runs import finish, merged, start


def trained(device: str, out: Path, settings: dict, images: tuple[np.ndarray, np.ndarray]) -> Path:
    """A release of the default's variant, in the physical batch that fits this device."""
    config = load_config(
        merged(
            settings,
            privacy={"epsilon": 8, "insecure_seed": 7},
            stages={"variant": "residual", "tau_coarse": None},
            network={"prior": "shipped"},
            private={"physical_batch": None, "batch": 40, "copies": 3},
        )
    )
    return finish(start(config, load_images(images), out, device=device)).run.release


def weights(release: Path, name: str) -> dict[str, Tensor]:
    return load_file(release / "weights" / f"{name}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("compute", [pytest.param("cuda", marks=needs_gpu)], indirect=True)  # a CPU's is itself
def test_a_run_is_that_of_a_cpu(compute: Compute, tmp_path, tiny_settings, tiny_images) -> None:
    """Both begin with the prior and get the same noise, so what DP-SGD changed is the same but for rounding."""
    cpu = trained("cpu", tmp_path / "cpu", tiny_settings, tiny_images())
    own = trained(compute.device, tmp_path / "own", tiny_settings, tiny_images())
    before, expected, got = weights(cpu, "prior"), weights(cpu, "context"), weights(own, "context")

    def change(after: dict[str, Tensor]) -> Tensor:
        return torch.cat([(after[name] - w).flatten() for name, w in before.items() if after[name].shape == w.shape])

    assert change(expected).norm() > 0
    assert (change(got) - change(expected)).norm() <= 0.1 * change(expected).norm()
    pictures = [
        ReleasedGenerator(release, device).sample(6, seed=1).images.astype(int)
        for release, device in ((cpu, "cpu"), (own, compute.device))
    ]
    assert np.abs(pictures[0] - pictures[1]).mean() <= 3
