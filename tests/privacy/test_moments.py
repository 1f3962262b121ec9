"""Sums over all records: what one record can change, exactly; what noise they get."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsyngen.privacy.moments import Rows, VectorSum, class_sums, matrices, released, scatter_sums
from dpsyngen.privacy.randomness import Randomness

KEY = Randomness.from_insecure_seed(0)


def difference(a: VectorSum, b: VectorSum) -> float:
    """Norm of the change in the isometric vector, in Python's own integers and not in floating point."""
    steps = (a.sums - b.sums).flatten().tolist()
    units = (a.grid * a.weights).repeat(len(a.sums)).tolist()
    return math.sqrt(math.fsum((s * u) ** 2 for s, u in zip(steps, units, strict=True)))


def extreme_rows(seed: int, records: int, size: int) -> torch.Tensor:
    """Rows of every length from far below the clipping norm to the end of fp64, some of them not numbers."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(records, size)) * 10.0 ** rng.uniform(-8, 8, (records, 1))
    odd = [1.0, 0.0, 1e-300, 1e200, 1.7e308, np.nan, np.inf, -np.inf]
    for i in np.flatnonzero(rng.random(records) < 0.4):
        rows[i] = np.where(rng.random(size) < 0.5, rng.choice(odd), rows[i])
    return torch.from_numpy(rows)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    records=st.integers(1, 6),
    size=st.sampled_from([1, 3, 40]),
    norm=st.sampled_from([1e-3, 1.0, math.sqrt(784), 3e4]),
    weight=st.sampled_from([0.0, 0.5, 7.0]),
)
def test_class_sums_move_by_no_more_than_their_sensitivity(seed, records, size, norm, weight) -> None:
    rows = extreme_rows(seed, records, size)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, records))
    whole = class_sums([Rows(rows, labels)], 3, norm=norm, count_weight=weight)
    for i in range(records):
        keep = torch.arange(records) != i
        rest = class_sums([Rows(rows[keep], labels[keep])], 3, norm=norm, count_weight=weight)
        assert rest.l2_sensitivity == whole.l2_sensitivity
        assert difference(whole, rest) <= whole.l2_sensitivity


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    records=st.integers(1, 6),
    size=st.sampled_from([1, 3, 20]),
    norm=st.sampled_from([1e-3, 1.0, 14.0, 3e4]),
    outside=st.booleans(),
)
def test_scatter_moves_by_no_more_than_its_sensitivity(seed, records, size, norm, outside) -> None:
    rows = extreme_rows(seed, records, size)
    energy = extreme_rows(seed + 1, records, 1)[:, 0].abs() if outside else None
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, records))
    whole = scatter_sums([Rows(rows, labels, energy)], 2, norm=norm)
    assert whole.l2_sensitivity == norm**2
    for i in range(records):
        keep = torch.arange(records) != i
        part = Rows(rows[keep], labels[keep], None if energy is None else energy[keep])
        assert difference(whole, scatter_sums([part], 2, norm=norm)) <= norm**2


def test_sensitivities_are_attained() -> None:
    """Were they larger than need be, noise would be wasted."""
    none = torch.zeros(0, 4)
    one = torch.tensor([[0.0, -40.0, 30.0, 0.0]])
    label = torch.tensor([1])
    for weight in (0.0, 3.0):
        moved = class_sums([Rows(one, label)], 2, norm=2.0, count_weight=weight)
        rest = class_sums([Rows(none, label[:0])], 2, norm=2.0, count_weight=weight)
        assert difference(moved, rest) == pytest.approx(math.hypot(2.0, weight), rel=1e-6)
        assert moved.l2_sensitivity == pytest.approx(math.hypot(2.0, weight), rel=1e-12)
    moved, rest = (scatter_sums([Rows(r, None)], 1, norm=2.0) for r in (one, none))
    assert difference(moved, rest) == pytest.approx(4.0, rel=1e-4)
    # All of the vector outside: the other extreme of the joint bound.
    moved = scatter_sums([Rows(0 * one, None, torch.tensor([1e9]))], 1, norm=2.0)
    rest = scatter_sums([Rows(none, None, none[:, 0])], 1, norm=2.0)
    assert difference(moved, rest) == pytest.approx(4.0, rel=1e-4)


def test_values_are_the_sums_of_clipped_rows() -> None:
    torch.manual_seed(0)
    rows, labels = torch.randn(50, 5, dtype=torch.float64) * 2, torch.randint(0, 3, (50,))
    clipped = rows * (3.0 / rows.norm(dim=1, keepdim=True)).clamp_max(1)
    assert (rows.norm(dim=1) > 3).any()
    assert (rows.norm(dim=1) < 3).any()
    total = class_sums([Rows(rows, labels)], 3, norm=3.0, count_weight=1.0)
    for k in range(3):
        torch.testing.assert_close(total.values[k, :5], clipped[labels == k].sum(0), rtol=0, atol=1e-6)
        assert total.values[k, 5] == (labels == k).sum()
    scatter = scatter_sums([Rows(rows, labels)], 3, norm=3.0)
    got, outside = matrices(scatter.values, 5)
    assert outside is None
    for k in range(3):
        part = clipped[labels == k]
        torch.testing.assert_close(got[k], part.T @ part, rtol=0, atol=2e-3)
        weighted = scatter.values[k] * scatter.weights
        assert float(weighted.norm()) == pytest.approx(float((part.T @ part).norm()), rel=1e-4)


def test_the_whole_vector_is_clipped_and_the_energy_outside_with_it() -> None:
    rows, outside = torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([16.0, 0.16])
    total = scatter_sums([Rows(rows, None, outside)], 1, norm=1.0)
    matrix, energy = matrices(total.values, 2)
    assert float(matrix[0, 0, 0]) == pytest.approx(9 / 25 + 0.09, rel=1e-4)  # the first is cut to a fifth, of length 5
    assert energy.tolist() == pytest.approx([16 / 25 + 0.16], rel=1e-4)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e300])
def test_records_that_are_not_finite_contribute_nothing_at_all(poison) -> None:
    torch.manual_seed(0)
    rows, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1])
    bad = torch.cat([rows, torch.full((1, 3), poison, dtype=torch.float64)])
    bad_labels = torch.cat([labels, torch.tensor([1])])
    a = class_sums([Rows(rows, labels)], 2, norm=1.0, count_weight=1.0)
    b = class_sums([Rows(bad, bad_labels)], 2, norm=1.0, count_weight=1.0)
    c, d = (scatter_sums([Rows(r, n)], 2, norm=1.0) for r, n in ((rows, labels), (bad, bad_labels)))
    assert torch.equal(a.sums, b.sums)
    assert torch.equal(c.sums, d.sums)
    assert (a.not_finite, b.not_finite, c.not_finite, d.not_finite) == (0, 1, 0, 1)


def test_energy_outside_that_is_not_finite_drops_the_record() -> None:
    rows = torch.ones(3, 2)
    outside = torch.tensor([0.0, math.nan, math.inf])
    a = scatter_sums([Rows(rows, None, outside)], 1, norm=9.0)
    b = scatter_sums([Rows(rows[:1], None, outside[:1])], 1, norm=9.0)
    assert torch.equal(a.sums, b.sums)
    assert a.not_finite == 2


def test_sums_do_not_depend_on_the_batches_or_the_order() -> None:
    torch.manual_seed(0)
    rows, labels = torch.randn(9000, 7) * 3, torch.randint(0, 4, (9000,))
    energy = rows[:, 0].square()
    whole = class_sums([Rows(rows, labels)], 4, norm=5.0, count_weight=1.0)
    scatter = scatter_sums([Rows(rows, labels, energy)], 4, norm=5.0)
    order = torch.randperm(9000)
    pieces = [order[i : i + 1234] for i in range(0, 9000, 1234)]
    assert torch.equal(
        whole.sums, class_sums([Rows(rows[p], labels[p]) for p in pieces], 4, norm=5.0, count_weight=1.0).sums
    )
    assert torch.equal(
        scatter.sums, scatter_sums([Rows(rows[p], labels[p], energy[p]) for p in pieces], 4, norm=5.0).sums
    )


# --------------------------------------------------------------------------------------------------------- noise


def test_noise_has_the_size_of_the_sensitivity_on_and_off_the_diagonal() -> None:
    size, z = 60, 1.7
    total = scatter_sums([Rows(torch.zeros(0, size), torch.zeros(0), torch.zeros(0))], 3, norm=2.0)
    noise, energy = matrices(released(total, z, KEY, 0), size)
    diagonal = noise.diagonal(dim1=1, dim2=2).flatten()
    i, j = torch.triu_indices(size, size, 1)
    off = noise[:, i, j].flatten()
    assert len(off) == 5310
    assert float(diagonal.std()) == pytest.approx(z * 4, rel=0.2)  # 180 of them: 5 % is one standard error
    assert float(off.std()) == pytest.approx(z * 4 / math.sqrt(2), rel=0.05)  # 1 %
    assert abs(float(off.mean())) < 4 * z * 4 / math.sqrt(2 * 5310)
    assert torch.equal(noise, noise.mT)
    expected = total.noise_std(z)
    assert expected.tolist()[:2] == pytest.approx([z * 4, z * 4 / math.sqrt(2)])
    assert float(expected[-1]) == pytest.approx(z * 4)
    assert len(set(energy.tolist())) == 3


def test_noise_of_counts_is_in_units_of_their_weight() -> None:
    z, weight = 2.0, 0.5
    total = class_sums([Rows(torch.zeros(0, 3), torch.zeros(0))], 4000, norm=1.2, count_weight=weight)
    out = released(total, z, KEY, 0)
    delta = math.hypot(1.2, weight)
    assert float(out[:, :3].std()) == pytest.approx(z * delta, rel=0.05)
    assert float(out[:, 3].std()) == pytest.approx(z * delta / weight, rel=0.08)
    assert torch.equal(out[:, 3], out[:, 3].round())  # numbers of records stay whole


def test_noise_is_the_same_for_the_same_step_and_fresh_for_another() -> None:
    total = class_sums([Rows(torch.zeros(0, 50))], 1, norm=1.0)
    first = released(total, 1.0, KEY, 0)
    assert torch.equal(first, released(total, 1.0, KEY, 0))
    assert not torch.equal(first, released(total, 1.0, KEY, 1))
    assert not torch.equal(first, released(total, 1.0, Randomness.from_insecure_seed(1), 0))
    assert not np.array_equal(KEY.words("moments", 0, 4), KEY.words("noise", 0, 4))  # DP-SGD's own steps


def test_what_is_released_betrays_no_low_digits_of_the_sum() -> None:
    """It lies on the grid, and the noise that is added is itself on the grid and the same for every sum."""
    torch.manual_seed(0)
    a, b = (class_sums([Rows(torch.randn(20, 300) / 9)], 1, norm=1.0) for _ in range(2))
    out_a, out_b = (released(t, 0.5, KEY, 5) for t in (a, b))
    assert torch.equal(out_a / a.grid, (out_a / a.grid).round())
    assert torch.equal(out_a - a.values, out_b - b.values)
    # Noise must be finer than the grid.  In fp32, as DP-SGD has it, samples above 1/2 would be multiples of 32 steps.
    steps = ((out_a - a.values) / a.grid).long()
    large = steps[steps.abs() > 2**28]
    assert len(large) > 100
    assert float((large % 2).double().mean()) == pytest.approx(0.5, abs=0.2)


def test_no_noise_is_no_noise() -> None:
    total = class_sums([Rows(torch.ones(3, 2) / 4)], 1, norm=1.0)
    assert released(total, 0.0, KEY, 0).tolist() == [[0.75, 0.75]]


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: class_sums([Rows(torch.ones(1, 2))], 1, norm=0.0), "norm"),
        (lambda: class_sums([Rows(torch.ones(1, 2))], 1, norm=math.nan), "norm"),
        (lambda: class_sums([Rows(torch.ones(1, 2))], 1, norm=1.0, count_weight=-1.0), "count_weight"),
        (lambda: class_sums([], 1, norm=1.0), "no batch"),
        (lambda: class_sums([Rows(torch.ones(1, 2))], 2, norm=1.0), "no labels"),
        (lambda: class_sums([Rows(torch.ones(1, 2), torch.tensor([2]))], 2, norm=1.0), "labels"),
        (lambda: scatter_sums([Rows(torch.ones(2, 2), torch.tensor([-1, 0]))], 2, norm=1.0), "labels"),
        (lambda: scatter_sums([Rows(torch.ones(1, 2))], 0, norm=1.0), "at least 1"),
        (lambda: scatter_sums([], 1, norm=1.0), "no batch"),
        (
            lambda: scatter_sums([Rows(torch.ones(1, 2)), Rows(torch.ones(1, 2), None, torch.ones(1))], 1, norm=1.0),
            "outside",
        ),
        (lambda: released(class_sums([Rows(torch.ones(1, 2))], 1, norm=1.0), -1.0, KEY, 0), "noise_multiplier"),
        (lambda: released(class_sums([Rows(torch.ones(1, 2))], 1, norm=1.0), 1e15, KEY, 0), "smaller"),
        (lambda: matrices(torch.zeros(1, 5), 2), "triangle"),
    ],
)
def test_wrong_arguments_are_refused(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_too_many_records_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.privacy.moments._MOST_RECORDS", 3)
    with pytest.raises(ValueError, match="at most 3"):
        class_sums([Rows(torch.ones(4, 2))], 1, norm=1.0)
    with pytest.raises(ValueError, match="at most 3"):
        scatter_sums([Rows(torch.ones(2, 2)), Rows(torch.ones(2, 2))], 1, norm=1.0)
