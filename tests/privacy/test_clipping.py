"""The clipped sum: its sensitivity is what the noise is scaled from, so it must hold for every input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpsyngen.privacy.clipping import clip_and_sum
from dpsyngen.privacy.per_example import PerExampleGradients


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    examples=st.integers(1, 7),
    exponent=st.floats(-30, 30),
    norm=st.sampled_from([1e-3, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_removing_one_example_moves_the_sum_by_at_most_the_sensitivity(seed, examples, exponent, norm, dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    scales = 10.0 ** (exponent * torch.rand(examples, 1, generator=g, dtype=torch.float64))
    gradients = [(torch.randn(examples, d, generator=g, dtype=torch.float64) * scales).to(dtype) for d in (3, 40)]
    alone = [clip_and_sum([t[i : i + 1].clone() for t in gradients], norm) for i in range(examples)]
    for one in alone:
        assert one.l2_sensitivity == norm
        assert flat(one.sums).norm() <= norm  # strictly: the slack for rounding is inside
    whole = flat(clip_and_sum([t.clone() for t in gradients], norm).sums)
    for i in range(examples):
        keep = [j for j in range(examples) if j != i]
        rest = flat(clip_and_sum([t[keep].clone() for t in gradients], norm).sums) if keep else torch.zeros_like(whole)
        # The sum over examples itself rounds: a few units in the last place of its largest possible value.
        assert (whole - rest).norm() <= norm * (1 + 8 * examples**1.5 * torch.finfo(dtype).eps)


def test_small_gradients_are_left_alone_and_large_ones_get_norm_c() -> None:
    gradients = [torch.tensor([[0.3, 0.4], [30.0, 40.0], [0.0, 0.0]], dtype=torch.float64)]
    small, large, nothing = (flat(clip_and_sum([gradients[0][i : i + 1].clone()], 1.0).sums) for i in range(3))
    assert small.tolist() == [0.3, 0.4]
    assert large.norm() == pytest.approx(1.0, abs=1e-12)
    assert nothing.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_example_that_is_not_finite_contributes_exactly_zero(poison, dtype) -> None:
    torch.manual_seed(0)
    good = [torch.randn(3, 4, dtype=dtype), torch.randn(3, 2, 2, dtype=dtype)]
    bad = [t.clone() for t in good]
    bad[1][1, 0, 1] = poison
    poisoned = clip_and_sum(bad, 1.0)
    without = clip_and_sum([t[[0, 2]].clone() for t in good], 1.0)
    assert poisoned.not_finite == 1
    assert torch.equal(flat(poisoned.sums), flat(without.sums))


def test_nan_in_an_image_stays_in_its_example() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 1)).double()
    x = torch.randn(3 * 2, 1, 6, 6, dtype=torch.float64)
    engine = PerExampleGradients(model, 1.0)
    broken = x.clone()
    broken[2, 0, 0, 0] = math.nan  # a copy of the second example
    with_nan = engine(lambda: model(broken).square().sum(1), 3, 2)
    rest = x[[0, 1, 4, 5]]
    without = engine(lambda: model(rest).square().sum(1), 2, 2)
    assert with_nan.not_finite == 1
    torch.testing.assert_close(flat(with_nan.sums), flat(without.sums), rtol=1e-12, atol=1e-14)


def test_overflowing_norm_is_still_clipped() -> None:
    huge = clip_and_sum([torch.full((1, 100), 1e30, dtype=torch.float32)], 1.0)
    assert huge.not_finite == 0
    assert flat(huge.sums).norm() == pytest.approx(1.0, rel=1e-5)


def test_copies_are_averaged_before_clipping() -> None:
    """Two copies with opposite gradients cancel; clipping each first would leave something of the unequal pair."""
    model = nn.Linear(1, 1, bias=False).double()
    engine = PerExampleGradients(model, 1.0)
    x = torch.tensor([[10.0], [-4.0]], dtype=torch.float64)
    clipped = engine(lambda: model(x).sum(1), 1, 2)
    # mean gradient (10 - 4)/2 = 3, clipped to 1; clipping before averaging would give (1 - 1)/2 = 0.
    assert clipped.norms.tolist() == [3.0]
    assert flat(clipped.sums).item() == pytest.approx(1.0, abs=1e-12)


def test_an_example_counts_once_however_many_copies() -> None:
    model = nn.Linear(3, 1).double()
    engine = PerExampleGradients(model, 0.5)
    for copies in (1, 8):
        x = 1e6 * torch.randn(copies, 3, dtype=torch.float64)
        assert flat(engine(lambda x=x: model(x).sum(1), 1, copies).sums).norm() <= 0.5


def test_empty_batch_is_zero_with_the_same_sensitivity() -> None:
    engine = PerExampleGradients(nn.Linear(3, 2), 2.0)
    empty = engine(lambda: torch.zeros(0), 0)
    assert empty.examples == 0
    assert empty.l2_sensitivity == 2.0
    assert [tuple(s.shape) for s in empty.sums] == [(2, 3), (2,)]
    assert not flat(empty.sums).any()


def test_no_layer_escapes_clipping() -> None:
    """The norm that is clipped is over all parameters together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.LayerNorm(50), nn.Linear(50, 1)).double()
    engine = PerExampleGradients(model, 1.0)
    x = 1e3 * torch.randn(1, 4, dtype=torch.float64)
    raw = engine.per_example(lambda: 1e3 * model(x).sum(1), 1)
    clipped = engine(lambda: 1e3 * model(x).sum(1), 1)
    assert clipped.norms.item() == pytest.approx(flat(raw).norm().item(), rel=1e-12)
    torch.testing.assert_close(flat(clipped.sums), flat(raw) / flat(raw).norm(), rtol=1e-9, atol=0)
