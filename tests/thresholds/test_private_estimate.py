"""One estimate, charged once: the order of things, what a crash leaves, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import dpsyngen.thresholds.private as private_gap
from dpsyngen.config import load_config
from dpsyngen.data import ImageDataset
from dpsyngen.errors import BudgetExceeded, ConfigError, LedgerError, RunError
from dpsyngen.privacy.accounting import epsilon
from dpsyngen.privacy.budget import Budget
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.thresholds.private import PrivateEstimate
from dpsyngen.training.networks import make_denoiser
from dpsyngen.training.plan import Shape

LEVELS = (-3.0, 0.0, 3.0)


def dataset(seed: int = 0, n: int = 30) -> ImageDataset:
    values = np.random.default_rng(seed).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    return ImageDataset(values, None, (), "test")


def network(seed: int):
    return make_denoiser(load_config({"network": {"size": "nano"}}), Shape(8, 1, (), 1), False, seed).eval()


@pytest.fixture
def budget(tmp_path) -> Budget:
    return Budget.create(tmp_path / "budget", epsilon_limit=3.0, delta=1e-3)


def planned(folder, budget: Budget | None, data: ImageDataset | None = None, rate: float = 1.0, **privacy: object):
    settings = {"epsilon": 1.0, "delta": 1e-3, "budget": None if budget is None else str(budget.path), **privacy}
    return PrivateEstimate(folder, load_config({"privacy": settings}), data or dataset(), rate)


def released(estimate: PrivateEstimate, clip: float = 2.0, seed: int = 2, levels=LEVELS):
    estimate.private.parent.mkdir(exist_ok=True)
    return estimate.released({"a": network(1), "b": network(seed)}, levels, clip, "a name")[0]


def run(folder, *given, **privacy: object):
    return released(planned(folder, *given, **privacy))


def test_it_is_charged_before_it_is_computed_and_budget_and_ledger_agree(tmp_path, budget, monkeypatch) -> None:
    seen = []
    real = private_gap.noisy_mean

    def spy(*arguments, **options):
        seen.append((Ledger(tmp_path / "o/private/ledger.jsonl").mechanisms, Budget(budget.path).mechanisms()))
        return real(*arguments, **options)

    monkeypatch.setattr(private_gap, "noisy_mean", spy)
    p = planned(tmp_path / "o", budget)
    released(p)
    ((charged, reserved),) = seen
    assert charged == reserved == (p.query.mechanism(),)
    ledger = Ledger(tmp_path / "o/private/ledger.jsonl")
    assert ledger.entries[0].kind == "dp"
    assert ledger.entries[0].details["l2_sensitivity"] == 2.0
    assert ledger.secure
    assert ledger.epsilon() == pytest.approx(1.0, rel=2e-3)
    assert ledger.epsilon() <= 1.0
    assert Budget(budget.path).epsilon() == ledger.epsilon()
    assert (tmp_path / "o/private").stat().st_mode & 0o777 == 0o700
    for name in ("ledger.jsonl", "randomness.json", "data.json"):
        assert (tmp_path / "o/private" / name).stat().st_mode & 0o777 == 0o600
    stated = json.loads((tmp_path / "o/private_gap.json").read_text())
    assert stated["private"] is True
    assert stated["epsilon"] == ledger.epsilon()
    assert (stated["records"], stated["clipping_norm"], stated["delta"]) == (30, 2.0, 1e-3)


def test_result_is_read_and_nothing_is_computed_or_charged_again(tmp_path, budget, monkeypatch) -> None:
    first = run(tmp_path / "o", budget)
    monkeypatch.setattr(private_gap.PrivateGap, "summed", lambda *a, **k: pytest.fail("looked again"))
    second = run(tmp_path / "o", budget)
    np.testing.assert_array_equal(first.gap, second.gap)
    assert len(Ledger(tmp_path / "o/private/ledger.jsonl").mechanisms) == 1
    assert len(Budget(budget.path).charges) == 1


@pytest.mark.parametrize("point", ["Ledger.charge", "PrivateGap.summed", "PrivateGap.released", "write_json"])
def test_killed_anywhere_it_goes_on_with_the_same_noise_and_one_charge(tmp_path, budget, monkeypatch, point) -> None:
    import dpsyngen.thresholds.private as module

    with monkeypatch.context() as patch:
        if point == "write_json":
            real = module.write_json

            def fails(path, *more):
                if path.name == "private_gap.json":
                    raise KeyboardInterrupt
                real(path, *more)

            patch.setattr(module, "write_json", fails)
        else:
            owner, name = point.split(".")

            def stops(*a, **k):
                raise KeyboardInterrupt

            patch.setattr(getattr(module, owner), name, stops)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "o", budget)
    key = (tmp_path / "o/private/randomness.json").read_bytes()
    # Even where the public clipping norm would come out otherwise now: what was pinned holds.
    resumed = released(planned(tmp_path / "o", budget), clip=7.0)
    assert (tmp_path / "o/private/randomness.json").read_bytes() == key
    assert len(Ledger(tmp_path / "o/private/ledger.jsonl").mechanisms) == 1
    assert len(Budget(budget.path).charges) == 1
    (tmp_path / "o/private_gap.json").unlink()
    np.testing.assert_allclose(run(tmp_path / "o", budget).gap, resumed.gap, rtol=1e-5, atol=1e-9)
    assert len(Ledger(tmp_path / "o/private/ledger.jsonl").mechanisms) == 1


def test_other_images_networks_or_levels_would_get_the_same_noise_and_are_refused(tmp_path, budget) -> None:
    run(tmp_path / "o", budget)
    with pytest.raises(RunError, match="the same noise to different data"):
        run(tmp_path / "o", None, dataset(1), insecure_seed=1)
    with pytest.raises(RunError, match=r"changed.*networks.*the same noise to different sums"):
        released(planned(tmp_path / "o", budget), seed=3)
    with pytest.raises(RunError, match=r"changed.*log_sigma.*the same noise to different sums"):
        released(planned(tmp_path / "o", budget), levels=(-3.0, 0.5, 3.0))


@pytest.mark.parametrize(
    ("lost", "error", "message"),
    [
        ("randomness.json", RunError, "would get fresh noise"),
        ("ledger.jsonl", RunError, "ledger.jsonl is missing"),
        ("data.json", RunError, "data.json is missing"),
    ],
)
def test_a_lost_file_is_refused(tmp_path, budget, lost, error, message) -> None:
    run(tmp_path / "o", budget)
    (tmp_path / "o/private" / lost).unlink()
    with pytest.raises(error, match=message):
        run(tmp_path / "o", budget)


def test_an_edited_ledger_a_foreign_key_and_a_damaged_result_are_refused(tmp_path, budget) -> None:
    run(tmp_path / "o", budget)
    private = tmp_path / "o/private"
    result = tmp_path / "o/private_gap.json"
    for damaged in ("{}", json.dumps(json.loads(result.read_text()) | {"gap": [0.1]}), "[]"):
        result.write_text(damaged)
        with pytest.raises(RunError, match="Remove it and start the same command again"):
            run(tmp_path / "o", budget)
    key = (private / "randomness.json").read_text()
    run(tmp_path / "x", None, insecure_seed=5)
    (private / "randomness.json").write_text((tmp_path / "x/private/randomness.json").read_text())
    with pytest.raises(RunError, match="not the random state"):
        run(tmp_path / "o", budget)
    (private / "randomness.json").write_text(key)
    (private / "data.json").write_text("{}")
    with pytest.raises(RunError, match="cannot be read"):
        run(tmp_path / "o", budget)
    ledger = private / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("gap of", "gaP of"))
    with pytest.raises(LedgerError):
        run(tmp_path / "o", budget)


def test_a_budget_that_is_too_small_is_refused_before_anything(tmp_path) -> None:
    small = Budget.create(tmp_path / "b", epsilon_limit=0.5, delta=1e-3)
    with pytest.raises(BudgetExceeded):
        planned(tmp_path / "o", small)
    assert not Budget(small.path).charges
    # Another run took what was left in the meantime.
    budget = Budget.create(tmp_path / "c", epsilon_limit=1.5, delta=1e-3)
    late = planned(tmp_path / "o", budget)
    run(tmp_path / "first", budget)
    with pytest.raises(BudgetExceeded):
        released(late)
    assert len(Budget(budget.path).charges) == 1
    assert not Ledger(tmp_path / "o/private/ledger.jsonl").mechanisms
    assert not (tmp_path / "o/private_gap.json").exists()


def test_budget_of_other_images_is_refused(budget, tmp_path) -> None:
    run(tmp_path / "o", budget)
    with pytest.raises(ConfigError, match="of other images"):
        planned(tmp_path / "p", budget, dataset(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": math.inf, "budget": None}, "belong to --proxy"),
        ({"budget": None}, "--budget is missing"),
        ({"delta": 0.1}, "below 1/records"),
        ({"rate": 0.0}, "--sampling-rate is 0"),
        ({"rate": 1.5}, "--sampling-rate is 1.5"),
        ({"epsilon": 1e-9}, "Use a larger ε"),
    ],
)
def test_what_is_refused_before_anything_is_written(tmp_path, budget, options, message) -> None:
    settings = {"epsilon": 1.0, "delta": 1e-3, "budget": str(budget.path)} | options
    rate = settings.pop("rate", 1.0)
    with pytest.raises(ConfigError, match=message):
        PrivateEstimate(tmp_path / "o", load_config({"privacy": settings}), dataset(), rate)
    assert not (tmp_path / "o").exists()


def test_noise_is_for_epsilon_delta_and_group(tmp_path, budget) -> None:
    p = planned(tmp_path, budget, group_size=3)
    assert 0.99 < epsilon([p.query.mechanism()], 1e-3, group_size=3) <= 1.0
    assert p.query.noise_multiplier == pytest.approx(3 * planned(tmp_path, budget).query.noise_multiplier, rel=2e-3)


def test_reproducible_noise_is_stamped(tmp_path) -> None:
    curves = [run(tmp_path / name, None, insecure_seed=3) for name in "ab"]
    np.testing.assert_array_equal(curves[0].gap, curves[1].gap)
    assert json.loads((tmp_path / "a/private_gap.json").read_text())["private"] is False
    assert not Ledger(tmp_path / "a/private/ledger.jsonl").secure
    budgets = [Budget.create(tmp_path / f"b{name}", epsilon_limit=2, delta=1e-3) for name in "cd"]
    secret = [run(tmp_path / f"s-{b.path.name}", b) for b in budgets]
    assert not np.array_equal(secret[0].gap, secret[1].gap)
