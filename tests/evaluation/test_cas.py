"""Classification accuracy score: right, repeatable, and chosen without the real test images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError
from dpsyngen.evaluation import ClassifierResult, best_by_validation, classification_accuracy
from dpsyngen.evaluation.cas import split_generated
from dpsyngen.evaluation.classifiers import make_cnn, make_mlp


@pytest.fixture(scope="module")
def digits():
    return load_images("digits"), load_images("digits:test")


def score(train, test, *, labels=None, test_labels=None, classifiers=("logreg", "cnn"), epochs=12, **options):
    return classification_accuracy(
        train.images,
        train.labels if labels is None else labels,
        test.images,
        test.labels if test_labels is None else test_labels,
        num_classes=10,
        classifiers=classifiers,
        epochs=epochs,
        **options,
    )


def test_real_images_score_high_and_shuffled_labels_at_chance(digits) -> None:
    train, test = digits
    good = score(train, test, classifiers=("logreg", "mlp", "cnn"))
    assert all(r.accuracy > 0.9 for r in good.values())
    assert good["cnn"].n_train + good["cnn"].n_validation == len(train)
    assert good["cnn"].n_test == len(test)
    weights = np.bincount(test.labels) / len(test)
    assert weights @ np.array(good["cnn"].per_class_accuracy) == pytest.approx(good["cnn"].accuracy)
    bad = score(train, test, labels=np.random.default_rng(0).permutation(train.labels), classifiers=("logreg",))
    assert bad["logreg"].accuracy < 0.3
    json.dumps(good["cnn"].to_dict())
    assert 1 <= good["cnn"].chosen_epoch <= good["cnn"].epochs == 12
    assert good["cnn"].chosen == f"epoch {good['cnn'].chosen_epoch}"
    assert good["logreg"].chosen_epoch is good["logreg"].epochs is None
    assert best_by_validation(good) in good


def test_test_labels_have_no_say_in_the_choice(digits) -> None:
    train, test = digits
    honest = score(train, test, epochs=5)
    lying = score(train, test, epochs=5, test_labels=np.random.default_rng(1).permutation(test.labels))
    for name in honest:
        assert honest[name].chosen == lying[name].chosen
        assert honest[name].chosen_epoch == lying[name].chosen_epoch
        assert honest[name].validation_accuracy == lying[name].validation_accuracy
        assert lying[name].accuracy < honest[name].accuracy
    assert best_by_validation(honest) == best_by_validation(lying)


def test_same_seed_same_score_whatever_the_global_random_state(digits) -> None:
    train, test = digits
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = score(train, test, classifiers=("cnn",), epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b = score(train, test, classifiers=("cnn",), epochs=2)
    c = score(train, test, classifiers=("cnn",), epochs=2, seed=1)
    assert a == b
    assert a != c


def test_split_is_stratified_and_disjoint() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    train, validation = split_generated(labels, 0.1, 0)
    assert np.bincount(labels[validation]).tolist() == [10, 5, 1]
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 160


def test_class_that_was_never_generated_is_no_crash(digits) -> None:
    train, test = digits
    kept = train.labels != 3
    with pytest.warns(UserWarning, match="class 3"):
        results = classification_accuracy(
            train.images[kept], train.labels[kept], test.images, test.labels, num_classes=10, epochs=2
        )
    assert all(r.missing_classes == (3,) for r in results.values())
    assert all(r.per_class_accuracy[3] == 0 for r in results.values())


def test_bad_input(digits) -> None:
    train, test = digits
    with pytest.raises(ConfigError, match="logreg, mlp, cnn"):
        score(train, test, classifiers=("oracle",))
    with pytest.raises(ConfigError, match="logreg, mlp, cnn"):
        score(train, test, classifiers=())
    with pytest.raises(ConfigError, match="same size"):
        classification_accuracy(train.images, train.labels, test.images[:, :, :4], test.labels, num_classes=10)
    with pytest.raises(ConfigError, match="must be 0 to 4"):
        classification_accuracy(train.images, train.labels, test.images, test.labels, num_classes=5)
    with pytest.raises(ConfigError, match="one for each"):
        classification_accuracy(train.images, train.labels[:5], test.images, test.labels, num_classes=10)
    with pytest.raises(ConfigError, match="too few"):
        classification_accuracy(train.images[:3], train.labels[:3], test.images, test.labels, num_classes=10)
    with pytest.raises(ConfigError, match="all 40 generated images are of class 0"):
        classification_accuracy(train.images[:40], np.zeros(40, int), test.images, test.labels, num_classes=10)
    with pytest.raises(ConfigError, match="uint8"):
        classification_accuracy(train.images / 255, train.labels, test.images, test.labels, num_classes=10)
    with pytest.raises(ConfigError, match="must be integers"):
        score(train, test, labels=train.labels / 1)
    with pytest.raises(ConfigError, match="at least 1"):
        score(train, test, epochs=0)
    with pytest.raises(ConfigError, match="no classifier"):
        best_by_validation({})


@pytest.mark.parametrize(
    "shape", [(1, 4, 4), (1, 8, 8), (3, 17, 17), (3, 22, 22), (1, 28, 28), (3, 32, 32), (3, 64, 64)]
)
def test_networks_take_every_size(shape) -> None:
    for make in (make_mlp, make_cnn):
        assert make(shape, 7).eval()(torch.zeros(2, *shape)).shape == (2, 7)
    with pytest.raises(ConfigError, match="must be 4 pixels at least"):
        make_cnn((1, 3, 3), 7)


def test_cnn_is_dpdms_at_28_pixels() -> None:
    shapes = [tuple(p.shape) for p in make_cnn((1, 28, 28), 10).parameters() if p.ndim > 1]
    assert shapes == [(32, 1, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (128, 1152), (10, 128)]


def test_the_choice_goes_by_held_out_images() -> None:
    def result(accuracy: float, validation: float) -> ClassifierResult:
        return ClassifierResult(accuracy, validation, "", [], 1, 1, 1)

    assert best_by_validation({"a": result(0.9, 0.5), "b": result(0.1, 0.6)}) == "b"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_scoring_on_a_gpu_leaves_its_random_state_alone(digits) -> None:
    before = torch.cuda.get_rng_state()
    score(*digits, classifiers=("cnn",), epochs=1, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_networks_learn_nothing_from_shuffled_labels(digits) -> None:
    train, test = digits
    shuffled = np.random.default_rng(0).permutation(train.labels)
    results = score(train, test, labels=shuffled, classifiers=("mlp", "cnn"), epochs=4)
    # Chance is 0.1; 359 test images leave a standard deviation of 0.016.
    assert all(r.accuracy < 0.25 for r in results.values())
    assert all(r.validation_accuracy < 0.3 for r in results.values())


def test_a_score_depends_neither_on_the_other_classifiers_nor_on_global_state(digits) -> None:
    train, test = digits
    np.random.seed(3)  # noqa: NPY002 - the global state is what this test is about
    alone = score(train, test, classifiers=("cnn",), epochs=2)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    torch.manual_seed(99)
    assert score(train, test, classifiers=("mlp", "cnn"), epochs=2)["cnn"] == alone["cnn"]


def test_the_chosen_epoch_is_the_one_that_was_scored(digits) -> None:
    """The kept candidate is a copy: training on after it changes nothing."""
    train, test = digits
    long = score(train, test, classifiers=("mlp",), epochs=8)["mlp"]
    again = score(train, test, classifiers=("mlp",), epochs=long.chosen_epoch)["mlp"]
    assert again.chosen_epoch == long.chosen_epoch
    assert again.accuracy == long.accuracy
    assert again.validation_accuracy == long.validation_accuracy


def test_order_of_test_images_changes_nothing(digits) -> None:
    train, test = digits
    order = np.random.default_rng(0).permutation(len(test))
    a = score(train, test, classifiers=("logreg",))["logreg"]
    b = classification_accuracy(
        train.images, train.labels, test.images[order], test.labels[order], num_classes=10, classifiers=("logreg",)
    )["logreg"]
    assert a == b


def test_inputs_are_left_as_they_are(digits) -> None:
    train, test = digits
    images, labels = train.images.copy(), train.labels.astype(np.uint8)
    images.flags.writeable = labels.flags.writeable = False
    results = classification_accuracy(
        images,
        labels,
        test.images,
        test.labels.astype(np.int32),
        num_classes=10,
        classifiers=("logreg", "mlp"),
        epochs=1,
    )
    assert set(results) == {"logreg", "mlp"}
    assert np.array_equal(images, train.images)


def test_split_is_the_same_for_a_seed_and_another_for_another() -> None:
    labels = np.arange(200) % 4
    a, b, c = (split_generated(labels, 0.1, s)[1] for s in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_progress_names_each_classifier(digits) -> None:
    lines: list[str] = []
    score(*digits, classifiers=("logreg", "mlp"), epochs=1, on_progress=lines.append)
    assert len(lines) == 2
    assert "logreg" in lines[0]
    assert "mlp" in lines[1]
