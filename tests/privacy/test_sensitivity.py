"""Neighbouring data sets through the whole chain: network, clipping, micro-batches, noise."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.privacy.clipping import ClippedGradient, clip_and_sum
from dpsyngen.privacy.noise import noisy_mean
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness, poisson_sample


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def in_pieces(engine, model, x: torch.Tensor, copies: int, piece: int) -> ClippedGradient:
    total = engine.zero()
    for start in range(0, len(x), piece * copies):
        part = x[start : start + piece * copies]
        total = total + engine(lambda part=part: model(part).square().sum(1), len(part) // copies, copies)
    return total


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    examples=st.integers(1, 6),
    copies=st.sampled_from([1, 3]),
    piece=st.integers(1, 4),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    norm=st.sampled_from([0.1, 1.0]),
)
def test_sensitivity_of_a_network_in_micro_batches(seed, examples, copies, piece, scale, norm) -> None:
    """Taking one record away also moves the others to other micro-batches."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2)).double()
    x = torch.randn(examples, copies, 1, 4, 4, dtype=torch.float64)
    x *= scale ** torch.rand(examples, 1, 1, 1, 1, dtype=torch.float64)
    engine = PerExampleGradients(model, norm)
    whole = flat(in_pieces(engine, model, x.flatten(0, 1), copies, piece).sums)
    for i in range(examples):
        rest = in_pieces(engine, model, torch.cat([x[:i], x[i + 1 :]]).flatten(0, 1), copies, piece)
        assert rest.l2_sensitivity == norm
        # 1e-9 for the different order of fp64 additions and kernels of another batch size.
        assert (whole - flat(rest.sums)).norm() <= norm * (1 + 1e-9)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    magnitude=st.floats(-44, 38.2),
    norm=st.floats(1e-6, 1e3),
    dimensions=st.sampled_from([1, 7, 1000]),
)
def test_one_contribution_never_exceeds_c_over_the_whole_range_of_fp32(seed, magnitude, norm, dimensions) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = (torch.rand(1, dimensions, generator=generator, dtype=torch.float64) + 0.1) / 1.1 * 10.0**magnitude
    clipped = clip_and_sum([gradient.float()], norm)
    assert torch.isfinite(clipped.sums[0]).all()
    assert float(flat(clipped.sums).norm()) <= norm


def test_huge_gradient_is_not_let_through_by_a_factor_without_digits() -> None:
    """C / ||g|| below fp32's normal numbers rounds by up to half of itself."""
    for norm in np.geomspace(1e-6, 1e-5, 50):
        for value in (1e37, 1e38, 3e38):
            clipped = clip_and_sum([torch.full((1, 50), value)], float(norm))
            assert flat(clipped.sums).norm() <= norm


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), norm=st.floats(0.01, 100.0))
def test_below_c_a_gradient_is_kept_and_above_only_its_length_changes(seed, norm) -> None:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(1, 30, generator=generator, dtype=torch.float64)
    g /= g.norm()
    inside = clip_and_sum([(g * norm * 0.999).clone()], norm)
    assert torch.equal(inside.sums[0], (g * norm * 0.999)[0])
    outside = flat(clip_and_sum([g * norm * 17], norm).sums)
    assert float(outside.norm()) == pytest.approx(norm, rel=1e-12)
    torch.testing.assert_close(outside / outside.norm(), g[0], rtol=1e-10, atol=1e-12)


def test_poisoned_example_has_no_influence_at_all() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    engine = PerExampleGradients(model, 1.0)
    x = torch.randn(4, 3)
    outcomes = []
    for poison in (float("nan"), float("inf"), float("-inf")):
        x[1, 0] = poison
        outcomes.append(engine(lambda: model(x).sum(1), 4))
    assert [o.not_finite for o in outcomes] == [1, 1, 1]
    for o in outcomes:
        assert torch.equal(flat(o.sums), flat(outcomes[0].sums))
    rest = x[[0, 2, 3]]
    torch.testing.assert_close(flat(outcomes[0].sums), flat(engine(lambda: model(rest).sum(1), 3).sums))


def test_all_examples_poisoned() -> None:
    clipped = clip_and_sum([torch.full((3, 2), math.nan)], 1.0)
    assert clipped.not_finite == 3
    assert not clipped.sums[0].any()


