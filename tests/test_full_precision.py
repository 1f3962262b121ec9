"""The process has one setting for TF32; exactness wins where threads want different things."""

from __future__ import annotations

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.full_precision import (
    _read,
    _write,
    full_precision,
    in_full_precision,
    ordinary_modes,
    tf32,
)
from tests.tf32 import tf32_allowed


@pytest.fixture(autouse=True)
def _restored():
    before = _read()
    yield
    assert _read() == before


@pytest.fixture
def by_newer_names():
    """A program that set TF32 by the names of PyTorch 2.9, which the older functions then refuse to report."""
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this PyTorch has the older names only")
    before = _read()
    torch.backends.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    yield
    torch.backends.fp32_precision = "none"
    _write(before)


def test_tf32_is_off_within_and_back_after() -> None:
    with tf32(True):
        assert tf32_allowed() == (True, True)
        with full_precision("cpu"), full_precision("cpu"):
            assert tf32_allowed() == (False, False)
        assert tf32_allowed() == (True, True)
        with pytest.raises(KeyError), full_precision("cpu"):
            raise KeyError
        assert tf32_allowed() == (True, True)
        with tf32(False):
            assert tf32_allowed() == (False, False)


def test_it_works_for_programs_that_use_the_newer_names(by_newer_names) -> None:
    assert tf32_allowed() == (True, True)
    before = _read()
    with full_precision("cpu"):
        assert tf32_allowed() == (False, False)
    with tf32(False):
        assert tf32_allowed() == (False, False)
        with tf32(True):
            assert tf32_allowed() == (True, True)
    assert _read() == before


def test_autocast_is_off_within() -> None:
    a = torch.ones(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype is torch.bfloat16
        with full_precision("cpu"):
            assert (a @ a).dtype is torch.float32
        assert in_full_precision(torch.matmul)(a, a).dtype is torch.float32
        assert (a @ a).dtype is torch.bfloat16


def test_reduced_products_of_a_cpu_are_off_too() -> None:
    before = _read()
    torch.set_float32_matmul_precision("medium")  # bf16 on CPUs that have it
    try:
        with full_precision("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        _write(before)


def test_a_thread_that_wants_tf32_waits_for_those_that_need_fp32() -> None:
    inside, asked, seen = threading.Event(), threading.Event(), []

    def exact() -> None:
        with full_precision("cpu"):
            inside.set()
            asked.wait(10)
            seen.append(tf32_allowed())

    thread = threading.Thread(target=exact)
    thread.start()
    inside.wait(10)
    with tf32(True):
        assert tf32_allowed() == (False, False)  # not yet
        asked.set()
        thread.join()
        assert tf32_allowed() == (True, True)
    assert seen == [(False, False)]


def test_a_thread_that_leaves_early_does_not_spoil_the_others() -> None:
    with tf32(True):
        first, second = full_precision("cpu"), full_precision("cpu")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert tf32_allowed() == (False, False)
        second.__exit__(None, None, None)
        assert tf32_allowed() == (True, True)


def test_closed_forms_stay_exact_where_networks_are_rounded() -> None:
    """At σ = 80 an error of 8 bits in the noisy image would be larger than the image."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 4, generator=g, dtype=torch.float64))[0].float()
    gaussians = ClassGaussians(
        means=torch.randn(2, 16, generator=g) / 4,
        basis=basis,
        covariances=torch.diag_embed(torch.rand(2, 4, generator=g)),
        rest=torch.full((16,), 0.01),
        spectrum=torch.ones(16),
        frequencies=torch.tensor([0.5, 0.5]),
    )
    denoiser = GaussianDenoiser(gaussians, (1, 4, 4))
    x, sigma = 80 * torch.randn(6, 1, 4, 4, generator=g), torch.full((6,), 80.0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def all_of_it() -> list[torch.Tensor]:
        return [
            denoiser(x, sigma, labels),
            denoiser.left(sigma, labels),
            denoiser.draw(labels, 80.0, x),
        ]

    plain = all_of_it()
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(all_of_it(), plain, strict=True):
            assert torch.equal(a, b)


@contextlib.contextmanager
def _changed(change, to, back):
    change(to)
    try:
        yield
    finally:
        change(back)


@pytest.mark.parametrize(
    "callers",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: np.errstate(all="raise"),
        lambda: _changed(torch.set_default_dtype, torch.float64, torch.float32),
        lambda: _changed(torch.use_deterministic_algorithms, True, False),
    ],
)
def test_modes_of_the_caller_do_not_reach_our_work_and_are_restored(callers) -> None:
    def modes() -> tuple:
        x = torch.ones(2, 2)
        autocast = torch.is_autocast_enabled("cpu")
        return (
            *(x.dtype, x.device, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast),
            *(torch.are_deterministic_algorithms_enabled(), np.geterr()["under"]),
        )

    ordinary = modes()
    with callers():
        mine = modes()
        assert mine != ordinary
        with ordinary_modes():
            assert modes() == ordinary
            with ordinary_modes():
                assert modes() == ordinary
            assert modes() == ordinary
        assert modes() == mine
    assert modes() == ordinary


def test_modes_of_the_process_come_back_when_the_last_thread_is_done() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        first, second = ordinary_modes(), ordinary_modes()
        first.__enter__()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(second.__enter__).result()
            first.__exit__(None, None, None)
            assert torch.get_default_dtype() == torch.float32
            pool.submit(second.__exit__, None, None, None).result()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_libraries_have_a_standard_error_to_write_to(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with ordinary_modes():
        sys.stderr.write("of a library")
    assert sys.stderr is None
