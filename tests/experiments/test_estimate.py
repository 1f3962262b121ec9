"""Estimates are the arithmetic that they claim to be, on measured times; what the times are decides nothing here."""

from __future__ import annotations

import tempfile

import pytest

from dpsyngen.experiments import cost as module
from dpsyngen.experiments.cost import StepTimes, estimate, hours, measure
from dpsyngen.experiments.spec import jobs_of, load_spec
from dpsyngen.training.plan import Shape

SHAPE = Shape(8, 1, ("a", "b", "c"), 60)


@pytest.fixture
def known_times(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda config, shape, device: StepTimes(0.5, 2.0, 0.25))


def test_seconds_are_steps_times_images_times_what_was_measured(tiny_spec, known_times) -> None:
    spec = load_spec(tiny_spec(grid={"variant": ["dpdm"], "epsilon": [1, 3], "seeds": 2}))
    found = estimate(spec, jobs_of(spec), SHAPE)
    # Four runs of 6 steps of 12 images at K = 2; 12 images in 2 sampler steps.
    assert found == {"public": 0, "private": 4 * 6 * 12 * 2 * 2.0, "sampling": 4 * 12 * 2 * 0.25}


def test_a_public_network_that_runs_share_is_counted_once(tiny_spec, known_times) -> None:
    spec = load_spec(tiny_spec(grid={"variant": ["cleaning", "both"], "epsilon": [1, 3], "seeds": 1}))
    one = 3 * 4 * 1 * 0.5
    assert estimate(spec, jobs_of(spec), SHAPE)["public"] == 2 * one  # cleaning, and coarse for Both


def test_heun_looks_twice_at_all_steps_but_the_last(tiny_spec, known_times) -> None:
    grid = {"variant": ["dpdm"], "epsilon": [1], "seeds": 1}
    spec = load_spec(tiny_spec(grid=grid, sampling={"images": 10, "steps": 5, "sampler": "heun"}))
    assert estimate(spec, jobs_of(spec), SHAPE)["sampling"] == 10 * 9 * 0.25


def test_jobs_that_are_done_cost_nothing_more(tiny_spec, known_times) -> None:
    spec = load_spec(tiny_spec())
    assert sum(estimate(spec, (), SHAPE).values()) == 0


def test_measuring_takes_real_steps_and_leaves_nothing(tiny_spec, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    config = next(job.config for job in jobs_of(load_spec(tiny_spec())) if job.variant == "cleaning")
    found = measure(config, SHAPE)
    assert min(found.public, found.private, found.sampling) > 0
    assert not list((tmp_path / "temporary").glob("dpsyngen-*"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 seconds"), (600, "10 minutes"), (7200, "2.0 hours"), (3.6e7, "10,000.0 hours")]
)
def test_times_are_said_in_words(seconds, text) -> None:
    assert hours(seconds) == text
    assert hours(seconds, "core-").split()[1].startswith("core-")
