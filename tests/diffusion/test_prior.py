"""The denoiser that reads moments: where F is 0 it is the Wiener filter, and gradients are clipped like any other's.

Files of priors are refused unless they are whole.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.loss import NoiseLevels, NoisyBatch, denoising_loss, make_noisy
from dpsyngen.diffusion.prior import SHIPPED, Prior, read_prior
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import ConfigError
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.per_example import PerExampleGradients
from tests.diffusion.test_gaussian import example

SHAPE = (2, 8, 8)
SIZE = 128
CLASSES = 3
NORM = 0.7


def gaussian(classes: int = CLASSES, dtype: torch.dtype = torch.float64) -> GaussianDenoiser:
    return GaussianDenoiser(example(k=classes, size=SIZE, d=6), SHAPE, dtype=dtype)


def residual(classes: int = CLASSES, dtype: torch.dtype = torch.float64, zero: bool = False) -> NetworkDenoiser:
    torch.manual_seed(0)
    network = UNet("nano", 8, 2, classes, inputs=4 * 2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Layers that start near zero would hide what lies before them.
        for p in network.parameters():
            p.mul_(0.0) if zero else p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return NetworkDenoiser(network, classes, gaussian=gaussian(max(classes, 1), dtype)).to(dtype)


def rows(n: int, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.logspace(-2, 1.5, n, dtype=torch.float64)
    x = torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64) * (1 + sigma.view(-1, 1, 1, 1))
    # The last is "no class".
    return x, sigma, torch.arange(n) % (classes + 1) if classes else None


class Half(nn.Module):
    """A network whose answer is known: half of what it is shown of the Gaussian's denoiser."""

    def forward(self, seen: Tensor, c_noise: Tensor, classes: Tensor | None) -> Tensor:
        self.seen = seen, c_noise, classes
        return seen[:, 2:4] / 2


@pytest.mark.parametrize("classes", [0, CLASSES])
def test_a_zero_network_is_the_gaussians_denoiser(classes) -> None:
    x, sigma, labels = rows(12, classes)
    denoiser = residual(classes, zero=True)
    assert torch.equal(denoiser(x, sigma, labels), denoiser.gaussian(x, sigma, labels))
    assert torch.equal(denoiser(x, sigma), denoiser.gaussian(x, sigma))


