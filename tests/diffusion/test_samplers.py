"""Samplers on a Gaussian, where the denoiser and the ODE's solution are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from dpsyngen.diffusion.samplers import SAMPLERS, karras_steps, sample_batches, to_float, to_uint8
from dpsyngen.errors import ConfigError

S = 0.4  # x₀ ~ N(0, S²)


def gaussian(x, sigma, labels=None):
    """E[x₀ | x] for x₀ ~ N(0, S²)."""
    return S**2 / (S**2 + sigma.view(-1, 1, 1, 1) ** 2) * x


def error(sampler: str, steps: int) -> float:
    sigmas = karras_steps(steps)
    x = sigmas[0] * torch.randn(50, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = x * S / math.sqrt(S**2 + sigmas[0].item() ** 2)
    return ((SAMPLERS[sampler](gaussian, x, sigmas) - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_converges_to_the_exact_solution(sampler) -> None:
    assert error(sampler, 400) < (0.03 if sampler == "ddim" else 0.005)
    assert error(sampler, 400) < error(sampler, 50)


def test_order_of_convergence() -> None:
    for sampler, order in (("ddim", 1), ("heun", 2), ("dpmpp", 2)):
        measured = math.log2(error(sampler, 100) / error(sampler, 200))
        assert measured > order - 0.35, (sampler, measured)
    for steps in (20, 50):
        assert error("heun", steps) < error("ddim", steps) / 2
        assert error("dpmpp", steps) < error("ddim", steps) / 2


def test_karras_steps() -> None:
    sigmas = karras_steps(18)
    assert len(sigmas) == 19
    assert sigmas[-1] == 0
    for i in range(18):
        expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert sigmas[i].item() == pytest.approx(expected)
    assert karras_steps(1).tolist() == [80, 0]
    for bad in ({"steps": 0}, {"steps": 5, "sigma_min": 90.0}, {"steps": 5, "sigma_min": 0.0}):
        with pytest.raises(ConfigError):
            karras_steps(**bad)


def test_churn_keeps_the_law() -> None:
    g = torch.Generator().manual_seed(0)
    sigmas = karras_steps(40)
    x = sigmas[0] * torch.randn(4000, 1, 2, 2, generator=g, dtype=torch.float64)
    out = SAMPLERS["heun"](
        gaussian, x, sigmas, churn=20.0, draw=lambda: torch.randn(x.shape, generator=g, dtype=x.dtype)
    )
    assert out.std().item() == pytest.approx(S, rel=0.05)
    plain = SAMPLERS["heun"](gaussian, x, sigmas)
    correlation = torch.corrcoef(torch.stack([out.flatten(), plain.flatten()]))[0, 1].item()
    assert correlation < 0.5  # the added noise replaced most of the start


def draw(count: int, **options) -> torch.Tensor:
    settings = {"steps": 8, "seed": 1, "batch_size": 4} | options
    return torch.cat(list(sample_batches(gaussian, None, count, (1, 6, 6), **settings)))


@pytest.mark.parametrize("options", [{}, {"sampler": "dpmpp"}, {"sampler": "heun", "churn": 10.0}])
def test_image_depends_on_seed_and_index_alone(options) -> None:
    a = draw(10, **options)
    assert a.shape == (10, 1, 6, 6)
    assert a.dtype == torch.uint8
    b = draw(7, batch_size=3, **options)
    assert (a[:7].int() - b.int()).abs().max() <= 1
    assert not torch.equal(a, draw(10, seed=2, **options))
    assert len(a.flatten(1).unique(dim=0)) == 10


def test_labels_reach_the_denoiser_in_order() -> None:
    seen = []

    def denoiser(x, sigma, labels=None):
        seen.append(labels.tolist())
        return x * 0

    list(sample_batches(denoiser, torch.arange(5), 5, (1, 4, 4), steps=1, batch_size=2))
    assert seen == [[0, 1], [2, 3], [4]]


def test_bad_arguments() -> None:
    for options in ({"sampler": "magic"}, {"batch_size": 0}, {"steps": 0}, {"sampler": "ddim", "churn": 1.0}):
        with pytest.raises(ConfigError):
            draw(3, **options)
    with pytest.raises(ConfigError):
        draw(0)


def test_pixels_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-9.0, 9.0, math.nan])).tolist() == [0, 255, 0]
