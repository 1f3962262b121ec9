"""Half precision by autocast: the layers compute in bf16, norms and sums in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.privacy.per_example import PerExampleGradients

NORM = 0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.down = (
            nn.Conv2d(2, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 8, 3, stride=2),
        )
        self.table, self.layer = nn.Embedding(5, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 1)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = self.down(F.silu(self.norm(self.conv(x)))).flatten(2).transpose(1, 2) + self.table(i)[:, None]
        q, k, v = self.qkv(self.layer(h)).chunk(3, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v)).float().mean((1, 2))


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = Net()
    return model, torch.randn(6, 2, 7, 7), torch.arange(6) % 5


def losses(model: Net, x: Tensor, i: Tensor) -> Tensor:
    return 20 * model(x, i).square()


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).double()


def test_gradients_are_those_of_plain_autograd_under_the_same_autocast(task) -> None:
    model, x, i = task
    engine = PerExampleGradients(model, NORM, workers=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = engine.per_example(lambda: losses(model, x, i), 6)
    for b in range(6):
        one = slice(b, b + 1)
        with torch.autocast("cpu", torch.bfloat16):
            low = flat(list(torch.autograd.grad(losses(model, x[one], i[one]).sum(), engine.parameters)))
        full = flat(list(torch.autograd.grad(losses(model, x[one], i[one]).sum(), engine.parameters)))
        own = flat([g[b] for g in got])
        assert (own - low).norm() <= 0.03 * low.norm()
        assert (own - full).norm() <= 0.1 * full.norm()
        assert (low - full).norm() > 0  # autocast was really on
    assert {g.dtype for g in got} == {torch.float32}


def test_sums_and_norms_are_fp32_and_keep_the_sensitivity(task) -> None:
    model, x, i = task
    engine = PerExampleGradients(model, NORM, workers=1)
    with torch.autocast("cpu", torch.bfloat16):
        clipped = engine(lambda: losses(model, x * 100, i), 6)
        assert {s.dtype for s in clipped.sums} == {torch.float32}
        assert (clipped.norms > NORM).any()
        for b in range(6):
            one = engine(lambda b=b: losses(model, 100 * x[b : b + 1], i[b : b + 1]), 1)
            assert flat(one.sums).norm() <= NORM * (1 + 1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_sum_in_parts_under_autocast(task, workers) -> None:
    model, x, i = task
    engine = PerExampleGradients(model, NORM, workers=workers)
    with torch.autocast("cpu", torch.bfloat16):
        whole = engine(lambda: losses(model, x, i), 6)
        parts = engine.sum(lambda part: losses(model, x[part], i[part]), 6, physical_batch=2)
    full = engine.sum(lambda part: losses(model, x[part], i[part]), 6, physical_batch=2)
    assert (flat(whole.sums) - flat(parts.sums)).norm() <= 0.03 * flat(whole.sums).norm()
    assert not torch.equal(flat(full.sums), flat(parts.sums))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("low", [False, True])
def test_gpu_agrees_with_cpu(task, low) -> None:
    model, x, i = task
    expected = PerExampleGradients(model, NORM, workers=1)(lambda: losses(model, x, i), 6)
    model, x, i = model.cuda(), x.cuda(), i.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=low):
        got = PerExampleGradients(model, NORM)(lambda: losses(model, x, i), 6)
    difference = (flat(got.sums).cpu() - flat(expected.sums)).norm()
    assert difference <= (0.1 if low else 1e-3) * flat(expected.sums).norm()
