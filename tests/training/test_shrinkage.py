"""Estimates under known noise, against simulations and limits."""

from __future__ import annotations

import math

import pytest
import torch

from dpsyngen.training.spectra import (
    debiased,
    denoised_white_covariance,
    noise_edge,
    noise_limit,
    shrink_bands,
    shrunk_number,
    turned_variances,
)


def symmetric_noise(size: int, std: float, seed: int) -> torch.Tensor:
    """As the mechanism's: standard deviation `std` on the diagonal, std/√2 off it."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=g, dtype=torch.float64) * std / math.sqrt(2)
    upper = a.triu(1)
    return upper + upper.T + torch.diag(torch.randn(size, generator=g, dtype=torch.float64) * std)


def test_edge_is_where_the_spectrum_of_noise_ends() -> None:
    for size, std in ((300, 0.5), (600, 2.0)):
        largest = max(float(torch.linalg.eigvalsh(symmetric_noise(size, std, s)).max()) for s in range(3))
        assert largest == pytest.approx(noise_edge(std, size), rel=0.03)


@pytest.mark.parametrize("times", [1.0, 1.5, 4.0])
def test_debiasing_undoes_what_noise_does_to_an_eigenvalue(times) -> None:
    """`times` the edge; the transition is at half of it."""
    size, std = 500, 0.3
    edge = noise_edge(std, size)
    signal = edge * times
    observed = []
    for seed in range(6):
        direction = torch.nn.functional.normalize(
            torch.randn(size, generator=torch.Generator().manual_seed(seed)), dim=0
        )
        direction = direction.double()
        values, vectors = torch.linalg.eigh(
            signal * torch.outer(direction, direction) + symmetric_noise(size, std, seed)
        )
        observed.append(float(values[-1]))
        # How far the eigenvector has turned away.
        assert float((vectors[:, -1] @ direction) ** 2) == pytest.approx(1 - (edge / 2 / signal) ** 2, abs=0.06)
    mean = sum(observed) / len(observed)
    assert mean > signal * (1 + 0.7 * (edge / 2 / signal) ** 2)  # clearly too large
    assert float(debiased(torch.tensor([mean]).double(), edge)) == pytest.approx(signal, rel=0.03)


def test_debiasing_without_noise_changes_nothing() -> None:
    values = torch.tensor([3.0, 0.1])
    assert debiased(values, 0.0).tolist() == values.tolist()


@pytest.mark.parametrize("size", [10, 60])
def test_noise_exceeds_its_limit_once_in_a_hundred_times(size) -> None:
    noise = torch.stack([symmetric_noise(size, 0.7, seed) for seed in range(2000)])
    share = float((torch.linalg.eigvalsh(noise)[:, -1] > noise_limit(0.7, size)).double().mean())
    assert 0.002 < share < 0.025


def test_covariance_without_noise_stays_within_its_limits() -> None:
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    torch.testing.assert_close(denoised_white_covariance(a @ a.T, 0.0, least=1e-6, most=1e6), a @ a.T)
    values = torch.linalg.eigvalsh(denoised_white_covariance(a @ a.T, 0.0, least=0.5, most=3.0))
    assert (float(values.min()), float(values.max())) == pytest.approx((0.5, 3.0))


@pytest.mark.parametrize("std", [1.0, 30.0, 1e6])
def test_covariance_that_is_all_noise_becomes_the_identity(std) -> None:
    for seed in range(5):
        noisy = torch.eye(40).double() + symmetric_noise(40, std, seed)
        out = denoised_white_covariance(noisy, std, least=0.02, most=10.0)
        torch.testing.assert_close(out, torch.eye(40).double() * out[0, 0])
        assert float(out[0, 0]) == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize("std", [0.02, 0.1, 0.3])
def test_variances_along_noisy_directions_are_estimated(std) -> None:
    """Against the truth, v̂ᵀ C v̂, which no estimate can look at."""
    size = 300
    axes = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    truth = (axes * torch.linspace(-2, 2, size).double().exp()) @ axes.T
    values, vectors = torch.linalg.eigh(truth + symmetric_noise(size, std, 1))
    wanted = torch.einsum("ji,jk,ki->i", vectors, truth, vectors)
    got = turned_variances(values, std)
    assert float(got.sum()) == pytest.approx(float(values.sum()))
    assert float((got - wanted).square().mean().sqrt()) < 0.4 * float((values - wanted).square().mean().sqrt())


def test_covariance_keeps_what_shows_and_levels_the_rest() -> None:
    size, std = 200, 0.1
    truth = 0.7 * torch.eye(size).double()
    truth[0, 0] = 4.0
    noisy = truth + symmetric_noise(size, std, 3)
    out = denoised_white_covariance(noisy, std, least=0.02, most=10.0)
    values = torch.linalg.eigvalsh(out)
    c = noise_edge(std, size) ** 2 / 4
    assert float(values[-1]) == pytest.approx(0.7 + 3.3 - c / 3.3, rel=0.04)
    assert float(torch.linalg.eigvalsh(noisy)[-2]) > 2.2
    assert float(values[:-1].std()) < 0.15
    assert float((out - truth).norm()) < 0.2 * float((noisy - truth).norm())


def test_number_ends_between_what_is_seen_and_what_was_expected() -> None:
    assert shrunk_number(5.0, 0.0, 1.0, 0.25) == 5.0
    assert shrunk_number(5.0, 0.25, 1.0, 0.25) == 3.0
    assert shrunk_number(5.0, 1e12, 1.0, 0.25) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(4))
def test_bands_are_shrunk_by_what_noise_leaves_of_them(seed) -> None:
    g = torch.Generator().manual_seed(seed)
    bands = torch.arange(4000) // 2000
    prior = torch.tensor([4.0, 0.01])[bands].double()
    noise = torch.tensor([[1.0, 1.0], [0.25, 0.25], [100.0, 100.0]]).double()
    truth = torch.randn(3, 4000, generator=g, dtype=torch.float64) * prior.sqrt()
    noisy = truth + torch.randn(3, 4000, generator=g, dtype=torch.float64) * noise[:, bands].sqrt()
    out = shrink_bands(noisy, noise, bands)
    wanted = noisy * (prior / (prior + noise[:, bands]))
    assert float((out - wanted).square().mean()) < 0.01
    errors = (out - truth).square().mean(1)
    assert bool((errors < (noisy - truth).square().mean(1)).all())
    assert float(errors[2]) < 3  # a row that is all noise ends near 0


def test_rows_without_noise_stay_and_noise_alone_goes() -> None:
    bands = torch.zeros(50, dtype=torch.int64)
    values = torch.ones(2, 50, dtype=torch.float64)
    assert torch.equal(shrink_bands(values, torch.zeros(2, 1).double(), bands), values)
    assert not shrink_bands(values, torch.full((2, 1), 2.0).double(), bands).any()
