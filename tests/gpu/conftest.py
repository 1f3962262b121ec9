"""Each test here runs on the CPU, which shows that it is right, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dpsyngen.hardware import Compute, choose
from tests.tf32 import tf32_allowed

NO_GPU = "no GPU that PyTorch can use: `dpsyngen doctor` says why"
needs_gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def compute(request: pytest.FixtureRequest) -> Iterator[Compute]:
    """What is chosen automatically."""
    before = tf32_allowed()
    yield choose(request.param)
    assert tf32_allowed() == before


@pytest.fixture
def device(compute: Compute) -> str:
    """Its name."""
    return compute.device
