"""The engine's own branches, and the ways a model can slip a parameter past it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import NoiseLevels, denoising_loss, make_noisy
from dpsyngen.diffusion.unet import UNet, UNetSize
from dpsyngen.privacy.per_example import PerExampleGradients, UnsupportedLayer


def weighted(out: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view_as(out[0])
    return (out * weights).sin().flatten(1).sum(1)


def worst_error(model: nn.Module, x: Tensor, copies: int) -> float:
    """Largest error against autograd of one example at a time, relative to the largest entry of the gradient."""
    engine = PerExampleGradients(model, 1.0)
    examples = len(x) // copies
    got = engine.per_example(lambda: weighted(model(x)), examples, copies)
    worst = 0.0
    for b in range(examples):
        expected = torch.autograd.grad(weighted(model(x[b * copies : (b + 1) * copies])).mean(), engine.parameters)
        for g, e in zip(got, expected, strict=True):
            worst = max(worst, float((g[b] - e).abs().max() / e.abs().max().clamp_min(1e-3)))
    return worst


ATTENDING = UNetSize(16, (1, 2), 1, (8, 4), 32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("size", ["nano", ATTENDING])
def test_real_network_and_real_noise_of_ten_classes(size, dtype, tolerance) -> None:
    """The rows of `make_noisy`, as the training makes them: dropped labels, stratified σ, copies adjacent."""
    torch.manual_seed(0)
    copies, examples = 2, 3
    denoiser = NetworkDenoiser(UNet(size, 8, 1, 10), 10).to(dtype)
    assert size == "nano" or sum("qkv" in n for n, _ in denoiser.named_parameters()) >= 4
    for p in denoiser.parameters():
        p.data += 0.05 * torch.randn_like(p)
    batch = make_noisy(
        torch.rand(examples, 1, 8, 8, dtype=dtype) * 2 - 1,
        torch.tensor([3, 9, 0]),
        NoiseLevels(),
        copies=copies,
        num_classes=10,
        label_dropout=0.5,
        generator=torch.Generator().manual_seed(1),
    )
    engine = PerExampleGradients(denoiser, 1.0)
    got = engine.per_example(lambda: denoising_loss(denoiser, batch), examples, copies)
    assert [p.grad for p in denoiser.parameters()] == [None] * len(engine.parameters)
    for b in range(examples):
        part = slice(b * copies, (b + 1) * copies)
        alone = type(batch)(*(None if t is None else t[part].to(t.dtype) for t in vars(batch).values()))
        expected = torch.autograd.grad(denoising_loss(denoiser, alone).mean(), engine.parameters)
        whole = torch.cat([e.flatten() for e in expected]).norm()
        for g, e, name in zip(got, expected, engine.names, strict=True):
            assert (g[b] - e).norm() <= tolerance * max(e.norm(), 1e-3 * whole), name


def test_gradients_of_before_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    kept = [torch.randn_like(p) for p in model.parameters()]
    for p, k in zip(model.parameters(), kept, strict=True):
        p.grad = k.clone()
    PerExampleGradients(model, 1.0)(lambda: model(torch.randn(5, 3)).sum(1), 5)
    assert all(torch.equal(p.grad, k) for p, k in zip(model.parameters(), kept, strict=True))


def test_negative_padding_index_counts_from_the_end() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(4, 3)

        def forward(self, i: Tensor) -> Tensor:
            return F.embedding(i, self.e.weight, padding_idx=-1)

    assert worst_error(Model().double(), torch.tensor([[0, 3], [3, 1]]), 1) < 1e-12


# ------------------------------------------------------------------------------------------------- refusals


class Wrap(nn.Module):
    """A model of one function and two linear layers."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.l, self.o = function, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FUNCTIONS = {
    "parameter as input": lambda m, x: F.linear(m.l.weight, m.o.weight, m.o.bias) + m.l(x) + m.o(x),
    "weight computed from the batch": lambda m, x: m.o(x) + F.linear(x, m.l(x).T @ m.l(x), m.o.bias),
    "weight on the left": lambda m, x: (m.l.weight @ x.T).T + m.l(x) + m.o(x),
    "entry for each row": lambda m, x: m.o(x) + torch.nn.functional.pad(m.l.weight, (0, 0, 0, 0)) + m.l(x),
    "joined to the batch": lambda m, x: m.o(torch.cat([x, m.l.weight])[: len(x)]) + m.l(x),
    "index from the batch": lambda m, x: m.o(x) + m.l.bias[x.argmax(1)][:, None] + m.l(x),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.l.weight) + m.l(x) + m.o(x),
    "checkpointing": lambda m, x: m.o(checkpoint(m.l, x.requires_grad_(), use_reentrant=True)),
    "batch norm, functional": lambda m, x: F.batch_norm(m.o(m.l(x)), None, None, training=True),
    "batch norm, torch": lambda m, x: torch.batch_norm(
        m.o(m.l(x)), None, None, None, None, True, 0.1, 1e-5, False
    ),
    "max_norm": lambda m, x: F.embedding(torch.zeros(len(x), dtype=torch.long), m.l.weight, max_norm=1.0) + m.o(x),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_would_escape_clipping_is_refused(name) -> None:
    model = Wrap(FUNCTIONS[name])
    with pytest.raises(UnsupportedLayer):
        PerExampleGradients(model, 1.0).per_example(lambda: model(torch.randn(3, 3)).sum(1), 3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.r(x)[0]


LAYERS = {
    "lstm": (Recurrent, (5, 3)),
    "convolution in 3-D": (lambda: nn.Conv3d(2, 2, 3), (2, 5, 5, 5)),
    "instance norm with weights": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 5, 5)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), (3,)),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False, track_running_stats=False)).eval(),
        (2, 5, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_a_rule_are_refused(name) -> None:
    make, shape = LAYERS[name]
    model = make()
    with pytest.raises(UnsupportedLayer):
        PerExampleGradients(model, 1.0).per_example(lambda: model(torch.randn(2, *shape)).flatten(1).sum(1), 2)


def test_statistics_of_private_examples_are_not_kept_in_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.InstanceNorm2d(2, track_running_stats=True))
    with pytest.raises(UnsupportedLayer, match="track_running_stats"):
        PerExampleGradients(model, 1.0)(lambda: weighted(model(torch.randn(3, 2, 4, 4))), 3)
    assert not model[1].running_mean.any()
    model.eval()
    PerExampleGradients(model, 1.0)(lambda: weighted(model(torch.randn(3, 2, 4, 4))), 3)


