"""Per-example gradients against the oracle: plain autograd, one example at a time."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpsyngen.privacy.per_example as per_example_module
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import NoisyBatch, denoising_loss
from dpsyngen.diffusion.unet import UNet, UNetSize
from dpsyngen.privacy.per_example import PerExampleGradients, UnsupportedLayer

EXAMPLES = 4


def check_against_oracle(
    model: nn.Module, inputs: tuple[Tensor, ...], copies: int, loss: Callable[..., Tensor] | None = None, rtol=1e-10
) -> None:
    """Compare with a loop that gives the model one example (its copies) at a time."""

    def rows(*x: Tensor) -> Tensor:
        out = model(*x)
        # Weights that differ between positions, so that no two positions could be mixed up unnoticed.
        weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view_as(out[0])
        return (out * weights).sin().flatten(1).sum(1)

    loss = loss or rows
    engine = PerExampleGradients(model, 1.0)
    got = engine.per_example(lambda: loss(*inputs), EXAMPLES, copies)
    for p in model.parameters():
        assert p.grad is None, "the engine must not touch .grad"
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(got) == len(trainable)
    for b in range(EXAMPLES):
        part = tuple(x[b * copies : (b + 1) * copies] for x in inputs)
        expected = torch.autograd.grad(loss(*part).mean(), trainable)
        for g, e, name in zip(got, expected, engine.names, strict=True):
            scale = e.abs().max().clamp_min(1e-3)
            assert (g[b] - e).abs().max() <= rtol * scale, (name, b)


class TwiceCalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.out = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(torch.tanh(self.a(x))).mean((2, 3))
        return self.tied(torch.tanh(self.out(h)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Embedded(nn.Module):
    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.e, self.l = nn.Embedding(6, 5, padding_idx=padding), nn.Linear(5, 2)

    def forward(self, i: Tensor) -> Tensor:
        return self.l(self.e(i))


def frozen(model: nn.Sequential) -> nn.Sequential:
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


IMAGE = (3, 9, 9)
LARGE = (3, 26, 26)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 2-D": (lambda: nn.Linear(5, 3), (5,)),
    "linear 3-D": (lambda: nn.Linear(5, 3), (7, 5)),
    "linear 4-D": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (7, 5)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), IMAGE),
    "conv2d, many positions": (lambda: nn.Conv2d(3, 4, 3, padding=1), LARGE),
    "conv2d without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), IMAGE),
    "conv2d stride": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), IMAGE),
    "conv2d stride, many positions": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(0, 1)), (3, 40, 40)),
    "conv2d dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2), IMAGE),
    "conv2d same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), IMAGE),
    "conv2d same, even kernel": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), IMAGE),
    "conv2d valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), IMAGE),
    "conv2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv2d groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 9, 9)),
    "conv2d groups, many positions": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 26, 26)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 9, 9)),
    "conv2d pointwise": (lambda: nn.Conv2d(3, 4, 1), IMAGE),
    "conv2d pointwise stride": (lambda: nn.Conv2d(3, 4, 1, stride=2), IMAGE),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1, dilation=1), (3, 11)),
    "conv1d pointwise": (lambda: nn.Conv1d(3, 4, 1), (3, 11)),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh(), nn.GroupNorm(4, 4)), (4, 5, 5)),
    "group norm, no positions": (lambda: nn.GroupNorm(2, 8), (8,)),
    "layer norm": (lambda: nn.LayerNorm(5), (7, 5)),
    "layer norm over two axes": (lambda: nn.LayerNorm((7, 5)), (7, 5)),
    "attention": (Attention, (6, 8)),
    "called twice and tied": (TwiceCalled, (3, 5, 5)),
    "frozen parameters": (lambda: frozen(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), (5,)),
}


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_every_layer_equals_the_oracle(name, copies) -> None:
    torch.manual_seed(0)
    make, shape = CASES[name]
    x = torch.randn(EXAMPLES * copies, *shape, dtype=torch.float64)
    check_against_oracle(make().double(), (x,), copies)
    check_against_oracle(make(), (x.float(),), copies, rtol=1e-5)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("shape", [(), (7,)])
def test_embedding_equals_the_oracle(padding, shape, copies) -> None:
    torch.manual_seed(0)
    indices = torch.randint(0, 6, (EXAMPLES * copies, *shape))
    indices.view(-1)[:2] = 2
    check_against_oracle(Embedded(padding).double(), (indices,), copies)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("size", ["nano", UNetSize(16, (1, 2), 1, None, 32, patch=2)])
def test_the_whole_denoiser_equals_the_oracle(size, copies) -> None:
    torch.manual_seed(0)
    denoiser = NetworkDenoiser(UNet(size, 8, 1, 5), 5).double()
    for p in denoiser.parameters():  # away from the near-zero start, so that every gradient has a size
        p.data += 0.05 * torch.randn_like(p)
    n = EXAMPLES * copies
    clean, noise = torch.rand(n, 1, 8, 8, dtype=torch.float64) * 2 - 1, torch.randn(n, 1, 8, 8, dtype=torch.float64)
    sigma, labels = torch.rand(n, dtype=torch.float64) + 0.1, torch.randint(0, 6, (n,))

    def loss(clean: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return denoising_loss(denoiser, NoisyBatch(clean, clean + sigma.view(-1, 1, 1, 1) * noise, sigma, labels))

    check_against_oracle(denoiser, (clean, noise, sigma, labels), copies, loss)


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1, 1, 1], [2, 4], [5, 1], [6]])
def test_micro_batches_add_up_to_the_whole(pieces) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 1)).double()
    x = torch.randn(6 * 2, 2, 6, 6, dtype=torch.float64)
    engine = PerExampleGradients(model, 0.7)
    whole = engine(lambda: model(x).square().sum(1), 6, 2)
    total, start = engine.zero(), 0
    for n in pieces:
        part = x[2 * start : 2 * (start + n)]
        total = total + engine(lambda part=part: model(part).square().sum(1), n, 2)
        start += n
    assert total.examples == whole.examples == 6
    assert total.l2_sensitivity == whole.l2_sensitivity == 0.7
    for a, b in zip(total.sums, whole.sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------- refusals


def run(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> None:
    engine = PerExampleGradients(model, 1.0)
    engine.per_example(lambda: loss(model(x)) if loss else model(x).flatten(1).sum(1), len(x))


def test_batch_norm_is_refused_while_training_and_fine_in_eval() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    with pytest.raises(UnsupportedLayer, match="GroupNorm"):
        run(model, torch.randn(3, 2, 4, 4))
    model[1].eval().requires_grad_(False)
    run(model, torch.randn(3, 2, 4, 4))


def test_use_of_a_parameter_without_a_rule_is_refused_by_name() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.gain = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,i->bi", self.linear(x), self.gain.exp())

    with pytest.raises(UnsupportedLayer, match="'gain'"):
        run(Scaled(), torch.randn(2, 3))


def test_layer_without_a_rule_is_refused() -> None:
    with pytest.raises(UnsupportedLayer):
        run(nn.PReLU(), torch.randn(2, 3))


def test_parameter_without_gradient_is_an_error() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(UnsupportedLayer, match=r"unused\.weight"):
        run(Half(), torch.randn(2, 3))


def test_wrong_shapes_are_refused() -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="one number a row"):
        run(model, torch.randn(2, 3), lambda out: out.sum())
    with pytest.raises(UnsupportedLayer, match="first dimension"):
        PerExampleGradients(model, 1.0).per_example(lambda: model(torch.randn(5, 3)).sum(1)[:4], 2, 2)


def test_nothing_to_train_and_bad_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        PerExampleGradients(nn.Linear(2, 1).requires_grad_(False), 1.0)
    for norm in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be positive"):
            PerExampleGradients(nn.Linear(2, 1), norm)


def test_looking_at_parameters_is_allowed() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            w = self.linear.weight
            assert w.shape == (1, 3)
            return self.linear(x.to(w.dtype).to(w.device))

    run(Looks(), torch.randn(2, 3))


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(per_example_module).failed == 0
    assert doctest.testmod(per_example_module).attempted > 0
