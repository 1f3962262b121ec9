"""Estimates under known noise, against simulations and limits."""

from __future__ import annotations

import math

import pytest
import torch

from dpsyngen.training.shrinkage import debiased, denoised_covariance, noise_edge, shrink_bands


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


def test_covariance_without_noise_stays() -> None:
    torch.manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64)
    torch.testing.assert_close(denoised_covariance(a @ a.T, 0.0, 1e-6), a @ a.T)


def test_covariance_that_is_all_noise_becomes_a_multiple_of_the_identity() -> None:
    noise = symmetric_noise(40, 1.0, 0) + torch.eye(40).double()
    out = denoised_covariance(noise, 1.2 * noise_edge(1.0, 40), 0.02)
    torch.testing.assert_close(out, torch.eye(40).double() * noise.diagonal().mean())
    low = denoised_covariance(noise - 5 * torch.eye(40).double(), 1e9, 0.02)
    torch.testing.assert_close(low, 0.02 * torch.eye(40).double())


def test_covariance_keeps_what_shows_and_the_trace_of_the_rest() -> None:
    size, std = 200, 0.1
    truth = torch.eye(size).double()
    truth[0, 0] = 30.0
    noisy = truth + symmetric_noise(size, std, 3)
    out = denoised_covariance(noisy, noise_edge(std, size) + 1, 0.02)
    assert float(out[0, 0]) == pytest.approx(30, rel=0.02)
    assert float((out - truth).norm()) < 0.15 * float((noisy - truth).norm())
    assert float(torch.linalg.eigvalsh(out).min()) > 0.8


def test_bands_are_shrunk_by_what_noise_leaves_of_them() -> None:
    g = torch.Generator().manual_seed(0)
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
