"""Estimates under known noise, against simulations and limits."""

from __future__ import annotations

import math

import pytest
import torch

from dpsyngen.training.spectra import (
    Bands,
    Frequencies,
    denoised_white_covariance,
    noise_edge,
    noise_limit,
    powers,
    shrink_bands,
    shrink_blocks,
    shrunk_number,
    turned_variances,
    with_sum,
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
    two = Bands(bands, torch.tensor([0.0, 5.0]).double(), torch.zeros(2, dtype=torch.int64))
    noise = torch.tensor([[1.0, 1.0], [0.25, 0.25], [100.0, 100.0]]).double()
    truth = torch.randn(3, 4000, generator=g, dtype=torch.float64) * prior.sqrt()
    noisy = truth + torch.randn(3, 4000, generator=g, dtype=torch.float64) * noise[:, bands].sqrt()
    out = shrink_bands(noisy, noise, two)
    wanted = noisy * (prior / (prior + noise[:, bands]))
    assert float((out - wanted).square().mean()) < 0.01
    errors = (out - truth).square().mean(1)
    assert bool((errors < (noisy - truth).square().mean(1)).all())
    assert float(errors[2]) < 3  # a row that is all noise ends near 0


def test_rows_without_noise_stay_and_noise_alone_goes() -> None:
    zeros = torch.zeros(50, dtype=torch.int64)
    bands, values = Bands(zeros, zeros[:1].double(), zeros[:1]), torch.ones(2, 50, dtype=torch.float64)
    assert torch.equal(shrink_bands(values, torch.zeros(2, 1).double(), bands), values)
    # The variance of the signal is uncertain, so its posterior mean is not quite 0.
    assert 0 < float(shrink_bands(values, torch.full((2, 1), 2.0).double(), bands).max()) < 0.01
    rings, g, left = Frequencies((1, 28, 28)).rings, torch.Generator().manual_seed(0), []
    for _ in range(20):
        noise = torch.randn(1, 784, generator=g, dtype=torch.float64)
        left.append(float(shrink_bands(noise, torch.ones(1, len(rings.radius)).double(), rings).square().sum()))
    assert sum(left) / 20 < 1  # of 784; one ring by itself takes much of it for signal


def test_bands_of_few_coefficients_learn_from_the_others() -> None:
    """A law that holds for all bands is nearly as good as to know their variances; each by itself is far from it."""
    count, g = 60, torch.Generator().manual_seed(0)
    bands = Bands(torch.arange(count), torch.arange(count).double(), torch.zeros(count, dtype=torch.int64))
    prior, noise = 30 * (1 + bands.radius.square()) ** -1.25, torch.ones(1, count).double()
    ours, known, alone = 0.0, 0.0, 0.0
    for _ in range(200):
        truth = prior.sqrt() * torch.randn(1, count, generator=g, dtype=torch.float64)
        seen = truth + torch.randn(1, count, generator=g, dtype=torch.float64)
        single = (seen.square() - 1).clamp_min(0)
        ours += float((shrink_bands(seen, noise, bands) - truth).square().sum())
        known += float((seen * prior / (prior + 1) - truth).square().sum())
        alone += float((seen * single / (single + 1) - truth).square().sum())
    assert ours < 1.25 * known
    assert alone > 2 * known


def test_a_band_that_departs_from_the_law_is_believed_when_it_shows() -> None:
    of = torch.arange(20).repeat_interleave(200)
    bands = Bands(of, torch.arange(20).double(), torch.zeros(20, dtype=torch.int64))
    prior = (1 + bands.radius.square()) ** -1.5
    prior[15] = 1.0
    truth = prior.sqrt()[of] * torch.randn(len(of), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(len(of), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = shrink_bands((truth + 0.3 * noise)[None], torch.full((1, 20), 0.09).double(), bands)[0]
    assert float((out - truth)[of == 15].square().mean()) < 1.05 * 0.09 / 1.09
    assert float((out - truth)[of == 16].square().mean()) < 0.01


def test_colours_follow_laws_of_their_own() -> None:
    """Grey that varies much says nothing of a colour that does not vary."""
    g = torch.Generator().manual_seed(0)
    bands = Bands(torch.arange(40), torch.arange(20).double().repeat(2), torch.arange(2).repeat_interleave(20))
    seen = torch.randn(1, 40, generator=g, dtype=torch.float64)
    seen[:, :20] *= 100
    out = shrink_bands(seen, torch.ones(1, 40).double(), bands)
    torch.testing.assert_close(out[:, :20], seen[:, :20], rtol=0.05, atol=1.0)
    assert float(out[:, 20:].square().mean()) < 0.05


def seen_with_noise(truth: torch.Tensor, m: int, std: float, seed: int) -> tuple[torch.Tensor, float]:
    """What a noisy scatter matrix says of variances `truth`: m of them, and the sum of the others."""
    noise = std * torch.randn(m + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return truth[:m] + noise[:m], float(truth[m:].sum() + noise[m])


@pytest.mark.parametrize(("shape", "slope"), [((1, 28, 28), 1.0), ((1, 28, 28), 3.0), ((3, 24, 24), 3.0)])
def test_powers_follow_a_law_of_nature_far_below_the_noise(shape, slope) -> None:
    frequencies = Frequencies(shape)
    truth = (1 + frequencies.radius.square()).pow(-slope / 2) * torch.tensor([30.0, 5.0, 2.0])[frequencies.colour]
    m, std = 200, 0.1 * float(truth[:50].mean())
    errors = []
    for seed in range(5):
        seen, others = seen_with_noise(truth, m, std, seed)
        got = powers(seen, others, std, frequencies, float(truth.sum()))
        errors.append((got / truth).log().abs())
        # Beyond the m the law goes on.
        assert float(got[m:].sum()) == pytest.approx(float(truth[m:].sum()), rel=0.6)
    error = torch.stack(errors)
    assert float(error[:, :m].mean()) < 0.4
    assert float(error.mean()) < 0.6
    assert std > 3 * float(truth[m - 20 : m].mean()) or slope == 1  # one alone cannot be seen


def test_powers_are_those_seen_where_they_can_be_seen() -> None:
    frequencies = Frequencies((1, 12, 12))
    rings, count = frequencies.rings.index, len(frequencies.rings.radius)
    law = 30 * (1 + frequencies.radius.square()).pow(-1.0)
    truth = law * (0.5 + torch.rand(count, generator=torch.Generator().manual_seed(0)).double())[rings]

    def banded(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count).double().index_add(0, rings, x)

    torch.testing.assert_close(banded(powers(truth, 0.0, 0.0, frequencies, 100.0)), banded(truth))
    # A peak, as of a screen or a weave, is far from any law.
    truth = (1 + frequencies.radius.square()).pow(-1.5) * 40
    truth[rings == 9] = 3.0
    seen, others = seen_with_noise(truth, 144, 0.05, 1)
    got = powers(seen, others, 0.05, frequencies, 100.0)
    assert float(got[rings == 9].mean()) == pytest.approx(3.0, rel=0.1)
    # Of the frequencies that are not seen one by one, the sum says how much of the law is there.
    seen, others = seen_with_noise(truth, 60, 0.01, 2)
    assert float(powers(seen, others, 0.01, frequencies, 100.0)[60:].sum()) == pytest.approx(others, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_powers_of_noise_alone_are_what_was_expected(shape) -> None:
    frequencies = Frequencies(shape)
    size = len(frequencies.rings.index)
    for seed in range(5):
        seen, others = seen_with_noise(torch.zeros(size).double(), 64, 1e4, seed)
        got = powers(seen, others, 1e4, frequencies, 7.0)
        assert float(got.sum()) == pytest.approx(7.0, rel=0.3)
        assert float(got.min()) > 0
        assert bool(torch.isfinite(got).all())


def test_entries_between_fine_frequencies_are_known_to_be_small() -> None:
    frequencies = Frequencies((1, 16, 16))
    size, std, g = 256, 0.3, torch.Generator().manual_seed(0)
    scale = (1 + frequencies.radius.square()).pow(-0.75)
    truth = scale[:, None] * torch.randn(size, size, generator=g).double() * scale
    truth = (truth + truth.T) / 4
    noisy, power = truth + symmetric_noise(size, std, 1), scale.square()
    out = shrink_blocks(noisy, std, frequencies.rings.index, power)
    assert float((out - truth).norm()) < 0.25 * float((noisy - truth).norm())
    assert float((out - truth)[:6, :6].norm()) < 1.1 * float((noisy - truth)[:6, :6].norm())
    torch.testing.assert_close(out, out.T)
    assert shrink_blocks(noisy, 0.0, frequencies.rings.index, power) is noisy
    # However large the noise, no more is believed than variances allow.
    noise = symmetric_noise(size, 1e3, 2)
    assert float(shrink_blocks(noise, 1e3, frequencies.rings.index, power).norm()) < 0.01 * float(power.sum())


def test_eigenvalues_have_the_sum_of_the_variances() -> None:
    torch.testing.assert_close(with_sum(torch.tensor([5.0, 1.0, -2.0]), 4.0), torch.tensor([4.0, 0.0, 0.0]))
    torch.testing.assert_close(with_sum(torch.tensor([3.0, 2.0, 1.0]), 6.0), torch.tensor([3.0, 2.0, 1.0]))
    torch.testing.assert_close(with_sum(torch.tensor([3.0, 2.0, -0.5, -0.5]), 4.0), torch.tensor([2.5, 1.5, 0.0, 0.0]))
