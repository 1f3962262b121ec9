"""The figures of a set of images, and what is written beside each."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError
from dpsyngen.evaluation import FeatureSpec, evaluate_images, frechet_distance, make_extractor
from dpsyngen.evaluation.distances import KernelDistance
from dpsyngen.evaluation.metrics import METRICS, NAMES
from dpsyngen.evaluation.neighbours import Manifold

PCA = "pixels-pca"


@pytest.fixture(scope="module")
def train():
    return load_images("digits")


@pytest.fixture(scope="module")
def test():
    return load_images("digits:test")


def noise(n: int = 300) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)


def test_every_figure_carries_its_bounds_and_protocol(train, test) -> None:
    made = train.images[:300]
    options = {"reference": train, "test": test, "programs": noise(400), "classifiers": ("logreg",)}
    bad = evaluate_images(noise(), np.arange(300) % 10, features=[FeatureSpec(PCA)], **options)
    good = evaluate_images(made, train.labels[:300], features=[FeatureSpec(PCA)], **options)
    json.dumps([good, bad], allow_nan=False)
    assert set(good) == {"private", "features", "cas", "cas_chosen", "protocol"}
    assert "private" in good["private"]
    figure = good["features"][PCA]
    assert figure["config"]["dimensions"] == 64
    assert (figure["generated_images"], figure["real_images"]) == (300, len(train))
    assert (figure["floor_images"], figure["ceiling_images"]) == (300, 300)  # as many as were generated
    assert figure["subset_seed"] == 0
    assert figure["enough_images"]
    assert figure["interval"]["level"] == 0.95
    assert figure["interval"]["replicates"] == 200
    assert tuple(figure["metrics"]) == NAMES
    for name, m in figure["metrics"].items():
        worse = bad["features"][PCA]["metrics"][name]
        sign = {"lower": 1, "higher": -1}[m["better"]]
        assert m["better"] == METRICS[name].better
        assert m["unit"]
        assert m["protocol"]
        assert sign * m["value"] < sign * worse["value"], name  # real images are better than noise
        assert sign * m["floor"] < sign * m["ceiling"], name  # and so is the floor than the ceiling
        if m["low"] is not None:
            assert m["low"] <= m["value"] <= m["high"], name
            assert m["low"] < m["high"], name
    # Images that were not seen: about the floor.  Images of the program, drawn again: about the ceiling.
    for name in ("frechet", "sliced-wasserstein", "precision", "coverage"):
        m = bad["features"][PCA]["metrics"][name]
        assert abs(m["value"] - m["ceiling"]) < 0.2 * abs(m["floor"] - m["ceiling"]) + 1e-9, name
    assert good["cas"]["logreg"]["accuracy"] > 0.8 > 0.4 > bad["cas"]["logreg"]["accuracy"]
    assert good["protocol"]["generated_images"] == 300
    assert good["protocol"]["real_train_images"] == len(train)
    assert good["protocol"]["seed"] == 0


def test_values_and_bounds_are_those_of_the_parts(train, test) -> None:
    made, drawn = 255 - train.images[:400], noise(400)
    figure = evaluate_images(made, None, reference=train, test=test, programs=drawn)["features"][PCA]
    held_out = min(len(made), len(test))
    extractor = make_extractor(PCA)
    extractor.fit(train.images)
    real, of_made, of_drawn = (extractor(x) for x in (train.images, made, drawn))
    m = figure["metrics"]
    assert m["frechet"]["value"] == pytest.approx(frechet_distance(of_made, real), rel=1e-9)
    assert m["frechet"]["ceiling"] == pytest.approx(frechet_distance(of_drawn, real), rel=1e-9)
    assert m["kid"]["value"] == pytest.approx(KernelDistance(real, seed=0)(of_made).value)
    manifold = Manifold(real)
    for name in ("precision", "recall", "density", "coverage"):
        assert m[name]["value"] == manifold(of_made)[name].value
        assert m[name]["ceiling"] == manifold(of_drawn)[name].value
    assert figure["floor_images"] == held_out
    if held_out == len(test):
        assert m["frechet"]["floor"] == pytest.approx(frechet_distance(extractor(test.images), real), rel=1e-9)
    # The training images themselves are at no distance; that is memorisation, and lies below the floor.
    copied = evaluate_images(train.images, None, reference=train, test=test, bootstrap=0)["features"][PCA]
    assert copied["metrics"]["frechet"]["value"] < 1e-6 < copied["metrics"]["frechet"]["floor"]


def test_only_what_was_asked_for(train) -> None:
    out = evaluate_images(
        train.images[:60], None, reference=train, test=None, metrics=("kid", "precision"), bootstrap=0
    )["features"][PCA]
    assert set(out["metrics"]) == {"kid", "precision"}
    assert out["floor_images"] is out["ceiling_images"] is out["interval"] is None
    assert all(m[key] is None for m in out["metrics"].values() for key in ("low", "high", "floor", "ceiling"))
    nothing = evaluate_images(train.images[:60], None, reference=train, test=None, metrics=())
    assert nothing["features"] == {}


def test_subsets_are_counted_seeded_and_too_few_images_are_marked(train, test) -> None:
    made = train.images[:200]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the mark stands on the figure; it is not said twice
        out = evaluate_images(made, None, reference=train, test=test, max_images=50)
    figure = out["features"][PCA]
    assert (figure["generated_images"], figure["real_images"], figure["floor_images"]) == (50, 50, 50)
    assert figure["config"]["dimensions"] == 49  # 50 reference images span no more
    assert figure["enough_images"]
    assert "50 images" in figure["metrics"]["kid"]["protocol"]
    few = evaluate_images(made[:30], None, reference=train, test=None)["features"][PCA]
    assert not few["enough_images"]
    assert "fewer images than dimensions" in few["metrics"]["frechet"]["protocol"]
    assert out == evaluate_images(made, None, reference=train, test=test, max_images=50)
    other = evaluate_images(made, None, reference=train, test=test, max_images=50, seed=1)
    assert other["features"][PCA]["subset_seed"] == 1
    assert other["features"][PCA]["metrics"] != figure["metrics"]


def test_few_floor_images_are_marked_too(train, test) -> None:
    part = type(test)(test.images[:40], test.labels[:40], test.class_names, test.source)
    figure = evaluate_images(train.images[:200], None, reference=train, test=part, metrics=("frechet",))["features"][
        PCA
    ]
    assert figure["floor_images"] == 40
    assert not figure["enough_images"]


def test_tiny_sets_still_have_figures(train, test) -> None:
    out = evaluate_images(train.images[:3], None, reference=train, test=test, bootstrap=50)
    json.dumps(out, allow_nan=False)
    assert out["features"][PCA]["metrics"]["recall"]["protocol"] == "k = 2"


def test_what_cannot_be_measured_is_refused(train, test) -> None:
    made = train.images[:60]
    for options, message in (
        ({"max_images": 1}, "max_images is 1"),
        ({"features": ("vibes",)}, "pixels-pca, efficientnet-lite0, inception"),
        ({"metrics": ("fid",)}, "metrics are 'fid', but must be among frechet, kid"),
        ({"bootstrap": -1}, "bootstrap is -1"),
        ({"bootstrap": 39}, "at least 40"),
        ({"programs": noise()[:, :, :4, :4]}, "images drawn by programs are"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate_images(made, None, reference=train, test=test, **options)
    with pytest.raises(ConfigError, match="1 generated image"):
        evaluate_images(made[:1], None, reference=train, test=None)
    with pytest.raises(ConfigError, match="generated images are"):
        evaluate_images(made[:, :, :4, :4], None, reference=train, test=None)
    with pytest.raises(ConfigError, match="test images are"):
        evaluate_images(made, None, reference=train, test=load_images("digits:test", resolution=16))


def test_figures_are_strict_json_where_a_class_has_no_test_image(train, test) -> None:
    kept = test.labels != 9
    part = type(test)(test.images[kept], test.labels[kept], test.class_names, test.source)
    out = evaluate_images(train.images, train.labels, reference=train, test=part, features=(), classifiers=("logreg",))
    json.dumps(out, allow_nan=False)
    assert out["cas"]["logreg"]["per_class_accuracy"][9] is None


def test_no_test_images_or_no_labels_no_accuracy(train, test) -> None:
    unlabelled = type(test)(test.images, None, (), test.source)
    for options in (
        {"labels": train.labels, "test": None},
        {"labels": None, "test": test},
        {"labels": train.labels, "test": unlabelled},
        {"labels": train.labels, "test": test, "classifiers": ()},
    ):
        out = evaluate_images(train.images, reference=train, features=(), **options)
        assert out["cas"] == {}
        assert "cas_chosen" not in out
        assert "cas" not in out["protocol"]


def test_several_features_and_what_is_being_done(train, test) -> None:
    lines: list[str] = []
    out = evaluate_images(
        train.images[:40],
        train.labels[:40],
        reference=train,
        test=test,
        features=(PCA, "efficientnet-lite0"),
        metrics=("precision",),
        classifiers=("logreg", "mlp"),
        max_images=12,
        seed=5,
        on_progress=lines.append,
    )
    assert set(out["features"]) == {PCA, "efficientnet-lite0"}
    assert out["features"]["efficientnet-lite0"]["config"]["dimensions"] == 1280
    assert not out["features"]["efficientnet-lite0"]["enough_images"]
    assert all(f["subset_seed"] == 5 for f in out["features"].values())
    assert out["cas_chosen"] in out["cas"]
    assert [line for line in lines if line.startswith("features pixels-pca: 12 generated, 12 real")]
    assert [line for line in lines if line.startswith("comparing 12 generated images, floor with 12")]
