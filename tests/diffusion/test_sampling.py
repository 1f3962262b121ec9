"""Where sampling starts: the law of x there, and that an image is a function of its seed and its number alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import Denoiser
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.diffusion.sampling import SamplingSettings, sampling_start
from dpsyngen.diffusion.stages import GAUSSIAN, StagedDenoiser, stage_map
from dpsyngen.diffusion.standalone import SAMPLERS
from tests.diffusion.test_gaussian import dense, example

SHAPE = (1, 2, 3)
SIZE = 6


def gaussian(k: int = 3) -> GaussianDenoiser:
    return GaussianDenoiser(example(k=k, d=2, size=SIZE), SHAPE, dtype=torch.float64)


def standard(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_variants_without_moments_start_at_pure_noise() -> None:
    for variant in ("dpdm", "coarse", "both"):
        assert sampling_start(stage_map(variant), None, 0.002, 80.0) == (80.0, None)
    with_cleaning_only = stage_map("cleaning")
    assert sampling_start(with_cleaning_only, gaussian(), 0.002, 80.0) == (80.0, None)


@pytest.mark.parametrize("tau", [-2.0, 1.0, 1.5, 2.0, 3.3])
def test_the_first_level_belongs_to_the_network_and_is_the_highest_that_does(tau) -> None:
    stages = stage_map("residual", tau_coarse=tau)
    sigma, start = sampling_start(stages, gaussian(), 0.002, 80.0)
    assert start is not None
    assert stages.owner(math.log(sigma)).name == "context"
    assert sigma == pytest.approx(math.exp(tau), rel=1e-6)


def test_the_first_level_stays_within_the_samplers() -> None:
    g = gaussian()
    assert sampling_start(stage_map("residual", tau_coarse=9.0), g, 0.002, 80.0)[0] == 80.0
    for stages in (stage_map("residual", tau_cleaning=-10.0, tau_coarse=-9.0), stage_map("gaussian")):
        sigma, start = sampling_start(stages, g, 0.02, 80.0)
        assert 0.02 < sigma < 0.021
        assert start is not None


def standard_errors(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """How many standard errors the first two moments of rows [N, D] are off; all of them together."""
    n, centred = len(x), x - mean
    variances = covariance.diag()
    of_mean = (x.mean(0) - mean) / (variances / n).sqrt()
    products = centred.mT @ centred / n
    spread = ((variances[:, None] * variances + covariance**2) / n).sqrt()
    return torch.cat([of_mean, ((products - covariance) / spread).flatten()])


@pytest.mark.parametrize("variant", ["residual", "gaussian"])
def test_x_has_the_law_of_noisy_images_of_its_class(variant) -> None:
    g, n = gaussian(), 20_000
    sigma, start = sampling_start(stage_map(variant, tau_coarse=0.5), g, 0.02, 80.0)
    assert start is not None
    for label in range(3):
        x = start(standard(n, seed=label), torch.full((n,), label)).flatten(1)
        covariance = dense(g.gaussians, SHAPE)[label] + sigma**2 * torch.eye(SIZE).double()
        assert standard_errors(x, g.gaussians.means[label].double(), covariance).abs().max() < 5


def test_without_a_label_x_has_the_law_of_the_mixture() -> None:
    """The class is drawn from the image's own noise, and yet does not say what that looks like."""
    # Classes far apart, each with a large variance of brightness: x tells the class and the noise that it was made of.
    ones = torch.full((SIZE, 1), SIZE**-0.5).double()
    means = torch.tensor([-50.0, 0.0, 50.0]).double()[:, None] * torch.eye(1, SIZE).double()
    frequencies = torch.tensor([0.2, 0.5, 0.3]).double()
    model = ClassGaussians(
        means,
        ones,
        torch.full((3, 1, 1), 4.0).double(),
        torch.full((SIZE,), 0.1).double(),
        torch.ones(SIZE).double(),
        frequencies,
    )
    g = GaussianDenoiser(model, SHAPE, dtype=torch.float64)
    n = 40_000
    sigma, start = sampling_start(stage_map("residual", tau_coarse=0.0), g, 0.002, 80.0)
    assert start is not None
    x = start(standard(n), None).flatten(1)
    drawn = ((x[:, :1] - means[:, 0]).abs()).argmin(1)
    for label in range(3):
        mine = x[drawn == label]
        share = len(mine) / n
        assert share == pytest.approx(float(frequencies[label]), abs=5 * (0.25 / n) ** 0.5)
        covariance = dense(model, SHAPE)[label] + sigma**2 * torch.eye(SIZE).double()
        assert standard_errors(mine, means[label], covariance).abs().max() < 5


def one_class() -> ClassGaussians:
    return example(k=1, d=2, size=SIZE)


def test_images_without_classes_need_no_draw_of_one() -> None:
    g = GaussianDenoiser(one_class(), SHAPE, dtype=torch.float64)
    _, start = sampling_start(stage_map("residual"), g, 0.002, 80.0)
    assert start is not None
    assert torch.equal(start(standard(5), None), start(standard(5), torch.zeros(5, dtype=torch.long)))


class Shrink:
    """A network: half of x."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return x / 2


def draw(variant: str, count: int, batch_size: int, *, labelled: bool, sampler: str = "ddim", seed: int = 3) -> Tensor:
    g = gaussian().float()
    stages = stage_map(variant, tau_coarse=1.0)
    denoisers: dict[str, Denoiser] = {GAUSSIAN: g, "context": Shrink(), "prior": Shrink()}
    labels = torch.arange(count) % 3 if labelled else None
    churn = 2.0 if sampler == "heun" else 0.0
    settings = SamplingSettings(sampler=sampler, steps=4, sigma_min=0.02, churn=churn, seed=seed)
    staged = StagedDenoiser(stages, denoisers)
    assert settings.levels(staged)[0][0] == pytest.approx(sampling_start(stages, g, 0.02, 80.0)[0])
    return torch.cat(list(settings.draw(staged, SHAPE, labels, count, batch_size=batch_size)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("variant", ["gaussian", "residual"])
def test_an_image_is_a_function_of_seed_number_and_label_alone(variant, labelled, sampler) -> None:
    whole = draw(variant, 23, 23, labelled=labelled, sampler=sampler)
    for size in (1, 7):
        apart = (draw(variant, 23, size, labelled=labelled, sampler=sampler).int() - whole.int()).abs()
        assert apart.max() <= 1  # a grey level, from the rounding of sums
        assert (apart > 0).double().mean() < 0.02
    shorter = draw(variant, 9, 9, labelled=labelled, sampler=sampler)
    assert (shorter.int() - whole[:9].int()).abs().max() <= 1
    assert torch.equal(draw(variant, 23, 23, labelled=labelled, sampler=sampler), whole)
    assert not torch.equal(draw(variant, 23, 23, labelled=labelled, sampler=sampler, seed=4), whole)
