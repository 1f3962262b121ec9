"""EDM's preconditioning and loss, guidance, EMA."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dpsyngen.diffusion.denoiser import Ema, GuidedDenoiser, NetworkDenoiser, loss_weight
from dpsyngen.diffusion.loss import NoiseLevels, denoising_loss, make_noisy


class Recorder(nn.Module):
    """Stands in for the network: returns a constant and remembers what it was given."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, x, c_noise, classes):
        self.seen = (x, c_noise, classes)
        return torch.full_like(x, self.value)


X = torch.randn(3, 1, 4, 4, dtype=torch.float64)
SIGMA = torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)


def test_coefficients_of_edm_table_1() -> None:
    sd = math.sqrt(1 / 3)
    network = Recorder(1.0)
    out = NetworkDenoiser(network, 0)(X, SIGMA)
    for i, s in enumerate(SIGMA.tolist()):
        skip, scale = sd**2 / (s**2 + sd**2), s * sd / math.sqrt(s**2 + sd**2)
        torch.testing.assert_close(out[i], skip * X[i] + scale)
        torch.testing.assert_close(network.seen[0][i], X[i] / math.sqrt(s**2 + sd**2))
        assert network.seen[1][i].item() == pytest.approx(math.log(s) / 4)
        # λ·c_out² = 1: all noise levels weigh alike at the start.
        assert loss_weight(torch.tensor(s), sd).item() * scale**2 == pytest.approx(1.0, rel=1e-5)


def test_input_of_the_network_has_unit_variance() -> None:
    torch.manual_seed(0)
    network = Recorder()
    for s in (0.1, 1.0, 10.0):
        x0 = torch.rand(200, 1, 8, 8) * 2 - 1
        NetworkDenoiser(network, 0)(x0 + s * torch.randn_like(x0), torch.full((200,), s))
        assert network.seen[0].var().item() == pytest.approx(1.0, abs=0.05)


def test_no_label_means_no_class() -> None:
    network = Recorder()
    conditional = NetworkDenoiser(network, 7)
    conditional(X, SIGMA, None)
    assert network.seen[2].tolist() == [7, 7, 7]
    conditional(X, SIGMA, torch.tensor([1, 2, 7]))
    assert network.seen[2].tolist() == [1, 2, 7]
    NetworkDenoiser(network, 0)(X, SIGMA, torch.tensor([1, 2, 3]))
    assert network.seen[2] is None


def test_guidance() -> None:
    calls = []

    def denoiser(x, sigma, labels=None):
        calls.append(labels)
        return torch.full_like(x, 2.0 if labels is None else 5.0)

    labels = torch.tensor([0, 1, 2])
    assert GuidedDenoiser(denoiser, 3.0)(X, SIGMA, labels).unique().item() == 2 + 3 * (5 - 2)
    assert len(calls) == 2
    calls.clear()
    assert GuidedDenoiser(denoiser, 1.0)(X, SIGMA, labels).unique().item() == 5
    assert GuidedDenoiser(denoiser, 3.0)(X, SIGMA, None).unique().item() == 2
    assert len(calls) == 2


def noisy(seed: int = 0, **options):
    images = torch.linspace(-1, 1, 5 * 16).view(5, 1, 4, 4)
    settings = {"copies": 3, "num_classes": 4, "label_dropout": 0.25}
    settings |= options
    return make_noisy(
        images, torch.tensor([0, 1, 2, 3, 0]), NoiseLevels(), generator=torch.Generator().manual_seed(seed), **settings
    )


def test_copies_of_an_example_are_adjacent_and_share_image_not_noise() -> None:
    batch = noisy(label_dropout=0.0)
    clean = batch.clean.view(5, 3, 1, 4, 4)
    assert torch.equal(clean[:, 0], clean[:, 2])
    assert batch.labels.view(5, 3).tolist() == [[k] * 3 for k in (0, 1, 2, 3, 0)]
    noise = (batch.noisy - batch.clean) / batch.sigma.view(-1, 1, 1, 1)
    assert len(noise.flatten(1).unique(dim=0)) == 15
    assert noise.std().item() == pytest.approx(1.0, abs=0.15)
    assert len(batch.sigma.unique()) == 15


def test_labels_are_dropped_at_the_rate_and_unknown_without_labels() -> None:
    images = torch.zeros(2000, 1, 2, 2)
    g = torch.Generator().manual_seed(0)
    labels = torch.zeros(2000, dtype=torch.long)
    batch = make_noisy(images, labels, NoiseLevels(), copies=2, num_classes=3, label_dropout=0.1, generator=g)
    assert (batch.labels == 3).double().mean().item() == pytest.approx(0.1, abs=0.025)
    batch = make_noisy(images, None, NoiseLevels(), copies=1, num_classes=3, label_dropout=0.0, generator=g)
    assert (batch.labels == 3).all()
    batch = make_noisy(images, None, NoiseLevels(), copies=1, num_classes=0, label_dropout=0.0, generator=g)
    assert batch.labels is None


def test_same_generator_same_batch() -> None:
    a, b, c = noisy(1), noisy(1), noisy(2)
    assert torch.equal(a.noisy, b.noisy)
    assert torch.equal(a.sigma, b.sigma)
    assert not torch.equal(a.noisy, c.noisy)


