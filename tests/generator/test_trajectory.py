"""What a generator shows of its way from noise to image."""

from __future__ import annotations

import math

import numpy as np
import pytest

import dpsyngen
from dpsyngen import Generator
from dpsyngen.errors import ConfigError
from tests.conftest import TINY_SETTINGS, tiny_arrays


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Generator:
    out = tmp_path_factory.mktemp("trajectory") / "run"
    run = dpsyngen.train(tiny_arrays(), epsilon=4.0, out=out, settings=TINY_SETTINGS | {"stages": {"variant": "both"}})
    return Generator(run.release)


@pytest.mark.parametrize("options", [{}, {"sampler": "heun", "churn": 5.0}, {"sampler": "dpmpp", "guidance": 2.0}])
def test_it_leads_to_the_images_that_sampling_gives(generator, options) -> None:
    found = generator.trajectory(5, 6, seed=3, steps=12, **options)
    drawn = generator.sample(5, seed=3, steps=12, **options)
    np.testing.assert_array_equal(found.samples.images, drawn.images)
    np.testing.assert_array_equal(found.samples.labels, drawn.labels)
    assert found.samples.settings == drawn.settings
    assert found.noisy.shape == found.denoised.shape == (6, 5, 1, 8, 8)
    assert found.noisy.dtype == found.denoised.dtype == np.uint8
    # The first estimate is no noise; the last is nearly the image.
    assert found.denoised[0].std() < found.noisy[0].std() / 2
    distance = np.abs(found.denoised.astype(int) - drawn.images.astype(int)).mean((1, 2, 3, 4))
    assert distance[-1] < 2
    assert distance[-1] < distance[0]


def test_levels_and_their_owners(generator) -> None:
    found = generator.trajectory(2, 7, steps=40)
    assert found.sigmas[0] == pytest.approx(80)
    assert found.sigmas[-1] == pytest.approx(0.002)
    assert list(found.sigmas) == sorted(found.sigmas, reverse=True)
    for sigma, stage in zip(found.sigmas, found.stages, strict=True):
        assert stage.low <= math.log(sigma) <= stage.high
    assert list(dict.fromkeys(stage.name for stage in found.stages)) == ["coarse", "context", "cleaning"]


def test_noisy_images_are_dimmed_so_that_they_are_not_saturated(generator) -> None:
    noisy = generator.trajectory(8, 4, steps=20).noisy
    assert ((noisy == 0) | (noisy == 255)).mean() < 0.25  # about 8 % of a standard normal times √(1/3) are
    assert noisy[0].std() > 50


def test_labels_are_passed_on_and_checked(generator) -> None:
    labels = np.array([2, 2])
    np.testing.assert_array_equal(generator.trajectory(2, 3, labels=labels).samples.labels, labels)
    np.testing.assert_array_equal(generator.trajectory(2, 3, labels="2").samples.labels, labels)
    for bad in (
        {"labels": "cat", "count": 2},
        {"count": 0},
        {"count": 2, "labels": np.array([9, 9])},
        {"count": 2, "columns": 0},
    ):
        with pytest.raises(ConfigError):
            generator.trajectory(**bad)
