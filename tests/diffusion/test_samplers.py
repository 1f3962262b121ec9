"""Samplers on a Gaussian, where the denoiser and the ODE's solution are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.samplers import evenly_in_log, karras_steps, solved, to_float, to_uint8
from dpsyngen.diffusion.sampling import SamplingSettings
from dpsyngen.diffusion.standalone import SAMPLERS
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import ConfigError

S = 0.4  # x₀ ~ N(0, S²)


def gaussian(x, sigma, labels=None):
    """E[x₀ | x] for x₀ ~ N(0, S²)."""
    return S**2 / (S**2 + sigma.view(-1, 1, 1, 1) ** 2) * x


def error(sampler: str, steps: int) -> float:
    sigmas = karras_steps(steps)
    x = sigmas[0] * torch.randn(50, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = x * S / math.sqrt(S**2 + sigmas[0].item() ** 2)
    return ((solved(sampler, gaussian, x, sigmas) - exact).abs().max() / exact.abs().max()).item()


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
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[17].item() == pytest.approx(0.002)
    assert (sigmas.diff() < 0).all()
    assert sigmas.dtype == torch.float64
    assert karras_steps(3, 1.0, 9.0, rho=1.0).tolist() == pytest.approx([9, 5, 1, 0])
    assert karras_steps(1).tolist() == [80, 0]
    for bad in ({"steps": 0}, {"steps": 5, "sigma_min": 90.0}, {"steps": 5, "sigma_min": 0.0}):
        with pytest.raises(ConfigError):
            karras_steps(**bad)


def test_churn_keeps_the_law() -> None:
    g = torch.Generator().manual_seed(0)
    sigmas = karras_steps(40)
    x = sigmas[0] * torch.randn(4000, 1, 2, 2, generator=g, dtype=torch.float64)
    out = solved("heun", gaussian, x, sigmas, churn=20.0, draw=lambda: torch.randn(x.shape, generator=g, dtype=x.dtype))
    assert out.std().item() == pytest.approx(S, rel=0.05)
    plain = solved("heun", gaussian, x, sigmas)
    correlation = torch.corrcoef(torch.stack([out.flatten(), plain.flatten()]))[0, 1].item()
    assert correlation < 0.5  # the added noise replaced most of the start


def draw(count: int, **options) -> torch.Tensor:
    drawing = {name: options.pop(name) for name in ("batch_size", "observe") if name in options}
    settings = SamplingSettings(**{"steps": 8, "seed": 1} | options)
    return torch.cat(list(settings.draw(gaussian, (1, 6, 6), None, count, **{"batch_size": 4} | drawing)))


@pytest.mark.parametrize("options", [{}, {"sampler": "dpmpp"}, {"sampler": "heun", "churn": 10.0}])
def test_image_depends_on_seed_and_index_alone(options) -> None:
    a = draw(10, **options)
    assert a.shape == (10, 1, 6, 6)
    assert a.dtype == torch.uint8
    b = draw(7, batch_size=3, **options)
    assert (a[:7].int() - b.int()).abs().max() <= 1
    assert not torch.equal(a, draw(10, seed=2, **options))
    assert len(a.flatten(1).unique(dim=0)) == 10


def test_no_two_images_of_many_share_their_noise() -> None:
    # With 32 bits of seed, as PyTorch's CPU generator has, a pair among 100,000 would be expected.
    starts = []

    def denoiser(x, sigma, labels=None):
        starts.append(x[:, 0, 0, :2].clone())
        return x * 0

    for _ in SamplingSettings(steps=1).draw(denoiser, (1, 2, 2), None, 100_000, batch_size=20_000):
        pass
    assert len(torch.cat(starts).unique(dim=0)) == 100_000


def starts(seed: int, count: int = 200) -> torch.Tensor:
    seen = []

    def denoiser(x, sigma, labels=None):
        seen.append(x.clone())
        return x * 0

    list(SamplingSettings(steps=1, seed=seed).draw(denoiser, (1, 8, 8), None, count))
    return torch.cat(seen) / 80


def test_starting_noise_is_standard_normal_and_unlike_other_seeds() -> None:
    a = starts(0)
    assert stats.kstest(a.flatten().numpy(), "norm").pvalue > 1e-4
    # Pixels, images and seeds are uncorrelated, neighbouring ones too.
    for b in (starts(1), starts(2**32), starts(-1)):
        assert not torch.equal(a, b)
        assert abs((a * b).mean().item()) < 0.05
        assert abs((a[1:] * b[:-1]).mean().item()) < 0.05
    assert abs((a[1:] * a[:-1]).mean().item()) < 0.05


def test_image_of_a_network_is_the_same_in_any_batch() -> None:
    torch.manual_seed(0)
    network = UNet("nano", 8, 3, 2)
    for p in network.parameters():
        p.data += 0.02 * torch.randn_like(p)
    denoiser = NetworkDenoiser(network, 2)
    labels = torch.arange(9) % 2

    def images(batch_size: int, count: int = 9, seed: int = 3) -> torch.Tensor:
        settings = SamplingSettings(steps=6, seed=seed)
        return torch.cat(list(settings.draw(denoiser, (3, 8, 8), labels[:count], count, batch_size=batch_size)))

    whole = images(9)
    assert whole.int().float().std() > 10
    for batch_size, count in ((1, 9), (2, 9), (4, 5), (256, 7)):
        assert (images(batch_size, count).int() - whole[:count].int()).abs().max() <= 1
    assert (images(9, seed=4).int() - whole.int()).abs().float().mean() > 10


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = draw(4, sampler="heun", churn=20.0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw(4, sampler="heun", churn=20.0), a)


def test_churn_only_within_its_bounds_and_raised_levels() -> None:
    def levels(**options) -> list[float]:
        seen = []

        def denoiser(x, sigma, labels=None):
            seen.append(sigma[0].item())
            return gaussian(x, sigma)

        x = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
        solved("heun", denoiser, x, karras_steps(10), draw=lambda: torch.zeros_like(x), **options)
        return seen[::2]  # the first call of each step

    plain = karras_steps(10).tolist()[:-1]
    assert levels() == pytest.approx(plain)
    assert levels(churn=2.0) == pytest.approx([s * 1.2 for s in plain])
    # γ is capped at √2 - 1 (EDM algorithm 2).
    assert levels(churn=1e6) == pytest.approx([s * math.sqrt(2) for s in plain])


def test_one_step_goes_to_the_estimate() -> None:
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    for sampler in SAMPLERS:
        torch.testing.assert_close(solved(sampler, gaussian, x, karras_steps(1)), gaussian(x, torch.full((3,), 80.0)))


def test_network_calls() -> None:
    for sampler, calls in (("ddim", 12), ("heun", 23), ("dpmpp", 12)):
        seen = []

        def denoiser(x, sigma, labels=None, seen=seen):
            assert sigma.shape == (len(x),)
            seen.append(sigma[0].item())
            return gaussian(x, sigma)

        solved(sampler, denoiser, torch.ones(2, 1, 2, 2), karras_steps(12))
        assert len(seen) == calls
        assert min(seen) == pytest.approx(0.002)  # never at σ = 0, where log σ has no value


def test_labels_reach_the_denoiser_in_order() -> None:
    seen = []

    def denoiser(x, sigma, labels=None):
        seen.append(labels.tolist())
        return x * 0

    list(SamplingSettings(steps=1).draw(denoiser, (1, 4, 4), torch.arange(5), 5, batch_size=2))
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


@pytest.mark.parametrize("options", [{}, {"sampler": "dpmpp"}, {"sampler": "heun"}, {"sampler": "heun", "churn": 10.0}])
def test_an_observer_sees_each_step_and_changes_nothing(options) -> None:
    seen = []
    watched = draw(6, batch_size=6, observe=seen.append, **options)
    assert torch.equal(watched, draw(6, batch_size=6, **options))
    levels = karras_steps(8).tolist()[:-1]
    raised = 1 + min(options.get("churn", 0.0) / 8, math.sqrt(2) - 1)
    assert [step.index for step in seen] == list(range(8))
    assert [step.sigma for step in seen] == pytest.approx([level * raised for level in levels])
    for step in seen:
        torch.testing.assert_close(step.denoised, gaussian(step.x, torch.full((6,), step.sigma)), check_dtype=False)
    # At the top the state is noise of that level, at the bottom it is the image.
    assert (seen[0].x / seen[0].sigma).std().item() == pytest.approx(1, abs=0.15)
    assert (to_uint8(seen[-1].denoised).int() - watched.int()).abs().max() <= 1


def test_an_observer_of_several_batches_sees_each() -> None:
    seen = []
    draw(7, batch_size=3, observe=lambda step: seen.append((step.index, len(step.x))))
    assert seen == [(i, n) for n in (3, 3, 1) for i in range(8)]


def test_steps_to_look_at_are_even_in_log_sigma() -> None:
    sigmas = karras_steps(200)
    chosen = evenly_in_log(sigmas, 9)
    assert len(chosen) == 9
    assert (chosen[0], chosen[-1]) == (0, 199)
    gaps = sigmas[chosen].log().diff()
    assert gaps.min() / gaps.max() == pytest.approx(1, abs=0.15)
    assert evenly_in_log(karras_steps(3), 9) == [0, 1, 2]
    assert evenly_in_log(karras_steps(1), 9) == [0]
    assert evenly_in_log(sigmas, 1) == [0]
    with pytest.raises(ConfigError, match="at least 1"):
        evenly_in_log(sigmas, 0)
