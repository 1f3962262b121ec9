"""The ResNets of the classification accuracy score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.cas import DEFAULT, NAMES, classification_accuracy, default_epochs
from dpsyngen.evaluation.classifiers import (
    make_resnet,
    make_wideresnet,
    one_cycle,
    shift_for,
    shifted,
    train_network,
)


def score(train, test, *, labels=None, rows=slice(None), name="resnet", **options):
    return classification_accuracy(
        train.images[rows],
        (train.labels if labels is None else labels)[rows],
        test.images,
        test.labels,
        num_classes=10,
        classifiers=(name,),
        **options,
    )[name]


@pytest.fixture(scope="module")
def digits():
    return load_images("digits"), load_images("digits:test")


@pytest.mark.slow
def test_it_learns_digits_and_nothing_from_shuffled_labels(digits) -> None:
    result = score(*digits, epochs=6)
    assert result.accuracy > 0.9
    assert 1 <= result.chosen_epoch <= result.epochs == 6
    shuffled = np.random.default_rng(0).permutation(digits[0].labels)
    assert score(*digits, labels=shuffled, epochs=2).accuracy < 0.3


def test_same_seed_same_score_whatever_the_global_random_state(digits) -> None:
    rows = slice(0, 300)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = score(*digits, rows=rows, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert score(*digits, rows=rows, epochs=1) == a
    assert score(*digits, rows=rows, epochs=1, seed=1) != a


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 17, 17), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_it_takes_every_size(shape) -> None:
    network = make_resnet(shape, 7)
    assert network.eval()(torch.zeros(2, *shape)).shape == (2, 7)
    assert 100_000 < sum(p.numel() for p in network.parameters()) < 300_000
    # The first convolution leaves 4 to 16 positions a side.
    assert network[0](torch.zeros(1, *shape)).shape[-1] <= 16
    with pytest.raises(ConfigError, match="must be 4 pixels at least"):
        make_resnet((1, 3, 3), 7)


@pytest.mark.parametrize(("images", "batch_size"), [(2, 8), (3, 1), (3, 8), (9, 8), (17, 8)])
def test_no_batch_of_one_image_whatever_is_left_over(images, batch_size) -> None:
    """Statistics of one image at one position do not exist: PyTorch would raise."""
    network = make_resnet((1, 4, 4), 3)
    candidates = train_network(
        network,
        np.zeros((images, 1, 4, 4), np.uint8),
        np.arange(images) % 3,
        augmented=True,
        epochs=2,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(0),
        device="cpu",
    )
    assert [c.epoch for c in candidates] == [1, 2]


def test_the_wideresnet_has_the_published_size() -> None:
    network = make_wideresnet((3, 32, 32), 10)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(8.9e6, rel=0.01)
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ConfigError, match="must be 4 pixels at least for the classifier wideresnet"):
        make_wideresnet((1, 3, 3), 7)


def test_an_average_of_the_weights_classifies(digits, monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.evaluation.classifiers._AVERAGE", 0.9)
    images, labels = digits[0].images[:40], digits[0].labels[:40]
    torch.manual_seed(0)
    network = make_resnet((1, 8, 8), 10)
    seen, averages = [], []
    # An epoch is one step here.
    options = {"augmented": True, "averaged": True, "batch_size": 64, "device": "cpu"}
    generator = torch.Generator().manual_seed(0)
    for candidate in train_network(network, images, labels, epochs=4, generator=generator, **options):
        seen.append(network[0].weight.detach().clone())
        averages.append(candidate.model[0].weight.detach().clone())
    expected = seen[0]
    assert torch.equal(averages[0], expected)
    for weights, average in zip(seen[1:], averages[1:], strict=True):
        expected = 0.9 * expected + 0.1 * weights
        torch.testing.assert_close(average, expected)
    assert not torch.allclose(averages[-1], seen[-1], atol=1e-4)
    # With a small network in its place it learns digits, statistics of the normalisation included.
    monkeypatch.setattr("dpsyngen.evaluation.classifiers.make_wideresnet", make_resnet)
    assert score(*digits, name="wideresnet", epochs=6).accuracy > 0.9


def test_shifted_images_are_the_images_moved_with_their_border_repeated() -> None:
    images = torch.arange(2 * 3 * 5 * 6, dtype=torch.int16).view(2, 3, 5, 6)
    seen = set()
    for seed in range(40):
        moved = shifted(images, 1, torch.Generator().manual_seed(seed))
        for before, after in zip(images, moved, strict=True):
            padded = torch.nn.functional.pad(before[None].float(), (1, 1, 1, 1), mode="replicate")[0]
            fits = [(y, x) for y in range(3) for x in range(3) if torch.equal(padded[:, y : y + 5, x : x + 6], after)]
            assert len(fits) == 1
            seen.add(fits[0])
    assert len(seen) == 9
    assert shifted(images, 0, torch.Generator()) is images
    assert [shift_for((s, s)) for s in (8, 28, 32, 64)] == [0, 1, 1, 2]


def test_a_shift_of_each_image_is_its_own() -> None:
    images = torch.arange(36).view(1, 1, 6, 6).expand(64, 1, 6, 6)
    assert len({tuple(i.flatten().tolist()) for i in shifted(images, 1, torch.Generator().manual_seed(0))}) > 4


def test_names_and_epochs() -> None:
    assert (*DEFAULT, "resnet", "wideresnet") == NAMES
    assert default_epochs("cnn", 4500) == 44
    assert default_epochs("resnet", 4500) == 22
    assert default_epochs("resnet", 100) == 30
    assert default_epochs("wideresnet", 100) == 50
    assert default_epochs("mlp", 54_000) == default_epochs("resnet", 54_000) == 5


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_learning_rate_goes_up_once_and_down_once(steps) -> None:
    rates = [one_cycle(s, steps) for s in range(1, steps + 1)]
    top = rates.index(1.0)
    assert all(0 < r <= 1 for r in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert steps < 100 or (top == 19 and rates[-1] < 0.001)
