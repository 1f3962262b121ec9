"""The runs of an experiment: each combination once, with the settings that it should have."""

from __future__ import annotations

import math

import pytest

from dpsyngen.errors import ConfigError
from dpsyngen.experiments.spec import jobs_of, parse_spec

SMALL = {"name": "x", "data": {"train": "digits", "test": "digits:test"}, "references": []}


def jobs(**grid):
    extra = {k: grid.pop(k) for k in ("settings", "noise", "references", "evaluation", "cost") if k in grid}
    return jobs_of(parse_spec({**SMALL, **extra, "grid": grid}))


def test_every_combination_is_a_run_with_its_settings() -> None:
    found = jobs(variant=["dpdm", "both"], epsilon=[1, "inf"], seeds=[0, 7], settings={"private": {"steps": 33}})
    assert len(found) == len({j.name for j in found}) == 8
    for job in found:
        assert job.config is not None
        assert job.config.stages.variant == job.variant
        assert job.config.privacy.epsilon == job.epsilon
        assert job.config.network.seed == job.config.program.seed == job.seed
        assert job.config.private.steps == 33
        assert job.config.privacy.insecure_seed is None
        assert job.config.data.source == "digits"


def test_seeds_come_round_by_round_so_that_a_cut_experiment_has_all_variants() -> None:
    assert [j.seed for j in jobs(variant=["dpdm", "both"], epsilon=[1], seeds=[4, 2])] == [4, 4, 2, 2]


def test_settings_that_a_variant_does_not_look_at_make_no_second_run() -> None:
    found = jobs(epsilon=[1], seeds=1, axes={"stages.tau_coarse": [1, 2], "stages.tau_cleaning": [-3, -2]})
    count = {v: sum(j.variant == v for j in found) for v in ("dpdm", "finetune", "cleaning", "coarse", "both")}
    assert count == {"dpdm": 1, "finetune": 1, "cleaning": 2, "coarse": 2, "both": 4}
    assert len({repr(j.config) for j in found}) == len(found)
    assert next(j for j in found if j.variant == "dpdm").settings == {}
    assert {j.label for j in found if j.variant == "cleaning"} == {"tau_cleaning=-3", "tau_cleaning=-2"}


def test_programs_matter_to_dpdm_only_where_it_begins_on_them() -> None:
    axes = {"program.name": ["dead-leaves", "spectrum"]}
    assert len(jobs(variant=["dpdm"], epsilon=[1], seeds=1, axes=axes)) == 1
    assert len(jobs(variant=["dpdm"], epsilon=[1], seeds=1, axes=axes, settings={"stages": {"pretrain": True}})) == 2


def test_cases_name_combinations() -> None:
    cases = [{"label": ""}, {"label": "long", "settings": {"private.steps": 900, "private.learning_rate": 0.001}}]
    plain, long = jobs(variant=["both"], epsilon=[1], seeds=1, cases=cases)
    assert (plain.name, long.name) == ("both-eps1-seed0", "both-eps1-long-seed0")
    assert long.config.private.steps == 900
    assert long.settings == {"private.steps": 900, "private.learning_rate": 0.001}


def test_a_case_can_be_of_some_variants_alone() -> None:
    case = {"label": "matched", "settings": {"stages.pretrain": "matched"}, "variants": ["cleaning"]}
    cases = [{"label": ""}, case]
    found = jobs(variant=["dpdm", "cleaning"], epsilon=[1], seeds=1, cases=cases)
    assert [j.name for j in found] == ["dpdm-eps1-seed0", "cleaning-eps1-seed0", "cleaning-eps1-matched-seed0"]
    assert found[-1].config.stages.pretrain == "matched"
    with pytest.raises(ConfigError, match="cases name variants that the grid has not: both"):
        jobs(variant=["dpdm"], cases=[{"label": ""}, case | {"variants": ["both"]}])


def test_program_parameters_can_be_an_axis() -> None:
    found = jobs(variant=["both"], epsilon=[1], seeds=1, axes={"program.params.shape": ["circle", "mixed"]})
    assert [j.config.program.params["shape"] for j in found] == ["circle", "mixed"]


def test_seeded_noise_differs_between_runs_of_one_seed_and_is_the_same_each_time() -> None:
    first, again = (jobs(variant=["dpdm", "both"], epsilon=[1, 3], seeds=1, noise="seeded") for _ in range(2))
    seeds = [j.config.privacy.insecure_seed for j in first]
    assert None not in seeds
    assert len(set(seeds)) == 4
    assert seeds == [j.config.privacy.insecure_seed for j in again]


def test_references_are_made_once_for_what_they_depend_on() -> None:
    found = jobs(epsilon=[1, "inf"], seeds=2, references=["real", "dp-classifier", "programs"])
    kinds = [(j.kind, j.epsilon, j.seed) for j in found if j.kind != "run"]
    assert sorted(kinds) == sorted(
        [
            ("real", math.inf, 0),
            ("real", math.inf, 1),
            ("dp-classifier", 1.0, 0),
            ("dp-classifier", 1.0, 1),
        ]
    )


def test_classifier_references_go_with_classifiers() -> None:
    found = jobs(references=["real", "dp-classifier"], evaluation={"classifiers": []})
    assert {j.kind for j in found} == {"run"}


def test_a_run_that_cannot_be_is_named() -> None:
    with pytest.raises(ConfigError, match=r"both-eps1-tau_cleaning=3-seed0.*below tau_coarse"):
        jobs(variant=["both"], epsilon=[1], seeds=1, axes={"stages.tau_cleaning": [3]})


def test_drawing_that_cannot_be_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="churn needs"):
        jobs_of(parse_spec({**SMALL, "sampling": {"sampler": "ddim", "churn": 5}}))


def test_a_huge_grid_is_refused_before_it_is_built() -> None:
    with pytest.raises(ConfigError, match="at most"):
        jobs(seeds=10_000)
