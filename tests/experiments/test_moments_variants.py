"""Experiments with variants that take DP moments: their runs, what they cost, and how long they would take."""

from __future__ import annotations

import json

import pytest

from dpsyngen.diffusion.stages import USE_MOMENTS, VARIANTS
from dpsyngen.experiments import cost as module
from dpsyngen.experiments import pool
from dpsyngen.experiments.cost import StepTimes, estimate, measure, privacy_cost
from dpsyngen.experiments.experiment import Experiment
from dpsyngen.experiments.measures import VARIANT_NAMES
from dpsyngen.experiments.spec import jobs_of, load_spec, parse_spec
from dpsyngen.privacy.accounting import epsilon
from dpsyngen.report.comparison import STYLES, write_comparison
from dpsyngen.training.plan import Shape, make_plan

pytestmark = pytest.mark.slow

SHAPE = Shape(8, 1, ("a", "b", "c"), 60)
BARE = {"name": "x", "data": {"train": "digits", "test": "digits:test"}, "references": []}


def jobs(axes: dict, variants: list[str]):
    grid = {"variant": variants, "epsilon": [1], "seeds": 1, "axes": axes}
    return jobs_of(parse_spec({**BARE, "grid": grid}))


@pytest.mark.parametrize(
    ("setting", "values", "twice"),
    [
        ("stages.tau_cleaning", [-3, -2], {"residual"}),
        ("stages.tau_coarse", [1, 2], {"instant", "residual"}),
        ("stages.networks", ["experts", "shared"], set()),
        ("stages.pretrain", [False, True], set()),
        ("public.batch", [8, 16], set()),
        ("program.name", ["dead-leaves", "spectrum"], set()),
        ("moments.share", [0.3, 0.6], {"residual"}),
        ("moments.rank", [10, 20], set(USE_MOMENTS)),
        ("private.batch", [100, 200], {"residual"}),
        ("network.size", ["nano", "tiny"], {"residual"}),
    ],
)
def test_a_setting_makes_a_second_run_of_the_variants_that_look_at_it(setting, values, twice) -> None:
    found = jobs({setting: values}, list(USE_MOMENTS))
    assert {v: sum(j.variant == v for j in found) for v in USE_MOMENTS} == {v: 1 + (v in twice) for v in USE_MOMENTS}
    assert len({repr(j.config) for j in found}) == len(found)


def test_all_runs_together_cost_their_moments_and_their_steps(tiny_spec) -> None:
    grid = {"variant": ["dpdm", "gaussian", "residual"], "epsilon": [3], "seeds": 1}
    spec = load_spec(tiny_spec(grid=grid, noise="system"))
    runs = jobs_of(spec)
    cost = privacy_cost(spec, runs, SHAPE)
    mechanisms = [m for job in runs for m in make_plan(job.config, SHAPE).mechanisms]
    assert len(mechanisms) == 1 + 3 + 4
    assert cost.total_epsilon == pytest.approx(epsilon(mechanisms, cost.delta))
    assert (cost.runs, cost.without_noise) == (3, 0)


def test_what_runs_without_steps_and_runs_with_moments_take(tiny_spec, monkeypatch) -> None:
    def measured(config, shape, device) -> StepTimes:
        return StepTimes(0.5, 2.0, 0.25, moments=0.0 if config.stages.variant == "dpdm" else 0.5)

    monkeypatch.setattr(module, "measure", measured)
    moments, steps = 60 * 0.5, 6 * 12 * 2 * 2.0

    def of(variant: str):
        spec = load_spec(tiny_spec(grid={"variant": [variant], "epsilon": [3], "seeds": 2}))
        return estimate(spec, jobs_of(spec), SHAPE)

    gaussian = of("gaussian")
    assert (gaussian["private"], gaussian["public"]) == (2 * moments, 0)
    assert gaussian["sampling"] == 2 * 12 * 0.25  # a step an image, whatever the sampler was set to
    residual = of("residual")
    assert residual["private"] == 2 * (moments + steps)
    assert residual["public"] == 0
    assert residual["sampling"] == 2 * 12 * 2 * 0.25
    assert of("dpdm")["private"] == 2 * steps


WITHOUT_PRIOR = tuple(v for v in USE_MOMENTS if v != "instant")


@pytest.mark.parametrize("variant", WITHOUT_PRIOR)
def test_measuring_takes_the_steps_that_such_a_run_has(variant, tiny_spec) -> None:
    job = jobs_of(load_spec(tiny_spec(grid={"variant": [variant], "epsilon": [3], "seeds": 1})))[0]
    found = measure(job.config, SHAPE)
    assert (found.private > 0) is (variant != "gaussian")
    assert found.public == 0
    assert found.sampling > 0
    assert found.moments > 0


def test_an_instant_run_is_measured_as_moments_and_the_drawing_of_a_network(tiny_spec) -> None:
    job = jobs_of(load_spec(tiny_spec(grid={"variant": ["instant"], "epsilon": [3], "seeds": 1})))[0]
    found = measure(job.config, SHAPE)
    assert found.private == found.public == 0
    assert found.sampling > 0
    assert found.moments > 0


def test_an_experiment_with_all_of_them(tiny_spec, tmp_path) -> None:
    spec = tiny_spec(
        grid={"variant": ["cleaning", *WITHOUT_PRIOR], "epsilon": [3], "seeds": 1},
        evaluation={"features": ["pixels-pca"], "metrics": ["frechet"], "classifiers": []},
    )
    experiment = Experiment.open_or_create(tmp_path / "x", load_spec(spec))
    assert pool.work(experiment)
    assert {s.state for s in experiment.statuses().values()} == {"done"}, experiment.statuses()
    facts = {}
    for job in experiment.jobs:
        facts[job.variant] = json.loads(experiment.result_path(job).read_text())["facts"]
    # Each of the three queries uses each image.
    assert facts["gaussian"]["private_images_seen"] == 3 * 60
    assert facts["residual"]["private_images_seen"] == 3 * 60 + 72
    assert facts["cleaning"]["private_images_seen"] == 72
    assert not {"steps", "batch", "parameters", "noise_multiplier"} & facts["gaussian"].keys()
    assert facts["residual"]["noise_multiplier"] > facts["cleaning"]["noise_multiplier"]
    assert facts["residual"]["parameters"] > facts["cleaning"]["parameters"]
    # Moments are work on private images, and the cleaning network is trained once for both.
    for variant in WITHOUT_PRIOR:
        assert facts[variant]["seconds_private"] > 0
    assert facts["gaussian"]["seconds_public"] == facts["residual"]["seconds_public"] == 0
    assert len(list((tmp_path / "x" / "public").iterdir())) == 1
    page = write_comparison(tmp_path / "x").read_text()
    for variant in WITHOUT_PRIOR:
        assert VARIANT_NAMES[variant] in page


def test_each_variant_has_a_name_and_looks_of_its_own() -> None:
    assert set(VARIANT_NAMES) == set(STYLES) == set(VARIANTS)
    for part in range(3):
        assert len({str(style[part]) for style in STYLES.values()}) == len(VARIANTS)
