"""Reference rows: classifiers on real images, and by DP-SGD with the guarantee that is printed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dpsyngen.data import load_images
from dpsyngen.errors import BudgetExceeded, ConfigError, DataError, LedgerError
from dpsyngen.evaluation import classification_accuracy
from dpsyngen.experiments import dp_classifier
from dpsyngen.experiments.dp_classifier import (
    DpSettings,
    Scattering,
    dp_classifier_reference,
    linear_classifier,
    real_reference,
    settings_by_rule,
    train_dp_classifier,
)
from dpsyngen.privacy.accounting import Mechanism, epsilon
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits():
    return load_images("digits"), load_images("digits:test")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changes) -> DpSettings:
    base = {"records": 100, "steps": 1, "batch": 100, "learning_rate": 1.0}
    return DpSettings(**(base | {"clipping_norm": 0.5, "noise_multiplier": 0.7, "ema": 0.0} | changes))


def weights_after(tmp_path, images, labels, s: DpSettings, *, target=math.inf, seed=3) -> torch.Tensor:
    """All weights of a classifier that starts at zero, as one vector."""
    features = Scattering((1, 8, 8))
    classifier = linear_classifier(features, 10)
    path = tmp_path / f"ledger-{len(list(tmp_path.iterdir()))}"
    ledger = Ledger.create(path, target_epsilon=target, delta=1e-3, records=s.records, secure=False)
    randomness = Randomness.from_insecure_seed(seed)
    train_dp_classifier(classifier, features.of(images), labels, s, ledger=ledger, randomness=randomness)
    return torch.cat([p.detach().flatten() for p in classifier.parameters()])


# ------------------------------------------------------------------------------------------------ the mechanism


def test_noise_is_z_times_c_over_the_expected_batch_where_there_is_no_signal(tmp_path) -> None:
    """The neighbour of a data set of one is the empty one: all that moves the weights is noise."""
    s = settings(batch=20)
    weights = weights_after(tmp_path, np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, np.int64), s)
    expected = s.noise_multiplier * s.clipping_norm / s.batch
    assert len(weights) > 3000
    assert float(weights.std()) == pytest.approx(expected, rel=0.05)
    assert abs(float(weights.mean())) < 5 * expected / math.sqrt(len(weights))


def test_one_record_moves_the_weights_by_the_clipping_norm_over_the_batch_at_most(tmp_path, digits) -> None:
    images, labels = digits[0].images[:100], digits[0].labels[:100]
    s = settings()  # all records in each step, so that the removed one is there
    whole = weights_after(tmp_path, images, labels, s)
    for removed in (99, 50):
        kept = np.arange(100) != removed
        moved = weights_after(tmp_path, images[kept], labels[kept], s) - whole
        bound = s.learning_rate * s.clipping_norm / s.batch
        # Gradients on normalised features are far longer than 0.5, so the bound is met.
        assert 0.99 * bound < float(moved.norm()) <= bound * (1 + 1e-3)


def test_batches_are_poisson_samples_divided_by_the_expected_batch(monkeypatch, digits, tmp_path) -> None:
    seen = []
    real = dp_classifier.noisy_mean

    def watched(clipped, **options):
        seen.append((clipped.examples, options["expected_examples"], options["step"], clipped.l2_sensitivity))
        return real(clipped, **options)

    monkeypatch.setattr(dp_classifier, "noisy_mean", watched)
    s = settings(records=1000, batch=100, steps=40)
    weights_after(tmp_path, digits[0].images[:1000], digits[0].labels[:1000], s)
    sizes = np.array([examples for examples, *_ in seen])
    assert [step for _, _, step, _ in seen] == list(range(40))
    assert {divisor for _, divisor, _, _ in seen} == {100}
    assert {bound for *_, bound in seen} == {0.5}
    # Binomial(1000, 0.1): mean 100, standard deviation 9.5; that of 40 of them is known to a ninth.
    assert sizes.mean() == pytest.approx(100, abs=6)
    assert 6 < sizes.std() < 13.5


def test_ledger_has_every_step_before_the_first_record_is_looked_at(monkeypatch, digits, tmp_path) -> None:
    path, charged = tmp_path / "ledger", []
    real = dp_classifier.poisson_sample

    def watched(*arguments):
        charged.append(sum(m.count for m in Ledger(path).mechanisms))
        return real(*arguments)

    monkeypatch.setattr(dp_classifier, "poisson_sample", watched)
    found = dp_classifier_reference(*digits, epsilon=2, delta=1e-4, steps=4, batch=50, seed=1, ledger=path)
    assert charged == [4] * 4
    ledger = Ledger(path)
    mechanism = Mechanism(50 / len(digits[0]), found["noise_multiplier"], 4)
    assert ledger.mechanisms == (mechanism,)
    assert not ledger.secure
    assert ledger.epsilon() == found["ledger_epsilon"] == epsilon([mechanism], 1e-4)
    assert 0.99 * 2 < found["ledger_epsilon"] <= 2
    with pytest.raises(LedgerError, match="already"):
        dp_classifier_reference(*digits, epsilon=2, delta=1e-4, steps=4, batch=50, seed=1, ledger=path)


def test_the_promise_is_for_as_many_images_of_a_person_as_that_of_the_runs(digits, tmp_path) -> None:
    path = tmp_path / "ledger"
    promise = {"epsilon": 2, "delta": 1e-4, "group_size": 4, "records": 1500}
    dp_classifier_reference(*digits, **promise, steps=4, batch=50, seed=1, ledger=path)
    ledger = Ledger(path)
    assert (ledger.group_size, ledger.records) == (4, 1500)
    assert ledger.mechanisms[0].sampling_rate == 50 / 1500
    assert 0.99 * 2 < epsilon(ledger.mechanisms, 1e-4, group_size=4) <= 2


def test_nothing_is_trained_beyond_the_target(monkeypatch, digits, tmp_path) -> None:
    def never(*_):
        raise AssertionError("a record was looked at")

    monkeypatch.setattr(dp_classifier, "poisson_sample", never)
    with pytest.raises(BudgetExceeded):
        weights_after(tmp_path, digits[0].images[:100], digits[0].labels[:100], settings(steps=50), target=0.5)


def test_the_classifier_does_not_mix_the_rows_of_a_batch(digits) -> None:
    features = Scattering((1, 8, 8))
    classifier = linear_classifier(features, 10)
    with torch.no_grad():  # away from zero, where all gradients are alike
        for i, p in enumerate(classifier.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    inputs = features.of(digits[0].images[:6]).float()
    labels = torch.from_numpy(digits[0].labels[:6])
    engine = PerExampleGradients(classifier, 1.0)
    engine.verify(
        lambda part: torch.nn.functional.cross_entropy(classifier(inputs[part]), labels[part], reduction="none"), 6
    )


# ------------------------------------------------------------------------------------------------ the reference


def test_it_learns_and_says_what_it_did(digits, tmp_path) -> None:
    found = dp_classifier_reference(*digits, epsilon=20, delta=1e-4, seed=0, ledger=tmp_path / "ledger")
    json.dumps(found, allow_nan=False)
    score = found["cas"]["dp-cnn"]
    assert score["accuracy"] > 0.75
    assert score["accuracy_low"] < score["accuracy"] < score["accuracy_high"]
    assert score["validation_accuracy"] is None
    assert score["n_validation"] == 0
    assert np.trace(np.array(score["confusion"])) / len(digits[1]) == pytest.approx(score["accuracy"])
    assert len(score["per_class_accuracy"]) == 10
    rule = settings_by_rule(len(digits[0]), 20)
    assert {k: found[k] for k in rule} == rule
    assert found["records"] == len(digits[0])


def test_same_seed_same_result_and_not_private(digits, tmp_path) -> None:
    few = [load_images((d.images[:200, 0], d.labels[:200])) for d in digits]

    def run(seed):
        options = {"epsilon": 5, "delta": 1e-4, "steps": 3, "batch": 100}
        options["ledger"] = tmp_path / f"ledger-{len(list(tmp_path.iterdir()))}"
        return dp_classifier_reference(*few, seed=seed, **options)

    a, torch_state = run(7), torch.get_rng_state()
    torch.manual_seed(5)
    assert run(7) == a
    torch.set_rng_state(torch_state)
    assert run(8)["cas"] != a["cas"]
    assert a["private"] is False
    first, second = run(None), run(None)
    assert first["private"] is True
    assert first["cas"] != second["cas"]


def test_test_images_have_no_say(digits, monkeypatch, tmp_path) -> None:
    """The same weights whatever they are."""
    made = []

    def watched(*arguments):
        made.append(linear_classifier(*arguments))
        return made[-1]

    monkeypatch.setattr(dp_classifier, "linear_classifier", watched)
    train, test = digits
    for images in (test, train):
        path = tmp_path / f"ledger-{len(made)}"
        dp_classifier_reference(train, images, epsilon=5, delta=1e-4, steps=2, seed=1, ledger=path)
    assert len(made) == 2
    assert all(p.any() for p in made[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in made), strict=True))


def test_rule_goes_by_records_and_epsilon_alone() -> None:
    assert settings_by_rule(60_000, 1)["steps"] == 400
    assert settings_by_rule(60_000, 0.2)["steps"] == 96
    assert settings_by_rule(1000, 1)["batch"] == 1000
    assert settings_by_rule(60_000, 10)["learning_rate"] > 20


def test_bad_input(digits, tmp_path) -> None:
    train, test = digits
    good = {"epsilon": 1, "delta": 1e-4, "seed": 0, "ledger": tmp_path / "ledger"}
    for changes, message in (
        ({"batch": 10**6}, "number of images"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"epsilon": math.inf}, "positive and finite"),
        ({"epsilon": 1e-9}, "below"),
        ({"delta": 1}, "δ 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            dp_classifier_reference(train, test, **(good | changes))
    bare = load_images((train.images[:, 0], None))
    with pytest.raises(ConfigError, match="needs classes"):
        dp_classifier_reference(bare, test, **good)
    with pytest.raises(ConfigError, match="needs classes"):
        real_reference(train, bare)
    other = load_images((test.images[:, 0], test.labels + 3))
    with pytest.raises(DataError, match="same classes"):
        real_reference(train, other)


# --------------------------------------------------------------------------------------------- real images


def test_real_reference_is_the_protocol_of_generated_images(digits) -> None:
    train, test = digits
    lines: list[str] = []
    found = real_reference(train, test, classifiers=("logreg",), seed=2, on_progress=lines.append)
    same = classification_accuracy(
        train.images, train.labels, test.images, test.labels, num_classes=10, classifiers=("logreg",), seed=2
    )
    assert found == {"logreg": same["logreg"].to_dict()}
    assert found["logreg"]["accuracy"] > 0.9
    json.dumps(found, allow_nan=False)
    assert "real images" in lines[0]