def test_sensitivity_of_a_sum_of_parts_is_the_larger_not_the_sum() -> None:
    a, b = (clip_and_sum([torch.ones(2, 3)], c) for c in (1.0, 0.5))
    assert (a + b).l2_sensitivity == (b + a).l2_sensitivity == 1.0
    assert (a + b).examples == 4
    assert len((a + b).norms) == 4


@pytest.mark.parametrize("norm", [0.01, 1.0, 30.0])
def test_noise_follows_the_clipping_norm_without_being_told(norm) -> None:
    """The same call with another clipping norm: nothing but the object says how much noise."""
    model = nn.Linear(200, 200)
    out = noisy_mean(
        PerExampleGradients(model, norm).zero(),
        noise_multiplier=3.0,
        expected_examples=7.0,
        randomness=Randomness.from_system(),
        step=0,
    )
    values = flat(out)
    assert values.std() == pytest.approx(3.0 * norm / 7.0, rel=5 / math.sqrt(2 * len(values)))


def test_repeated_step_is_the_same_release_and_other_steps_are_fresh() -> None:
    """A killed run that repeats a step must not give a second noisy view of the same sum."""
    zero = PerExampleGradients(nn.Linear(100, 50), 1.0).zero()
    key = Randomness.from_system()

    def release(step: int) -> torch.Tensor:
        return flat(noisy_mean(zero, noise_multiplier=1.0, expected_examples=1.0, randomness=key, step=step))

    steps = torch.stack([release(s) for s in range(40)])
    assert torch.equal(steps[3], release(3))
    correlations = torch.corrcoef(steps)[~torch.eye(40, dtype=torch.bool)]
    assert correlations.abs().max() < 6 / math.sqrt(steps.shape[1])
    # Fresh noise averages out as 1/sqrt(steps); noise that repeats would stay.
    assert steps.mean(0).std() == pytest.approx(1 / math.sqrt(40), rel=0.06)


# ---------------------------------------------------------------------------------------------- audit


def canary_scores(present: bool, q: float, z: float, trials: int, key: Randomness) -> np.ndarray:
    """What an attacker sees of a worst-case record: the released gradient along the record's own direction."""
    model = nn.Linear(2, 1, bias=False).double()
    engine = PerExampleGradients(model, 1.0)
    others = torch.tensor([[0.0, 5.0]] * 9, dtype=torch.float64)
    data = torch.cat([others, torch.tensor([[1e4, 0.0]], dtype=torch.float64)] if present else [others])

    @cache  # of few different batches, as the other records are all alike
    def clipped_sum(ordinary: int, canaries: int) -> ClippedGradient:
        x = torch.cat([data[:ordinary], data[len(others) :][:canaries]])
        return engine(lambda: model(x).sum(1), len(x))

    scores = np.empty(trials)
    for t in range(trials):
        rows = poisson_sample(key, t, len(data), q)
        clipped = clipped_sum(int((rows < len(others)).sum()), int((rows >= len(others)).sum()))
        released = noisy_mean(clipped, noise_multiplier=z, expected_examples=q * 10, randomness=key, step=t)
        scores[t] = float(released[0][0, 0]) * q * 10
    return scores


@pytest.mark.parametrize(("q", "z"), [(1.0, 2.0), (0.5, 1.0)])
def test_attack_on_a_worst_case_record_stays_within_epsilon_and_comes_close(q, z) -> None:
    """P(S | with) <= e^ε P(S | without) + δ and the reverse, for thresholds S, up to 4 standard errors.

    Noise of 0.6 times what it should be, or a sum that is not clipped, breaks the bound; that the attack comes close
    shows that it is one.  The seeds are fixed, so the outcome is too.
    """
    trials, delta = 2500, 0.02
    bound = epsilon([Mechanism(q, z, 1)], delta)
    with_it = canary_scores(True, q, z, trials, Randomness.from_insecure_seed(1))
    without = canary_scores(False, q, z, trials, Randomness.from_insecure_seed(2))
    measured = 0.0
    for threshold in np.linspace(-1.0, 3.0, 41):
        for a, b in ((with_it > threshold, without > threshold), (without <= threshold, with_it <= threshold)):
            pa, pb = a.mean(), b.mean()
            error = math.sqrt((pa * (1 - pa) + math.exp(2 * bound) * pb * (1 - pb) + 1 / trials) / trials)
            assert pa <= math.exp(bound) * pb + delta + 4 * error
            if pb > 0.02 and pa > delta:
                measured = max(measured, math.log((pa - delta) / pb))
    assert measured > 0.6 * bound
