"""One example's part of a clipped sum stays within C when the machine computes in less than fp32.

bf16 is PyTorch's own autocast.  TF32 is an NVIDIA GPU's, which is emulated here: products of fp32 tensors get operands
of 11 bits wherever PyTorch's switches would let a GPU do that at that moment.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import dpsyngen.privacy.clipping as clipping_module
from dpsyngen.full_precision import tf32
from dpsyngen.privacy import kernels as kernels_module
from dpsyngen.privacy.clipping import STYLES, default_grid
from dpsyngen.privacy.contributions import Outer
from dpsyngen.privacy.kernels import KERNELS, KernelChoices, fixed_choice
from dpsyngen.privacy.per_example import PerExampleGradients
from tests.tf32 import tf32_allowed

C = 0.5
EXAMPLES, COPIES = 4, 2

_MATRICES = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "addmv", "addmv_", "dot"}
_CONVOLUTIONS = {"convolution", "convolution_backward"}


def of_11_bits(value: object) -> object:
    """Rounded to nearest, as the tensor cores take their operands."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.detach().contiguous().view(torch.int32)
    return torch.where(value.isfinite(), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), value)


class TensorCores(TorchDispatchMode):
    """A CPU that rounds as a GPU with TF32 does."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        matrices, convolutions = tf32_allowed()
        if (name in _MATRICES and matrices) or (name in _CONVOLUTIONS and convolutions):
            self.rounded.add(name)
            # The tensor that an in-place function adds to is no operand of the product.
            first = args[:1] if name.endswith("_") else ()
            args = (*first, *tree_map(of_11_bits, args[len(first) :]))
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """With every form that a per-example gradient is kept in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.table = nn.Embedding(40, 32)
        self.wide = nn.Linear(32, 64)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = self.second(F.silu(self.norm(self.first(x)))) + self.table(i)[:, :, None, None]
        return self.wide(F.silu(h.mean(2).transpose(1, 2))).float().square().mean((1, 2))


@pytest.fixture(params=["each", "groups", "unfold", "ghost"])
def kernel(request, monkeypatch) -> str:
    """Each way to compute convolutions, where it is possible."""

    def choice(call: kernels_module.ConvolutionCall) -> str:
        return request.param if KERNELS[request.param].possible(call) else fixed_choice(call)

    monkeypatch.setattr(kernels_module, "fixed_choice", choice)
    # Worth it or not.
    monkeypatch.setattr(Outer, "pays", staticmethod(lambda time, outputs, inputs: True))
    monkeypatch.setattr(kernels_module, "_may_ghost", lambda call: True)
    return str(request.param)


class Task:
    """The network, on examples whose gradients are all far above C."""

    def __init__(self, style: str = "flat") -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.x, self.i = torch.randn(EXAMPLES * COPIES, 2, 6, 6), torch.arange(EXAMPLES * COPIES) % 40
        self.engine = PerExampleGradients(
            self.net,
            C,
            style=style,
            kernels=KernelChoices(measure=False),
            workers=1,  # type: ignore[arg-type]
        )

    def loss(self, part: slice) -> Tensor:
        rows = slice(part.start * COPIES, part.stop * COPIES)
        return 1000 * self.net(self.x[rows], self.i[rows])

    def parts(self) -> list[float]:
        """For each example, the norm (fp64) of its part of the clipped sum."""
        out = []
        for b in range(EXAMPLES):
            clipped = self.engine(lambda b=b: self.loss(slice(b, b + 1)), 1, COPIES)
            assert clipped.norms.min() > C
            assert {s.dtype for s in clipped.sums} == {torch.float32}
            out.append(float(torch.cat([s.flatten() for s in clipped.sums]).double().norm()))
        return out


@contextlib.contextmanager
def nothing_at_all(device: str):
    yield


@pytest.mark.parametrize("style", STYLES)
def test_bf16_keeps_the_bound(kernel, style) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        parts = Task(style).parts()
    assert max(parts) <= C
    assert min(parts) >= (0.99 if style != "per-layer" else 0.3) * C


@pytest.mark.parametrize("style", STYLES)
def test_tf32_keeps_the_bound(kernel, style) -> None:
    with TensorCores() as cores, tf32(True):
        parts = Task(style).parts()
    assert max(parts) <= C
    assert "convolution" in cores.rounded  # the network itself did compute in TF32
    assert "convolution_backward" in cores.rounded


def norms_of_unlucky_gradients() -> list[float]:
    """Of inputs that 11 bits round up by as much as they can: 1 + 2^-11 becomes 1 + 2^-10."""
    layer = nn.Linear(64, 64, bias=False)
    engine = PerExampleGradients(layer, C, kernels=KernelChoices(measure=False), workers=1)
    out = []
    for scale in (1.0, 1.1, 1.3, 1.7):
        x = torch.full((1, 64), 1 + 2**-11)
        with TensorCores(), tf32(True):
            clipped = engine(lambda x=x, scale=scale: scale * layer(x).sum(1), 1)
        out.append(float(clipped.sums[0].double().norm()))
    return out


def test_the_worst_case_of_tf32_would_break_the_bound_by_half_a_thousandth(monkeypatch) -> None:
    """So that the test above can fail: what the engine does about TF32 is needed."""
    monkeypatch.setattr(Outer, "pays", staticmethod(lambda time, outputs, inputs: True))
    assert max(norms_of_unlucky_gradients()) <= C
    monkeypatch.setattr(clipping_module, "full_precision", nothing_at_all)
    assert max(norms_of_unlucky_gradients()) > C * (1 + 4e-4)


def test_bf16_without_full_precision_rounds_the_sums(monkeypatch) -> None:
    monkeypatch.setattr(clipping_module, "full_precision", nothing_at_all)
    monkeypatch.setattr(Outer, "pays", staticmethod(lambda time, outputs, inputs: True))
    task = Task()
    with torch.autocast("cpu", torch.bfloat16):
        sums = task.engine(lambda: task.loss(slice(0, 1)), 1, COPIES).sums
    assert torch.bfloat16 in {s.dtype for s in sums}


def test_sums_of_many_examples_are_those_of_fp32(kernel) -> None:
    """Clipping rounds nothing further: only what the network computed differs."""
    task = Task()
    exact = task.engine(lambda: task.loss(slice(0, EXAMPLES)), EXAMPLES, COPIES)
    with TensorCores(), tf32(True):
        rounded = task.engine(lambda: task.loss(slice(0, EXAMPLES)), EXAMPLES, COPIES)
    for a, b in zip(rounded.sums, exact.sums, strict=True):
        assert (a - b).norm() <= 0.02 * (b.norm() + C)
    assert not all(torch.equal(a, b) for a, b in zip(rounded.sums, exact.sums, strict=True))


@pytest.mark.parametrize("low", ["tf32", "bf16"])
def test_the_grid_of_discrete_noise_keeps_its_exact_bound(low) -> None:
    task = Task()
    grid = default_grid(C, sum(p.numel() for p in task.engine.parameters))
    modes = (TensorCores(), tf32(True)) if low == "tf32" else (torch.autocast("cpu", torch.bfloat16),)
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        total = task.engine.sum_on_grid(task.loss, 1, grid=grid, copies=COPIES)
    assert sum(int(v) ** 2 for s in total.sums for v in s.flatten().tolist()) <= total.l2_sensitivity**2
    assert total.not_finite == 0
