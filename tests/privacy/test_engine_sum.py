"""`engine.sum`: any partition gives the oracle's sum, memory stays bounded, nothing of a pass stays alive."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from dpsyngen.privacy.kernels import KERNELS, ConvolutionCall, KernelChoices
from dpsyngen.privacy.per_example import (
    PerExampleGradients,
    UnsupportedLayer,
    bytes_for_each_example,
    find_physical_batch,
)

NORM = 0.8


class Net(nn.Module):
    """A bit of everything: convolutions, normalisation, an embedding, linear layers in three axes, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.deep = nn.Conv2d(8, 24, 3, padding=1)
        self.table, self.gain = nn.Embedding(5, 24), nn.Parameter(torch.ones(24))
        self.mix, self.out = nn.Linear(24, 24), nn.Linear(24, 1)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = torch.tanh(self.deep(torch.tanh(self.norm(self.conv(x)))))
        h = h.flatten(2).transpose(1, 2) * self.gain + self.table(i)[:, None]
        return self.out(torch.tanh(self.mix(h))).mean((1, 2))


def make(examples: int, copies: int, dtype: torch.dtype = torch.float64) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    rows = examples * copies
    return Net().to(dtype), torch.randn(rows, 2, 3, 3, dtype=dtype) * 3, torch.arange(rows) % 5


def oracle(model: Net, x: Tensor, i: Tensor, copies: int) -> list[Tensor]:
    parameters = list(model.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    for a, b in zip(x.split(copies), i.split(copies), strict=True):
        gradient = torch.autograd.grad(10 * model(a, b).square().mean(), parameters)
        factor = min(1.0, NORM / float(torch.cat([g.flatten() for g in gradient]).norm()))
        for s, g in zip(sums, gradient, strict=True):
            s += factor * g
    return sums


def loss_of(model: Net, x: Tensor, i: Tensor, copies: int):
    def loss(part: slice) -> Tensor:
        rows = slice(part.start * copies, part.stop * copies)
        return 10 * model(x[rows], i[rows]).square()

    return loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("physical", [1, 2, 5, 64])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("examples", "copies"), [(1, 1), (2, 3), (7, 1), (16, 3)])
def test_any_partition_gives_the_oracles_sum(examples, copies, workers, physical, dtype, tolerance) -> None:
    model, x, i = make(examples, copies, dtype)
    engine = PerExampleGradients(model, NORM, kernels=KernelChoices(measure=False), workers=workers)
    got = engine.sum(loss_of(model, x, i, copies), examples, copies=copies, physical_batch=physical)
    assert got.examples == examples == len(got.norms)
    assert got.l2_sensitivity == NORM
    assert (got.norms > NORM).any()
    for a, b in zip(got.sums, oracle(model, x, i, copies), strict=True):
        assert (a - b).norm() <= tolerance * examples * NORM


def test_no_examples_are_a_legal_batch() -> None:
    model, x, i = make(1, 1)
    got = PerExampleGradients(model, NORM).sum(loss_of(model, x, i, 1), 0)
    assert got.examples == 0 == len(got.norms)
    assert all(not s.any() for s in got.sums)
    assert got.l2_sensitivity == NORM


@pytest.mark.parametrize("physical", [1, 3, 8, 50])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("examples", [1, 5, 16, 37])
def test_each_example_is_asked_for_once_and_few_at_a_time(examples, workers, physical) -> None:
    model = nn.Linear(3, 1)
    x = torch.randn(examples, 3)
    lock, asked, now, most = threading.Lock(), [], 0, 0
    barrier = threading.Event()

    def loss(part: slice) -> Tensor:
        nonlocal now, most
        with lock:
            asked.extend(range(part.start, part.stop))
            now += part.stop - part.start
            most = max(most, now)
        barrier.wait(0.002)  # let the others begin
        value = model(x[part]).sum(1)
        with lock:
            now -= part.stop - part.start
        return value

    engine = PerExampleGradients(model, NORM, workers=workers)
    engine.sum(loss, examples, physical_batch=physical)
    assert sorted(asked) == list(range(examples))
    assert most <= physical


@pytest.mark.parametrize("workers", [1, 3])
def test_repeated_it_is_the_same_to_the_last_bit(workers) -> None:
    model, x, i = make(16, 1, torch.float32)
    engine = PerExampleGradients(model, NORM, workers=workers)
    first, second = (engine.sum(loss_of(model, x, i, 1), 16, physical_batch=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.sums, second.sums, strict=True))
    assert torch.equal(first.norms, second.norms)


def test_order_of_the_examples_does_not_matter() -> None:
    model, x, i = make(12, 1)
    engine = PerExampleGradients(model, NORM, workers=2)
    order = torch.randperm(12)
    a = engine.sum(loss_of(model, x, i, 1), 12, physical_batch=5)
    b = engine.sum(loss_of(model, x[order], i[order], 1), 12, physical_batch=4)
    for s, t in zip(a.sums, b.sums, strict=True):
        torch.testing.assert_close(s, t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a.norms[order], b.norms)


