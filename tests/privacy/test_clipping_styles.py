"""Flat, per-layer and automatic clipping: their formulas, and that each keeps the sensitivity it states."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpsyngen.privacy.clipping import AUTOMATIC_GAMMA, STYLES, clip
from dpsyngen.privacy.contributions import Dense, Outer, Pieces, Rows
from dpsyngen.privacy.per_example import PerExampleGradients

NORM = 0.7


def make(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 20), nn.Linear(20, 1)
    ).to(dtype)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).double()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_example_contributes_more_than_c(style, scale, dtype) -> None:
    model = make(dtype)
    torch.manual_seed(1)
    x = torch.randn(6, 2, 3, 3, dtype=dtype) * scale
    engine = PerExampleGradients(model, NORM, style=style, workers=1)
    whole = engine(lambda: losses(model, x), 6)
    assert whole.l2_sensitivity == NORM
    alone = []
    for b in range(6):
        one = engine(lambda b=b: losses(model, x[b : b + 1]), 1)
        alone.append(flat(one.sums))
        assert alone[-1].norm() <= NORM * (1 + 1e-6 if dtype == torch.float32 else 1)
        rest = engine(lambda b=b: losses(model, x[[i for i in range(6) if i != b]]), 5)
        assert (flat(whole.sums) - flat(rest.sums)).norm() <= NORM * (1 + 1e-5)
    torch.testing.assert_close(sum(alone), flat(whole.sums), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_formulas(style) -> None:
    model = make()
    torch.manual_seed(1)
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    engine = PerExampleGradients(model, NORM, style=style, workers=1)
    gradients = engine.per_example(lambda: losses(model, x), 5)
    modules = [name.rpartition(".")[0] for name in engine.names]
    expected = [torch.zeros_like(g[0]) for g in gradients]
    for b in range(5):
        own = [g[b] for g in gradients]
        norm = float(flat(own).norm())
        for i, module in enumerate(modules):
            layer = float(flat([o for o, m in zip(own, modules, strict=True) if m == module]).norm())
            factor = {
                "flat": min(1.0, NORM / norm),
                "per-layer": min(1.0, NORM / math.sqrt(4) / layer),  # four modules have parameters
                "automatic": NORM / (norm + AUTOMATIC_GAMMA),
            }[style]
            expected[i] += factor * own[i]
    got = engine(lambda: losses(model, x), 5)
    for a, b in zip(got.sums, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_one_layer_that_is_not_finite_drops_the_whole_example() -> None:
    good, bad = torch.ones(3, 4), torch.ones(3, 2)
    bad[1, 0] = float("inf")
    for style in STYLES:
        got = clip([Dense(good.clone()), Dense(bad.clone())], [0, 1], 1.0, style)
        assert got.not_finite == 1
        alone = clip([Dense(good[[0, 2]].clone()), Dense(bad[[0, 2]].clone())], [0, 1], 1.0, style)
        for a, b in zip(got.sums, alone.sums, strict=True):
            torch.testing.assert_close(a, b)


def test_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="flat, per-layer, automatic"):
        PerExampleGradients(nn.Linear(2, 1), 1.0, style="global")  # type: ignore[arg-type]


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    time=st.integers(1, 6),
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 9),
    cancel=st.sampled_from([0.0, 1e-3, 1e-6, 1e-8]),
    scale=st.sampled_from([1e-3, 1.0, 1e6]),
)
def test_factors_never_understate_a_norm(seed, time, outputs, inputs, cancel, scale) -> None:
    """The fp64 norm of the product that is really added up, over the norm that clipping uses, stays near 1 or below."""
    torch.manual_seed(seed)
    g, x = torch.randn(3, time, outputs) * scale, torch.randn(3, time, inputs) * scale
    if cancel and time > 1:  # the second position undoes the first but for a trace
        g[:, 1], x[:, 1] = -g[:, 0], x[:, 0] * (1 + cancel * torch.randn(3, inputs))
    used = Outer(g, x).squared_norms().sqrt()
    for b in range(3):
        one = torch.zeros(3)
        one[b] = 1.0
        added = Outer(g, x).weighted_sum(one).double().norm()
        assert used[b] >= 0
        assert added <= used[b] * (1 + 2e-3)
    indices = torch.randint(0, 4, (3, time))
    rows = Rows(indices, g, 4)
    exact = rows.dense().double().flatten(1).norm(dim=1)
    assert (exact <= rows.squared_norms().sqrt() * (1 + 2e-3)).all()


@pytest.mark.parametrize("kind", ["dense", "pieces", "outer", "rows"])
@pytest.mark.parametrize("where", ["g", "x"])
def test_examples_that_are_not_kept_add_exactly_zero_whatever_they_hold(kind, where) -> None:
    torch.manual_seed(0)
    g, x = torch.randn(4, 2, 5), torch.randn(4, 2, 6)
    kept = torch.tensor([True, False, True, True])

    def contribution(g: Tensor, x: Tensor) -> Dense | Pieces | Outer | Rows:
        if kind == "outer":
            return Outer(g.clone(), x.clone())
        if kind == "rows":
            return Rows(torch.tensor([[0, 1], [1, 1], [2, 0], [2, 2]])[: len(g)], g.clone(), 3)
        if kind == "dense":
            return Dense(torch.bmm(g.transpose(1, 2), x))
        pieces = Pieces()
        for part in torch.bmm(g.transpose(1, 2), x).split(3):
            pieces.append(part.clone())
        return pieces

    factors = torch.tensor([0.5, 0.0, 1.0, 0.25])
    expected = contribution(g, x).weighted_sum(factors)
    (g if where == "g" or kind == "rows" else x)[1] = float("nan")
    broken = contribution(g, x)
    norms = broken.squared_norms()
    assert torch.isnan(norms[1])
    assert torch.isfinite(norms[kept]).all()
    torch.testing.assert_close(broken.weighted_sum(factors, kept), expected)
