"""Small data, small settings and one-thread defaults that all tests share."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors run faster on one thread, and other work on the machine cannot stall them."""
    import torch

    torch.set_num_threads(1)


def tiny_arrays(seed: int = 0, n: int = 60, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """n random 8x8 grey images with labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 8, 8), dtype=np.uint8), (np.arange(n) % classes).astype(np.int64)


TINY_SETTINGS = {
    # Everything that presets set, so that tests do not depend on them.
    "network": {"size": "nano", "noise_mean": -1.2, "noise_std": 1.2, "label_dropout": 0.1},
    "stages": {"variant": "both", "tau_cleaning": -3.0, "tau_coarse": 2.0},
    "public": {"steps": 3, "batch": 4, "copies": 1},
    "private": {
        **{"steps": 6, "batch": 12, "copies": 2, "physical_batch": 5, "checkpoint_every": 2},
        **{"learning_rate": 5e-3, "warmup": 0, "schedule": "constant", "ema": 0.99, "clipping": "flat"},
    },
    "sampling": {"sampler": "dpmpp", "steps": 3, "sigma_min": 0.002, "rho": 7.0, "guidance": 2.0},
}


@pytest.fixture
def tiny_settings() -> dict:
    """Settings of a run that takes about a second."""
    return {k: dict(v) for k, v in TINY_SETTINGS.items()}


@pytest.fixture
def tiny_images():
    """Makes small data sets: ``tiny_images(seed)``."""
    return tiny_arrays


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from dpsyngen.cli import main

        monkeypatch.setattr(sys, "argv", ["dpsyngen", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        out = capsys.readouterr()
        assert "Traceback" not in out.err + out.out
        return code, out.out, out.err

    return run
