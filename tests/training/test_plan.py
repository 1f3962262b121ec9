"""Plans: what a run would spend on DP moments and on DP-SGD, and settings that do not go together."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dpsyngen.config import Config, load_config, with_batch
from dpsyngen.errors import ConfigError
from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.training.plan import Plan, Shape, make_plan
from tests.training.short_runs import merged

LABELLED = Shape(8, 1, ("a", "b", "c"), 3000)
UNLABELLED = Shape(8, 1, (), 3000)


@pytest.fixture
def configured(tiny_settings):
    def make(variant: str, target: float = 3.0, **sections: dict[str, Any]) -> Config:
        given = {"stages": {"variant": variant}, "privacy": {"epsilon": target}} | sections
        return load_config(merged(tiny_settings, **given))

    return make


def spent(plan: Plan, mechanisms: tuple[Mechanism, ...], group_size: int = 1) -> float:
    return epsilon(mechanisms, plan.delta, group_size=group_size)


@pytest.mark.parametrize(
    ("target", "share", "shape"), [(2.0, 0.3, LABELLED), (10.0, 0.8, LABELLED), (10.0, 0.5, UNLABELLED)]
)
def test_moments_cost_their_share_and_all_together_the_target(configured, target, share, shape) -> None:
    plan = make_plan(configured("residual", target, moments={"share": share}), shape)
    assert plan.moments is not None
    queries = plan.moments.mechanisms()
    assert len(queries) == (3 if shape.num_classes else 2)
    assert all(m.sampling_rate == 1 and m.count == 1 for m in queries)
    assert 0.99 * share * target < spent(plan, queries) <= share * target
    assert plan.mechanisms == (*queries, plan.mechanism.mechanism(6))
    assert 0.99 * target < spent(plan, plan.mechanisms) <= target
    # Any less noise would be too little.
    less = [Mechanism(m.sampling_rate, 0.99 * m.noise_multiplier, m.count) for m in plan.mechanisms]
    assert spent(plan, tuple(less)) > target


def test_moments_of_groups(configured) -> None:
    plan = make_plan(configured("gaussian", privacy={"epsilon": 8.0, "group_size": 4}), LABELLED)
    alone = make_plan(configured("gaussian", 8.0), LABELLED)
    assert plan.moments is not None
    assert alone.moments is not None
    assert 7.9 < spent(plan, plan.mechanisms, 4) <= 8.0
    assert plan.moments.mean > 3 * alone.moments.mean


def test_gaussian_spends_all_on_the_moments_whatever_their_share(configured) -> None:
    plans = [make_plan(configured("gaussian", moments={"share": s}), LABELLED) for s in (0.1, 0.9)]
    assert plans[0].moments == plans[1].moments is not None
    assert plans[0].steps == 0
    assert plans[0].mechanisms == plans[0].moments.mechanisms()
    assert 2.99 < spent(plans[0], plans[0].mechanisms) <= 3.0


@pytest.mark.parametrize("variant", ["dpdm", "both"])
def test_published_variants_take_no_moments(configured, variant) -> None:
    plan = make_plan(configured(variant), LABELLED)
    assert plan.moments is None
    assert plan.mechanisms == (plan.mechanism.mechanism(6),)
    assert 2.99 < spent(plan, plan.mechanisms) <= 3.0


@pytest.mark.parametrize("variant", ["residual", "gaussian"])
def test_without_privacy_no_query_has_noise(configured, variant) -> None:
    plan = make_plan(configured(variant, math.inf), LABELLED)
    assert all(m.noise_multiplier == 0 for m in plan.mechanisms)
    assert len(plan.mechanisms) == (4 if variant == "residual" else 3)


def test_too_little_for_the_moments_is_refused_with_what_to_do(configured) -> None:
    with pytest.raises(ConfigError, match=r"larger ε, or a larger moments.share"):
        make_plan(configured("residual", 0.01, moments={"share": 0.001}), LABELLED)
    # Noise beyond what whole numbers hold is refused here, and not when the ledger has it.
    with pytest.raises(ConfigError, match="noise multiplier would exceed"):
        make_plan(configured("gaussian", privacy={"epsilon": 0.001, "group_size": 1000, "delta": 1e-9}), LABELLED)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_share_is_between_none_and_all(configured, share) -> None:
    with pytest.raises(ConfigError, match=r"moments.share"):
        configured("residual", moments={"share": share})


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        ({"variant": "residual", "networks": "shared"}, "a network of its own for each stage"),
        ({"variant": "residual", "pretrain": True}, "cannot start from programmatic images"),
        ({"variant": "gaussian", "pretrain": True}, "no network that could be pre-trained"),
        ({"variant": "both", "tau_cleaning": 2.0, "tau_coarse": 1.0}, "must be below tau_coarse = 1.0"),
    ],
)
def test_stages_that_cannot_be(tiny_settings, stages, why) -> None:
    with pytest.raises(ConfigError, match=why):
        make_plan(load_config(merged(tiny_settings, stages=stages)), LABELLED)


def test_without_a_network_the_size_of_images_is_free(configured) -> None:
    odd = Shape(7, 3, (), 3000)
    assert make_plan(configured("gaussian"), odd).steps == 0
    with pytest.raises(ConfigError, match="resolution is 7"):
        make_plan(configured("residual"), odd)


@pytest.mark.parametrize("variant", ["gaussian", "instant"])
@pytest.mark.parametrize("tau", [{"tau_cleaning": 3.0}, {"tau_coarse": -4.0}])
def test_moments_alone_look_at_no_batch_and_no_cleaning_stage(configured, variant, tau) -> None:
    config = configured(
        variant,
        stages={"variant": variant} | tau,
        private={"batch": 10**6},
        network={"prior": "shipped", "size": "prior"},
    )
    assert make_plan(config, LABELLED).steps == 0


@pytest.mark.parametrize("variant", ["dpdm", "residual"])
def test_guidance_needs_a_network_that_learned_without_classes(configured, variant) -> None:
    given: dict[str, Any] = {"network": {"label_dropout": 0.0}, "sampling": {"guidance": 2.0}}
    with pytest.raises(ConfigError, match="label_dropout is 0"):
        make_plan(configured(variant, math.inf, **given), LABELLED)
    make_plan(configured(variant, math.inf, **given), UNLABELLED)
    for without in ("gaussian", "instant"):  # which have no network that knows classes
        make_plan(configured(without, math.inf, **given), LABELLED)
    make_plan(configured(variant, math.inf, **given | {"sampling": {"guidance": 1.0}}), LABELLED)


@pytest.mark.parametrize(
    ("records", "largest", "batch"), [(3000, 1024, 1000), (60_000, 1024, 1024), (60_000, 4096, 4096), (2, 1024, 1)]
)
def test_batch_where_none_is_given_is_a_third_of_the_records_up_to_a_limit(configured, records, largest, batch) -> None:
    config = configured("dpdm", math.inf, private={"batch": 0, "largest_batch": largest})
    found = with_batch(config, records)
    assert found.private.batch == batch
    assert found.model_copy(update={"private": config.private}) == config
    if records > 2:
        plan = make_plan(config, Shape(8, 1, (), records))
        assert plan.mechanism.sampling_rate == batch / records
    assert with_batch(configured("dpdm", private={"batch": 7}), records).private.batch == 7


def test_moments_that_no_memory_holds_are_refused_before_anything_is_spent(configured) -> None:
    many = Shape(256, 3, tuple(map(str, range(10_000))), 60_000)
    with pytest.raises(ConfigError, match=r"10,000 classes, 196,608 pixel values and rank 100 would take .* GiB"):
        make_plan(configured("gaussian"), many)
