"""The clipping bound on a device, in every precision that it has and by every kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.config import ComputeConfig
from dpsyngen.hardware import Compute, choose
from dpsyngen.privacy import kernels as kernels_module
from dpsyngen.privacy.clipping import ClippedGradient
from dpsyngen.privacy.contributions import Outer
from dpsyngen.privacy.kernels import KERNELS, KernelChoices, fixed_choice
from dpsyngen.privacy.noise import noisy_mean
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.privacy.rules import registry

C = 0.5
EXAMPLES = 6


class Net(nn.Module):
    """With every form that a per-example gradient is kept in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.second, self.table = nn.Conv2d(16, 32, 3, padding=1), nn.Embedding(40, 32)
        self.wide = nn.Linear(32, 64)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = self.second(F.silu(self.norm(self.first(x)))) + self.table(i)[:, :, None, None]
        return 1000 * self.wide(F.silu(h.mean(2).transpose(1, 2))).float().square().mean((1, 2))


@pytest.fixture(params=[k for k in KERNELS if k not in ("dot", "pointwise")])
def kernel(request, monkeypatch) -> str:
    """Each way to compute convolutions, where it is possible."""

    def choice(call: kernels_module.ConvolutionCall) -> str:
        return request.param if KERNELS[request.param].possible(call) else fixed_choice(call)

    monkeypatch.setattr(kernels_module, "fixed_choice", choice)
    monkeypatch.setattr(Outer, "pays", staticmethod(lambda time, outputs, inputs: True))
    monkeypatch.setattr(kernels_module, "_may_ghost", lambda call: True)
    return str(request.param)


class Task:
    """The network, on examples whose gradients are all far above C."""

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        torch.manual_seed(0)
        self.net = compute.prepare(Net())
        self.x = torch.randn(EXAMPLES, 2, 6, 6).to(compute.device)
        self.i = (torch.arange(EXAMPLES) % 40).to(compute.device)
        self.engine = PerExampleGradients(self.net, C, kernels=KernelChoices(measure=False), workers=1)

    def clipped(self, first: int = 0, last: int = EXAMPLES, physical_batch: int = EXAMPLES) -> ClippedGradient:
        def loss(part: slice) -> Tensor:
            rows = slice(first + part.start, first + part.stop)
            out: Tensor = self.net(self.x[rows], self.i[rows])
            return out

        with self.compute.autocast():
            return self.engine.sum(loss, last - first, physical_batch=physical_batch)


def flat(clipped: ClippedGradient) -> Tensor:
    return torch.cat([s.flatten() for s in clipped.sums]).double().cpu()


@pytest.mark.parametrize("last", [False, True])
def test_one_example_never_adds_more_than_c(compute, kernel, last) -> None:
    for precision in compute.allowed:
        own = choose(compute.device, ComputeConfig(precision=precision, channels_last=last)).for_dp_steps()
        task = Task(own)
        for b in range(EXAMPLES):
            clipped = task.clipped(b, b + 1)
            assert {s.dtype for s in clipped.sums} == {torch.float32}
            assert clipped.norms.min() > C
            assert 0.99 * C <= float(flat(clipped).norm()) <= C, (precision, b)


def test_sums_agree_with_those_of_a_cpu(compute, kernel) -> None:
    expected = flat(Task(choose("cpu").for_dp_steps()).clipped())
    for precision in compute.allowed:
        own = choose(compute.device, ComputeConfig(precision=precision)).for_dp_steps()
        got = flat(Task(own).clipped(physical_batch=4))
        limit = {"fp32": 1e-4, "tf32": 0.01, "bf16": 0.05}[precision]
        assert (got - expected).norm() <= limit * expected.norm(), precision


def test_the_noise_is_the_same_on_every_device(compute) -> None:
    """It comes from the run's key, on the CPU."""
    randomness = Randomness.from_insecure_seed(0)

    def noise(own: Compute) -> Tensor:
        zero = Task(own.for_dp_steps()).engine.zero()
        empty = noisy_mean(zero, noise_multiplier=1.0, expected_examples=2, randomness=randomness, step=3)
        return torch.cat([t.flatten() for t in empty]).cpu()

    assert torch.equal(noise(compute), noise(choose("cpu")))


@pytest.mark.parametrize("grid", [None, 7])
def test_many_groups_at_once(compute, grid, monkeypatch) -> None:
    """More than the second axis of CUDA's grid takes; with a small `grid`, parts of unequal size on any device."""
    if grid:
        monkeypatch.setattr(registry, "_GRID", grid)
    rows, groups = (9, 4) if grid else (2100, 32)
    torch.manual_seed(0)
    net, x = nn.GroupNorm(groups, 2 * groups), torch.randn(rows, 2 * groups, 3)
    with torch.no_grad():
        net.weight.normal_()
    x.requires_grad_()
    (net(x).sin().sum((1, 2)) @ torch.arange(rows).float()).backward()
    expected = [x.grad, net.weight.grad, net.bias.grad]
    x.grad, net.weight.grad, net.bias.grad = None, None, None
    own, there = net.to(compute.device), x.detach().to(compute.device).requires_grad_()
    engine = PerExampleGradients(own, 1.0)
    weights = torch.arange(rows, device=compute.device).float()
    found = engine.per_example(lambda: own(there).sin().sum((1, 2)) * weights, rows)
    for got, e in zip([there.grad, *(f.sum(0) for f in found)], expected, strict=True):
        assert (got.cpu() - e).norm() <= 1e-4 * e.norm()
