"""Small data, small settings and one-thread defaults that all tests share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, and for all processes that tests start: on two cores that two processes of tests keep busy,
# threads that wait for each other take several times the computing time.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# A run waits 70 times until a file is on the disk.  In memory, where there is room, that takes no time.
if os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")

import hypothesis
import numpy as np
import pytest

from dpsyngen.training.run import Run

# An example may take its time: what else the machine does decides no test.
hypothesis.settings.register_profile("patient", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("patient")

LONGEST = ("test_studio.py", "test_distributed.py", "test_tutorials.py", "test_distributed_tools.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes (``--dist loadgroup``) a file stays in one, and the long files begin first.

    All of ``tests/programs`` is one group: in a fresh clone the programs are compiled, by one process instead of by all
    at once.  A test with a mark ``xdist_group`` of its own may go elsewhere, so that a file of slow tests does not hold
    one core.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            room = item.path.parent.name
            item.add_marker(pytest.mark.xdist_group(room if room == "programs" else f"{room}/{item.path.name}"))
    items.sort(key=lambda item: (item.path.name not in LONGEST, item.path not in slow))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """A short name for a value as long as a file: names of tests go from process to process, over and over."""
    return f"{argname} of {len(val):,}" if isinstance(val, str | bytes) and len(val) > 100 else None


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
        from dpsyngen.cli.app import main

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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run that all tests share: copy it before you change it.  Its images are in ``d.npz`` beside it."""
    import dpsyngen

    folder = tmp_path_factory.mktemp("runs")
    images, labels = tiny_arrays()
    np.savez(folder / "d.npz", images=images, labels=labels)
    return dpsyngen.train(folder / "d.npz", epsilon=4.0, out=folder / "r", settings=TINY_SETTINGS)


@pytest.fixture(scope="session")
def lives() -> Iterator[Any]:
    """Where training processes come from that are killed."""
    from tests.training.crash_lives import Lives

    lives = Lives()
    yield lives
    lives.end()


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dpsyngen.release.signing import make_key

    path = tmp_path_factory.mktemp("keys") / "k.pem"
    make_key(path)
    return path


@pytest.fixture(scope="session")
def bundle(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unsigned, with samples."""
    import dpsyngen
    from dpsyngen.release.bundle import pack

    dpsyngen.write_report(finished)
    return pack(finished, tmp_path_factory.mktemp("bundles") / "b.zip", samples=9, seed=5).path


@pytest.fixture(scope="session")
def signed(finished: Run, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dpsyngen.release.bundle import pack

    return pack(finished, tmp_path_factory.mktemp("bundles") / "s.zip", key=key).path
