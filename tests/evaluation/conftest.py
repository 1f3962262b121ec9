"""torch-fidelity, the reference implementation that metrics are compared with."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

FIDELITY = Path(sys.prefix) / "torch-fidelity"
"""Beside the other packages, not among them: it brings a package called "tests", which would stand before ours."""


@contextmanager
def stand_in_for_torchvision() -> Iterator[None]:
    """torch-fidelity imports torchvision, whose wheels do not load beside a CPU build of torch.

    What is compared here never calls it: torchvision has data sets and other networks there.
    """
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    before = {name: sys.modules.get(name) for name in names}
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], name, type(name, (), {}))
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@pytest.fixture(scope="session")
def fidelity() -> SimpleNamespace:
    """The parts of torch-fidelity that take features or images: modules ``fid``, ``kid``, ``prc`` and ``inception``."""
    if not (FIDELITY / "torch_fidelity").is_dir():
        pytest.skip(f"torch-fidelity is not in {FIDELITY}: `make setup` puts it there")
    parts = {
        "fid": "metric_fid",
        "kid": "metric_kid",
        "prc": "metric_prc",
        "inception": "feature_extractor_inceptionv3",
    }
    sys.path.append(str(FIDELITY))
    try:
        with stand_in_for_torchvision():
            return SimpleNamespace(
                **{short: importlib.import_module(f"torch_fidelity.{name}") for short, name in parts.items()}
            )
    finally:
        sys.path.remove(str(FIDELITY))