@pytest.mark.parametrize("physical", [1, 4, 64])
def test_poisoned_example_contributes_nothing_in_any_partition(physical) -> None:
    model, x, i = make(9, 1)
    others = [k for k in range(9) if k != 4]
    engine = PerExampleGradients(model, NORM, workers=2)
    expected = engine.sum(loss_of(model, x[others], i[others], 1), 8)
    x[4, 0, 1, 1] = float("nan")
    got = engine.sum(loss_of(model, x, i, 1), 9, physical_batch=physical)
    assert got.not_finite == 1
    for a, b in zip(got.sums, expected.sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_bad_sizes_are_refused_and_an_error_in_one_part_is_the_callers() -> None:
    model, x, i = make(6, 1)
    engine = PerExampleGradients(model, NORM, workers=2)
    good = loss_of(model, x, i, 1)
    for bad in ({"physical_batch": 0}, {"copies": 0}):
        with pytest.raises(ValueError, match="at least"):
            engine.sum(good, 6, **bad)
    with pytest.raises(ValueError, match="at least"):
        engine.sum(good, -1)

    def fails(part: slice) -> Tensor:
        if part.start:
            raise KeyError("no such image")
        return good(part)

    with pytest.raises(KeyError, match="no such image"):
        engine.sum(fails, 6)
    assert engine.sum(good, 6).examples == 6


def test_parameter_without_gradient_in_this_pass_is_an_error_though_it_had_one_before() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.both = nn.Linear(3, 1), nn.Linear(3, 1), True

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if self.both else self.a(x)

    model = Sometimes()
    engine = PerExampleGradients(model, NORM)
    x = torch.randn(4, 3)
    engine.sum(lambda part: model(x[part]).sum(1), 4)
    model.both = False
    with pytest.raises(UnsupportedLayer, match=r"b\.weight"):
        engine.sum(lambda part: model(x[part]).sum(1), 4)


def test_state_of_an_earlier_pass_is_never_reused() -> None:
    """Other data and other shapes in between (four axes, fewer rows) leave no trace."""
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16)).double()
    engine = PerExampleGradients(model, NORM)
    x, y, z = (torch.randn(*s, 3, dtype=torch.float64) for s in ((4, 2, 5), (4, 2, 5), (3,)))

    def norms(t: Tensor) -> Tensor:
        return engine(lambda: model(t).sin().flatten(1).sum(1), len(t)).norms

    first = norms(x)
    assert not torch.allclose(norms(y), first)
    norms(z)
    assert torch.equal(norms(x), first)


class Ghosts(KernelChoices):
    """Gram matrices wherever possible."""

    def run(self, call: ConvolutionCall):
        return KERNELS["ghost" if KERNELS["ghost"].possible(call) else "each"].run(call)


@pytest.mark.parametrize("kernels", [None, Ghosts()])
def test_nothing_of_a_pass_stays_alive(kernels) -> None:
    """Cycles through the autograd graph are invisible to Python's collector: each pass would leak its activations."""
    model, x, i = make(4, 1, torch.float32)
    seen = []
    model.deep.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    model.mix.register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    engine = PerExampleGradients(model, NORM, kernels=kernels, workers=1)
    gc.disable()
    try:
        clipped = engine.sum(loss_of(model, x, i, 1), 4)
        assert len(seen) == 2
        assert [ref() for ref in seen] == [None, None]
        assert clipped.examples == 4
    finally:
        gc.enable()


def test_memory_follows_the_physical_batch_and_not_the_logical_one() -> None:
    model, x, i = make(64, 1, torch.float32)
    engine = PerExampleGradients(model, NORM, kernels=KernelChoices(measure=False), workers=1)
    alive = 0

    class Counted:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive
            self.tensor = tensor
            alive += len(tensor) if tensor.dim() else 0

        def __del__(self) -> None:
            nonlocal alive
            alive -= len(self.tensor) if self.tensor.dim() else 0

    def peak(examples: int, physical: int) -> int:
        most = 0

        def loss(part: slice) -> Tensor:
            nonlocal most
            value = loss_of(model, x, i, 1)(part)
            most = max(most, alive)
            return value

        with torch.autograd.graph.saved_tensors_hooks(Counted, lambda c: c.tensor):
            engine.sum(loss, examples, physical_batch=physical)
        return most

    base = peak(8, 8)
    assert base > 0
    assert peak(64, 8) == base
    assert peak(64, 32) > 2 * base
    assert alive == 0


def test_physical_batch_is_found_for_the_memory_given() -> None:
    model, x, i = make(2, 1, torch.float32)
    engine = PerExampleGradients(model, NORM, workers=1)
    loss = loss_of(model, x, i, 1)
    each = bytes_for_each_example(engine, loss)
    # At least what a pass must keep: the inputs of the convolutions and the gradients themselves.
    assert each > 4 * (2 * 9 + 8 * 9 + 24 * 9)
    found = [find_physical_batch(engine, loss, memory=m, most=1000) for m in (1, 10 * each, 100 * each, 10**12)]
    assert found == [1, 4, 64, 512]
    assert find_physical_batch(engine, loss, memory=10**12) == 64
    assert 1 <= find_physical_batch(engine, loss) <= 64
    with pytest.raises(ValueError, match="must be positive"):
        find_physical_batch(engine, loss, memory=0)