def test_failed_pass_leaves_nothing_behind() -> None:
    """Each pass has its own tape: an exception in between does not spill gradients into the next batch."""
    model = nn.Linear(3, 1).double()
    engine = PerExampleGradients(model, 1.0)
    x = torch.randn(4, 3, dtype=torch.float64)
    before = engine.per_example(lambda: model(x).sum(1), 4)
    with pytest.raises(ValueError, match="one number a row"):
        engine.per_example(lambda: model(x).sum(), 4)
    model(x)  # a forward pass outside the engine, without a backward
    after = engine.per_example(lambda: model(x).sum(1), 4)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("rows", [3, 5])
def test_number_of_rows_must_be_examples_times_copies(rows) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises((UnsupportedLayer, ValueError)):
        PerExampleGradients(model, 1.0)(lambda: model(torch.randn(rows, 3)).sum(1), 2, 2)


@pytest.mark.parametrize("copies", [1, 2])
def test_mixing_by_arithmetic_is_found_by_comparing_batches(copies) -> None:
    """What no single pass can see: the gradient of an example changes with the company it is in."""
    torch.manual_seed(0)
    x = torch.randn(4 * copies, 3)
    honest = Wrap(lambda m, h: m.o(torch.tanh(m.l(h))))
    mixing = Wrap(lambda m, h: m.o(torch.tanh(m.l(h)) - 0.1 * torch.tanh(m.l(h)).mean(0)))

    def verify(model: nn.Module) -> None:
        rows = lambda part: x[part.start * copies : part.stop * copies]  # noqa: E731
        PerExampleGradients(model, 1.0).verify(lambda part: weighted(model(rows(part))), 4, copies)

    verify(honest)
    with pytest.raises(UnsupportedLayer, match="depends on the other examples"):
        verify(mixing)
    with pytest.raises(ValueError, match="at least 2"):
        PerExampleGradients(honest, 1.0).verify(lambda part: weighted(honest(x[part])), 1)