def test_loss_against_the_formula() -> None:
    batch = noisy()
    denoiser = NetworkDenoiser(Recorder(0.3), 4)
    got = denoising_loss(denoiser, batch)
    assert got.shape == (15,)
    for i in range(15):
        d = denoiser(batch.noisy[i : i + 1], batch.sigma[i : i + 1], batch.labels[i : i + 1])
        s, sd = batch.sigma[i].item(), denoiser.sigma_data
        expected = (s**2 + sd**2) / (s * sd) ** 2 * (d - batch.clean[i]).square().mean()
        assert got[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_ema_formula_and_memory() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = Ema(model, 0.9)
    expected, model.weight.data[:] = 0.0, 1.0
    for t in range(1, 200):
        ema.update(model)
        m = min(0.9, (1 + t) / (10 + t))
        expected = m * expected + (1 - m)
        assert ema.average["weight"].item() == pytest.approx(expected, abs=1e-5)
    assert expected > 0.999
    assert model.weight.item() == 1.0


def test_a_network_of_zeros_leaves_the_skip() -> None:
    sd = 0.7
    out = NetworkDenoiser(Recorder(0.0), 0, sigma_data=sd)(X, SIGMA)
    for i, s in enumerate(SIGMA.tolist()):
        torch.testing.assert_close(out[i], sd**2 / (s**2 + sd**2) * X[i])


def test_ends_of_the_axis() -> None:
    """σ → 0: D is the identity; σ → ∞: D is what the network says, scaled by σ_d."""
    network = Recorder(1.0)
    low, high = NetworkDenoiser(network, 0)(X[:2], torch.tensor([1e-6, 1e6], dtype=torch.float64))
    torch.testing.assert_close(low, X[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(high, torch.full_like(X[1], math.sqrt(1 / 3)), atol=1e-5, rtol=0)


def test_unconditional_denoiser_ignores_labels() -> None:
    denoiser = NetworkDenoiser(Recorder(0.5), 0)
    assert torch.equal(denoiser(X, SIGMA, torch.tensor([1, 2, 3])), denoiser(X, SIGMA, None))


def test_precision_of_the_image_decides() -> None:
    network = Recorder()
    out = NetworkDenoiser(network, 0)(X.float(), SIGMA)
    assert out.dtype == network.seen[0].dtype == network.seen[1].dtype == torch.float32


def test_loss_weight_over_the_whole_axis() -> None:
    sigma = torch.logspace(-2.7, 1.9, 30, dtype=torch.float64)
    sd = math.sqrt(1 / 3)
    scale = sigma * sd / (sigma**2 + sd**2).sqrt()
    torch.testing.assert_close(loss_weight(sigma, sd) * scale**2, torch.ones_like(sigma))


@pytest.mark.parametrize("log_sigma", [-5.0, -1.2, 3.0])
def test_loss_of_a_start_near_zero_is_near_one(log_sigma) -> None:
    """On data of standard deviation σ_d, F = 0 has a loss of 1 at every σ: what λ is for."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(500, 1, 6, 6, generator=g) * math.sqrt(1 / 3)
    levels = NoiseLevels(low=log_sigma - 0.01, high=log_sigma + 0.01)
    batch = make_noisy(images, None, levels, copies=1, num_classes=0, label_dropout=0.0, generator=g)
    assert denoising_loss(NetworkDenoiser(Recorder(0.0), 0), batch).mean().item() == pytest.approx(1, abs=0.05)


def test_labels_of_copies_drop_on_their_own() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.zeros(2000, dtype=torch.long)
    batch = make_noisy(
        torch.zeros(2000, 1, 1, 1), labels, NoiseLevels(), copies=2, num_classes=3, label_dropout=0.3, generator=g
    )
    dropped = (batch.labels == 3).double().view(2000, 2)
    assert dropped.prod(1).mean().item() == pytest.approx(0.09, abs=0.03)
    for rate in (0.0, 1.0):
        batch = make_noisy(
            torch.zeros(50, 1, 1, 1),
            labels[:50],
            NoiseLevels(),
            copies=2,
            num_classes=3,
            label_dropout=rate,
            generator=g,
        )
        assert (batch.labels == 3).double().mean().item() == rate


def test_levels_of_a_batch_lie_in_their_stage() -> None:
    g = torch.Generator().manual_seed(0)
    levels = NoiseLevels(low=2.0)
    batch = make_noisy(torch.zeros(300, 1, 2, 2), None, levels, copies=3, num_classes=0, label_dropout=0.0, generator=g)
    assert batch.sigma.double().log().min() >= 2 - 1e-6
    # The noise has the standard deviation that the denoiser is told.
    assert (batch.noisy.view(900, 4) / batch.sigma[:, None]).std().item() == pytest.approx(1, abs=0.03)


def test_no_images_is_a_legal_batch() -> None:
    batch = make_noisy(
        torch.zeros(0, 1, 4, 4),
        torch.zeros(0, dtype=torch.long),
        NoiseLevels(),
        copies=3,
        num_classes=2,
        label_dropout=0.1,
        generator=torch.Generator().manual_seed(0),
    )
    assert batch.noisy.shape == (0, 1, 4, 4)
    assert batch.sigma.shape == batch.labels.shape == (0,)


def test_ema_in_the_long_run_forgets_at_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = Ema(model, 0.95)
    for _ in range(500):  # past the warm-up, which ends where (1 + t)/(10 + t) = 0.95
        ema.update(model)
    model.weight.data.fill_(0.0)
    for _ in range(20):
        ema.update(model)
    assert ema.average["weight"].item() == pytest.approx(0.95**20, rel=1e-3)
    # The first step already replaces most of the random start: m = 2/11.
    short = Ema(nn.Linear(1, 1, bias=False), 0.999)
    start = short.average["weight"].item()
    short.update(model)
    assert short.average["weight"].item() == pytest.approx(start * 2 / 11, abs=1e-6)


def test_ema_copies_what_is_no_number_to_average() -> None:
    model = nn.BatchNorm1d(2)
    ema = Ema(model, 0.9)
    model(torch.randn(4, 2))
    ema.update(model)
    assert ema.average["num_batches_tracked"].item() == 1
    assert set(ema.average) == set(model.state_dict())
