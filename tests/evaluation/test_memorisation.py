"""The memorisation check finds what was copied, and nothing where nothing was."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from dpsyngen.errors import ConfigError, DataError
from dpsyngen.evaluation import neighbours as exchange
from dpsyngen.evaluation.cas import clopper_pearson as interval
from dpsyngen.evaluation.memorisation import LEVEL, memorisation_check
from dpsyngen.evaluation.neighbours import Neighbours, nearest, share
from dpsyngen.report.html import memorisation_rows


@pytest.fixture(autouse=True)
def _fewer_permutations(monkeypatch) -> None:
    monkeypatch.setattr(exchange, "_PERMUTATIONS", 4_999)


def blobs(rng: np.random.Generator, n: int) -> np.ndarray:
    """n images of one distribution: a bright spot at a random place, of random size and brightness, on some noise."""
    y, x = np.mgrid[:8, :8]
    cy, cx = rng.uniform(1, 6, (2, n, 1, 1))
    width, height = rng.uniform(1, 3, (n, 1, 1)), rng.uniform(80, 200, (n, 1, 1))
    spot = height * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / width**2)
    return (spot + rng.uniform(0, 30, (n, 8, 8))).clip(0, 255).astype(np.uint8)[:, None]


def near(indices: list[int], squared: list[float]) -> Neighbours:
    return Neighbours(np.array(indices), np.array(squared, float))


def test_copies_are_flagged() -> None:
    rng = np.random.default_rng(0)
    private, held_out = blobs(rng, 400), blobs(rng, 100)
    found = memorisation_check(private[rng.integers(0, 400, 200)], private, held_out)
    assert found.flagged
    assert found.duplicates == 200
    assert found.duplicates_held_out == 0
    space = found.spaces["pixels"]
    assert space.everything.share == space.nearest_few.share == 1
    assert space.everything.p_permutation < LEVEL / 2
    assert space.closer == 1
    assert "equal a training image" in found.conclusion


def test_noisy_copies_of_some_images_are_flagged() -> None:
    """One generated image in ten repeats a training image, none of them exactly."""
    rng = np.random.default_rng(1)
    private, held_out = blobs(rng, 500), blobs(rng, 500)
    generated = blobs(rng, 400)
    copies = private[rng.choice(500, 40, replace=False)].astype(int) + rng.integers(-2, 3, (40, 1, 8, 8))
    generated[:40] = copies.clip(0, 255)
    found = memorisation_check(generated, private, held_out)
    assert found.flagged
    assert found.duplicates == 0
    assert found.spaces["pixels"].nearest_few.share > 0.9
    assert found.spaces["pixels"].closer > 0.05
    assert set(found.most_suspicious(20)) <= set(range(40))


@pytest.mark.parametrize("control", [60, 200])
def test_fresh_images_and_held_out_copies_are_not_flagged(control) -> None:
    """False alarms are as rare as stated, whatever the sizes of the sets."""
    alarms = copies = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        private, held_out = blobs(rng, 200), blobs(rng, control)
        alarms += bool(memorisation_check(blobs(rng, 300), private, held_out, seed=seed).flagged)
        if seed < 5:
            copies += bool(memorisation_check(held_out, private, held_out, seed=seed).flagged)
    assert copies == 0
    # P(more than 3 of 40 at a rate of 1 %) < 0.001.
    assert alarms <= 3


def test_p_values_are_uniform_where_one_image_is_the_nearest_of_many() -> None:
    """With 20 real images in a set, 300 generated ones are no 300 draws, as a binomial test would take them for."""
    permutation = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        made, private, held_out = blobs(rng, 300), blobs(rng, 20), blobs(rng, 20)
        found = share(nearest(made, private), nearest(made, held_out), 20, 20, rng)
        permutation.append(found.p_permutation)
    # P(more than 12 of 100 at a rate of 5 %) < 0.001.
    assert sum(p < 0.05 for p in permutation) <= 12
    assert sum(p < 0.5 for p in permutation) >= 30


def test_the_permutation_test_is_that_of_all_divisions() -> None:
    """Against the enumeration of all ways to divide six real images into three and three."""
    private, held_out = near([0, 0, 0, 1, 2], [1, 1, 1, 1, 5]), near([0, 1, 2, 0, 2], [2, 2, 2, 2, 5])
    found = share(private, held_out, 3, 3, np.random.default_rng(0))
    # Three generated images have private image 0 as their nearest, one has 1, one is tied between 2 and 2.
    weights = [3, 1, 0.5, 0, 0, 0.5]
    sums = [sum(weights[i] for i in chosen) for chosen in itertools.combinations(range(6), 3)]
    exact = np.mean([s >= 4.5 for s in sums])
    assert (found.nearer_private, found.nearer_held_out, found.ties) == (4, 0, 1)
    assert found.share == 0.9
    assert found.p_permutation == pytest.approx(exact, abs=0.03)


def test_shares_intervals_and_ties() -> None:
    low, high = interval(0, 10)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 10))
    same = near([0, 1], [1, 1])
    tied = share(same, same, 2, 2, np.random.default_rng(0))
    assert (tied.ties, tied.share, tied.low) == (2, 0.5, 0.0)
    assert tied.p_permutation == 1
    private, held_out = near([0] * 10, [1] * 10), near([0] * 10, [2] * 10)
    # Ten generated images, but one training image: no evidence beyond one draw.
    found = share(private, held_out, 30, 10, np.random.default_rng(0))
    assert found.expected == 0.75
    assert found.p_permutation == pytest.approx(0.75, abs=0.03)


def test_sets_of_equal_size_and_seed() -> None:
    rng = np.random.default_rng(2)
    private, held_out, generated = blobs(rng, 300), blobs(rng, 40), blobs(rng, 100)
    one, two, other = (memorisation_check(generated, private, held_out, seed=s).to_dict() for s in (0, 0, 1))
    assert one == two
    assert one["spaces"]["pixels"]["size"] == 40
    assert one["spaces"]["pixels"]["everything"]["expected"] == pytest.approx(300 / 340)
    assert one["spaces"]["pixels"]["median_private"] != other["spaces"]["pixels"]["median_private"]
    few = memorisation_check(generated, held_out, private).spaces["pixels"]
    assert few.size == 40
    json.dumps(one)


def test_neighbours_are_rows_of_the_arrays_given() -> None:
    rng = np.random.default_rng(3)
    private, held_out = blobs(rng, 50), blobs(rng, 30)
    found = memorisation_check(np.concatenate([private[[7]], held_out[[9]]]), private, held_out)
    assert found.to_private[0] == 7
    assert found.to_held_out[1] == 9
    assert found.distances[0][0] == found.distances[1][1] == 0
    # Root mean square of pixels in [0, 1].
    other = private[found.to_private[1]].astype(float) - held_out[9]
    assert found.distances[0][1] == pytest.approx(np.sqrt(np.mean((other / 255) ** 2)))


@pytest.mark.parametrize("controlled", [False, True])
def test_real_images_that_are_copies_of_each_other_allow_no_conclusion(controlled: bool) -> None:
    rng = np.random.default_rng(3)
    black, others = np.zeros((60, 1, 8, 8), np.uint8), blobs(rng, 40)
    held_out = np.concatenate([black[:30], others]) if controlled else None
    found = memorisation_check(blobs(rng, 50), black, held_out)
    assert found.flagged is None or controlled
    assert (found.spaces["pixels"].closer is None) == (found.spaces["pixels"].threshold == 0)
    assert found.spaces["pixels"].copies == (30 / 70 if controlled else 1)
    assert ("most real images are copies" in found.conclusion) == (not controlled)
    rows = {row.name: row for row in memorisation_rows(json.loads(json.dumps(found.to_dict())))}
    row = rows["closer than real images are, pixels"]
    assert row.value == "–"
    assert "NOT MEASURED" in row.note
    with pytest.raises(DataError, match="no control"):
        memorisation_check(black, black, black)


def test_a_few_real_images_allow_little() -> None:
    rng = np.random.default_rng(4)
    found = memorisation_check(blobs(rng, 50), blobs(rng, 4), blobs(rng, 3))
    assert found.flagged is None
    assert "no test could tell" in found.conclusion
    found = memorisation_check(blobs(rng, 50), blobs(rng, 12), blobs(rng, 90))
    assert found.flagged or "only 12 images in the smaller set" in found.conclusion


def test_as_many_images_as_people_have_allow_a_conclusion() -> None:
    """Of 1,300 images there are more divisions than the largest float."""
    rng = np.random.default_rng(6)
    found = memorisation_check(blobs(rng, 300), blobs(rng, 900), blobs(rng, 400))
    assert found.flagged is False
    assert found.conclusion.startswith("No sign")


def test_without_held_out_images_nothing_is_concluded() -> None:
    rng = np.random.default_rng(4)
    private = blobs(rng, 100)
    found = memorisation_check(blobs(rng, 50), private)
    assert found.flagged is None
    assert "Nothing can be concluded" in found.conclusion
    assert found.spaces["pixels"].ratio is None
    assert found.spaces["pixels"].threshold > 0
    assert found.to_held_out is None
    # Exact copies speak for themselves.
    assert memorisation_check(private[:5], private).flagged


def test_held_out_images_that_were_trained_on() -> None:
    rng = np.random.default_rng(5)
    private, held_out, generated = blobs(rng, 100), blobs(rng, 100), blobs(rng, 50)
    with pytest.raises(DataError, match="no control"):
        memorisation_check(generated, private, private[:50])
    held_out[:10] = private[:10]
    found = memorisation_check(private[:10], private, held_out)
    assert found.held_out_in_training == 10
    assert found.spaces["pixels"].everything.ties == 10
    assert not found.flagged


def test_features_by_name() -> None:
    rng = np.random.default_rng(7)
    private, held_out = blobs(rng, 80), blobs(rng, 80)
    found = memorisation_check(private[:40], private, held_out, features=("pixels-pca", "pixels"))
    assert list(found.spaces) == ["pixels-pca", "pixels"]
    assert found.spaces["pixels-pca"].features["name"] == "pixels-pca"
    assert found.spaces["pixels-pca"].everything.share == 1
    with pytest.raises(ConfigError, match="pixels, pixels-pca, efficientnet-lite0, inception"):
        memorisation_check(private, private, features=("vibes",))
    with pytest.raises(ConfigError, match="features is"):
        memorisation_check(private, private, features=())


def test_images_that_do_not_fit_are_refused() -> None:
    images = blobs(np.random.default_rng(8), 10)
    with pytest.raises(ConfigError, match="same size"):
        memorisation_check(images, images[:, :, :7])
    with pytest.raises(ConfigError, match="same size"):
        memorisation_check(images, images, images.repeat(3, 1))
    with pytest.raises(ConfigError, match="at least 2"):
        memorisation_check(images, images[:1])
    with pytest.raises(ConfigError, match="the number of generated images is 0"):
        memorisation_check(images[:0], images)
