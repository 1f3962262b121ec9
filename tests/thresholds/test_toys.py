"""The exact toys: their denoiser is the conditional mean, and their closed forms agree with sampling."""

from __future__ import annotations

import math

import pytest
import torch

from tests.thresholds.toys import (
    ExactMixture,
    gap_in_one_dimension,
    gaussian_gap,
    gaussian_loss,
    kl_of_gaussians,
)


@pytest.fixture
def mixture() -> ExactMixture:
    return ExactMixture(
        [0.2, 0.5, 0.3],
        [[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]],
        [[[0.3, 0.1], [0.1, 0.2]], [[0.05, 0.0], [0.0, 0.05]], [[0.4, -0.2], [-0.2, 0.1]]],
    )


@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0])
def test_denoiser_is_tweedies_formula(mixture, sigma) -> None:
    """D(x; σ) = x + σ²∇log p_σ(x), the gradient taken by automatic differentiation of the density."""
    x = mixture.smoothed(sigma).sample(50, 0).requires_grad_()
    (score,) = torch.autograd.grad(mixture.smoothed(sigma).log_density(x).sum(), x)
    expected = x.detach() + sigma**2 * score
    torch.testing.assert_close(mixture.denoise(x.detach(), sigma), expected, rtol=1e-9, atol=1e-9)


def test_samples_have_the_moments(mixture) -> None:
    x = mixture.sample(200_000, 3)
    torch.testing.assert_close(x.mean(0), mixture.mean, atol=0.01, rtol=0)
    assert float(x.var(0).sum()) == pytest.approx(mixture.variance, rel=0.01)
    assert torch.equal(mixture.sample(5, 3), mixture.sample(5, 3))


def test_denoiser_beats_every_other_on_its_own_images(mixture) -> None:
    x0, sigma = mixture.sample(50_000, 1), 0.5
    x = x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = mixture.denoise(x, sigma)
    best = float((own - x0).square().mean())
    for other in (own + 0.02, 0.98 * own, own + 0.05 * torch.sin(x)):
        assert float((other - x0).square().mean()) > best


def test_as_a_denoiser_of_images(mixture) -> None:
    x = torch.randn(4, 2, 1, 1)
    sigma = torch.tensor([0.1, 0.5, 1.0, 5.0])
    out = mixture(x, sigma, None)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    for row in range(4):
        alone = mixture.denoise(x[row].flatten()[None], float(sigma[row]))
        torch.testing.assert_close(out[row].flatten().double(), alone[0], atol=1e-6, rtol=1e-6)


def test_single_images_are_recognised_at_low_noise() -> None:
    p = ExactMixture([0.5, 0.5], [[-1.0], [1.0]], torch.zeros(2, 1, 1))
    torch.testing.assert_close(p.denoise(torch.tensor([[0.9], [-1.2]]), 1e-3), torch.tensor([[1.0], [-1.0]]).double())
    # D(x; σ) = tanh(x/σ²) in between.
    x = torch.linspace(-2, 2, 9).double()[:, None]
    torch.testing.assert_close(p.denoise(x, 0.8), torch.tanh(x / 0.64))


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_closed_gaussian_gap_is_that_of_quadrature(sigma) -> None:
    a, b = ExactMixture.gaussian([0.3], [[0.4]]), ExactMixture.gaussian([-0.6], [[0.1]])
    gap, loss = gap_in_one_dimension(a, b, sigma)
    assert gaussian_gap(a, b, sigma) == pytest.approx(gap, rel=1e-8)
    assert gaussian_loss(a, sigma) == pytest.approx(loss, rel=1e-6)


def test_closed_gaussian_gap_is_that_of_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    covariances = factors @ factors.mT / 4
    means = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    a, b = (ExactMixture.gaussian(m, c) for m, c in zip(means, covariances, strict=True))
    x = a.smoothed(0.7).sample(300_000, 1)
    sampled = float((a.denoise(x, 0.7) - b.denoise(x, 0.7)).square().sum(1).mean())
    assert gaussian_gap(a, b, 0.7) == pytest.approx(sampled, rel=0.01)


def test_kl_of_gaussians() -> None:
    a, b = ExactMixture.gaussian([0.0], [[1.0]]), ExactMixture.gaussian([1.0], [[4.0]])
    assert kl_of_gaussians(a, b) == pytest.approx(math.log(2) + (1 + 1) / 8 - 0.5)
    assert kl_of_gaussians(a, a) == pytest.approx(0)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        ([1.0], [0.0], [[[1.0]]], r"must be \[K\], \[K, d\]"),
        ([0.5, 0.5], [[0.0]], [[[1.0]]], r"must be \[K\], \[K, d\]"),
        ([0.5, 0.6], [[0.0], [1.0]], [[[1.0]], [[1.0]]], "sum to 1"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]], "symmetric"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]], "must not be negative"),
    ],
)
def test_what_is_no_mixture_is_refused(weights, means, covariances, message) -> None:
    with pytest.raises(ValueError, match=message):
        ExactMixture(weights, means, covariances)


def test_closed_forms_say_what_they_are_for(mixture) -> None:
    one = ExactMixture.gaussian([0.0, 0.0], torch.eye(2))
    with pytest.raises(ValueError, match="single Gaussians"):
        gaussian_gap(mixture, one, 1.0)
    with pytest.raises(ValueError, match="closed form"):
        gaussian_loss(mixture, 1.0)
    with pytest.raises(ValueError, match="one dimension"):
        gap_in_one_dimension(mixture, one, 1.0)
    with pytest.raises(ValueError, match="single Gaussians"):
        kl_of_gaussians(one, mixture)