def test_what_the_network_is_shown_and_how_its_answer_is_used() -> None:
    x, sigma, labels = rows(8)
    network = Half()
    denoiser = NetworkDenoiser(network, CLASSES, gaussian=gaussian())
    g = denoiser.gaussian
    out = denoiser(x, sigma, labels)
    base, left = g(x, sigma, labels), g.left(sigma, labels)
    seen, c_noise, classes = network.seen
    level = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(seen[:, :2], x / (level**2 + 1).sqrt(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[:, 2:4], base, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[:, 4:6], left / level, rtol=1e-12, atol=1e-12)
    # At the edge of an image, the mean is over the pixels that there are.
    padded = nn.functional.pad(x, (1, 1, 1, 1), value=math.nan)
    near = torch.stack([padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]).nanmean(0)
    grain = 2 * torch.tanh((x - near) / level / 2)
    torch.testing.assert_close(seen[:, 6:], grain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(c_noise, sigma.log() / 4)
    assert torch.equal(classes, labels)
    torch.testing.assert_close(out, base + left * base / 2, rtol=1e-12, atol=1e-12)
    denoiser(x, sigma)
    assert network.seen[2].tolist() == [CLASSES] * 8


def test_the_weight_is_one_over_the_square_of_what_the_network_is_scaled_with() -> None:
    _, sigma, labels = rows(12)
    denoiser = residual()
    for given in (labels, None):
        square = denoiser.gaussian.left(sigma, given).square().flatten(1).mean(1)
        torch.testing.assert_close(denoiser.weight(sigma, given), 1 / square, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_loss_is_one_at_each_noise_level_if_the_images_are_the_gaussian(dropout) -> None:
    """With labels that were dropped it is the loss of a mixture, which its formula bounds from below only."""
    denoiser, n = residual(zero=True), 600
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(n) % CLASSES
    images = denoiser.gaussian.draw(labels, 0.0, torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64))
    for low, high in ((-3.0, -2.9), (0.0, 0.1), (1.5, 1.6)):
        batch = make_noisy(
            images,
            labels,
            NoiseLevels(-1.2, 3.0, low, high),
            copies=1,
            num_classes=CLASSES,
            label_dropout=dropout,
            generator=generator,
        )
        loss = denoising_loss(denoiser, batch).detach()
        error = float(loss.std() / n**0.5)
        assert loss.mean() > 1 - 4 * error
        if not dropout:
            assert loss.mean() < 1 + 4 * error


def test_the_network_alone_is_trained_saved_and_released() -> None:
    denoiser = residual(dtype=torch.float32)
    assert {k.split(".")[0] for k in denoiser.state_dict()} == {"network"}
    assert {id(p) for p in denoiser.parameters()} == {id(p) for p in denoiser.network.parameters()}
    assert not list(denoiser.gaussian.parameters())
    again = NetworkDenoiser(UNet("nano", 8, 2, CLASSES, inputs=4 * 2), CLASSES, gaussian=gaussian(dtype=torch.float32))
    again.load_state_dict(denoiser.state_dict())
    x, sigma, labels = rows(6)
    assert torch.equal(again(x.float(), sigma, labels), denoiser(x.float(), sigma, labels))


def test_the_gaussian_moves_along_with_the_network() -> None:
    denoiser = residual(dtype=torch.float32)
    assert denoiser.gaussian.basis.dtype == torch.float32
    denoiser.double()
    assert denoiser.gaussian.basis.dtype == next(denoiser.parameters()).dtype == torch.float64
    denoiser.to("meta")
    assert denoiser.gaussian.basis.device.type == next(denoiser.parameters()).device.type == "meta"


def noisy(examples: int, copies: int) -> NoisyBatch:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(examples, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    return make_noisy(
        images,
        torch.arange(examples) % CLASSES,
        NoiseLevels(-0.5, 1.0, high=1.5),
        copies=copies,
        num_classes=CLASSES,
        label_dropout=0.3,
        generator=generator,
    )


@pytest.mark.parametrize("physical", [2, 5])
def test_clipped_gradients_through_the_engine_are_those_of_one_example_at_a_time(physical) -> None:
    examples, copies, denoiser = 5, 2, residual()
    batch = noisy(examples, copies)
    parameters = list(denoiser.parameters())
    expected, norms = [torch.zeros_like(p) for p in parameters], []
    for i in range(examples):
        one = batch.rows(slice(i * copies, (i + 1) * copies))
        gradient = torch.autograd.grad(denoising_loss(denoiser, one).mean(), parameters)
        norms.append(float(torch.cat([g.flatten() for g in gradient]).norm()))
        for total, g in zip(expected, gradient, strict=True):
            total += g * min(1.0, NORM / norms[-1])
    assert max(norms) > NORM
    engine = PerExampleGradients(denoiser, NORM, kernels=KernelChoices(measure=False), workers=1)

    def loss(part: slice) -> Tensor:
        return denoising_loss(denoiser, batch.rows(slice(part.start * copies, part.stop * copies)))

    got = engine.sum(loss, examples, copies=copies, physical_batch=physical)
    assert got.norms.tolist() == pytest.approx(norms, rel=1e-8)
    for a, b in zip(got.sums, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_an_examples_loss_does_not_depend_on_the_others() -> None:
    """Else one image could move the clipped gradients of all."""
    denoiser, batch = residual(), noisy(6, 1)
    whole = denoising_loss(denoiser, batch)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    labels = batch.labels
    assert labels is not None
    mixed = NoisyBatch(batch.clean[order], batch.noisy[order], batch.sigma[order], labels[order])
    torch.testing.assert_close(denoising_loss(denoiser, mixed), whole[order], rtol=1e-10, atol=0)
    for i in range(6):
        alone = denoising_loss(denoiser, batch.rows(slice(i, i + 1)))
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-10, atol=0)


# ------------------------------------------------------------------------------------------------ files of priors


def test_a_prior_is_kept_in_16_bits_and_comes_back(tmp_path) -> None:
    network = UNet("prior", 32, 1, 0, inputs=4)
    prior = Prior.of(network.state_dict(), channels=1, seed=3)
    prior.save(tmp_path / "p.safetensors")
    again = read_prior(str(tmp_path / "p.safetensors"), 1)
    assert again.about == prior.about
    assert again.about["seed"] == 3
    for name, w in network.state_dict().items():
        assert torch.equal(again.weights[name], w.half().float())


def test_a_prior_that_was_edited_or_is_none_is_refused(tmp_path) -> None:
    path = tmp_path / "p.safetensors"
    Prior.of(UNet("prior", 32, 1, 0, inputs=4).state_dict(), channels=1).save(path)
    with pytest.raises(ConfigError, match="for images of 1 channels, but these have 3"):
        read_prior(str(path), 3)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata()
    weights = load_file(path)
    weights["out.bias"] += 0.5
    save_file(weights, path, about)
    for text, message in ((None, "not those that its description"), ("not a file", ""), ("", "")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape("which is no prior") + f".*{message}"):
            read_prior(str(path), 1)
    with pytest.raises(ConfigError, match="which is no prior"):
        read_prior(str(tmp_path / "missing"), 1)


def test_a_prior_of_another_network_or_with_nan_is_refused_when_it_is_read(tmp_path) -> None:
    path, weights = tmp_path / "p.safetensors", UNet("prior", 32, 1, 0, inputs=4).state_dict()
    for wrong, message in (
        ({**weights, "out.bias": weights["out.bias"] * float("nan")}, "not finite"),
        (UNet("nano", 32, 1, 0, inputs=4).state_dict(), "of another network"),
        (UNet("prior", 32, 1, 3, inputs=4).state_dict(), "of another network"),
    ):
        Prior.of(wrong, channels=1).save(path)
        with pytest.raises(ConfigError, match=f"which is no prior.*{message}"):
            read_prior(str(path), 1)


@pytest.mark.parametrize(("name", "channels", "programs"), [("grey", 1, "family"), ("colour", 3, "scene")])
def test_the_prior_that_ships_fits_the_network_and_its_limit_of_size(name, channels, programs) -> None:
    from importlib import resources

    prior = read_prior(SHIPPED, channels)
    UNet("prior", 8, channels, 0, inputs=4 * channels).load_state_dict(prior.weights)
    file = resources.files("dpsyngen") / "diffusion" / "priors" / f"{name}.safetensors"
    assert len(file.read_bytes()) <= 1_000_000
    assert prior.about["programs"] == programs
