"""The figures of a set of images, and what is written beside each."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from dpsyngen.data import ImageDataset, load_images
from dpsyngen.errors import ConfigError
from dpsyngen.evaluation import FeatureSpec, evaluate_images, frechet_distance, make_extractor
from dpsyngen.evaluation.distances import KernelDistance
from dpsyngen.evaluation.metrics import METRICS, NAMES
from dpsyngen.evaluation.neighbours import Manifold
from dpsyngen.report.html import metric_rows

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
    assert set(good) == {"private", "notes", "features", "cas", "cas_chosen", "protocol"}
    assert good["notes"] == []
    assert all(m["flag"] is None for m in good["features"][PCA]["metrics"].values())
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
    assert figure["config"]["dimensions"] == 49  # 50 reference images span no more, and are not enough for 64
    assert not figure["enough_images"]
    assert "fewer different images than dimensions" in figure["metrics"]["frechet"]["flag"]
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


def figures(made, train, test=None, **options) -> tuple[dict, dict]:
    """The figures of pixels-pca by name, and everything, which JSON and tables can hold."""
    out = evaluate_images(made, None, reference=train, test=test, **{"bootstrap": 50, **options})
    json.dumps(out, allow_nan=False)
    rows = {row.name.partition(",")[0]: row for row in metric_rows(out)}
    for name, m in out["features"][PCA]["metrics"].items():
        row = rows[METRICS[name].title]
        # A figure that was refused or flagged is so in words, wherever it is shown.
        assert (row.value == "–") == (m["value"] is None) == row.note.startswith("NOT MEASURED")
        assert row.note.startswith("DOUBTFUL") == (m["value"] is not None and m["flag"] is not None)
    return out["features"][PCA]["metrics"], out


OF_NEIGHBOURS = ("precision", "recall", "density", "coverage")


def test_figures_of_a_few_generated_images_are_refused_or_flagged(train, test) -> None:
    found, out = figures(train.images[:5], train, test)
    assert out["notes"] == [
        "there are only 5 different generated images",
        "there are only 5 different real test images",
    ]
    for name, m in found.items():
        assert (m["value"] is None) == (name in OF_NEIGHBOURS)
        assert "5 different generated images" in m["flag"] or "5 generated images: the 5 neighbours" in m["flag"]
        assert m["value"] is not None or {m[k] for k in ("low", "high", "floor", "ceiling")} == {None}
    found, _ = figures(train.images[:11], train)
    assert all(m["value"] is not None and "only 11 different" in m["flag"] for m in found.values())


def test_figures_of_a_few_real_images_are_refused_or_flagged(train) -> None:
    few = train.subset(np.arange(5))
    found, out = figures(noise(), few, programs=train.images[:300])
    assert out["notes"] == ["there are only 5 different real training images"]
    assert all((m["value"] is None) == (name in OF_NEIGHBOURS) for name, m in found.items())
    assert "fewer different images than dimensions" in found["frechet"]["flag"]
    assert not out["features"][PCA]["enough_images"]  # four components of five images are no features of 8×8 pixels


@pytest.mark.parametrize("level", [0, 200])
def test_real_images_that_are_all_alike_allow_no_figure(train, level) -> None:
    images = np.full_like(train.images[:80], level)
    alike = ImageDataset(images, None, (), "alike")
    for made in (images, noise(80)):
        found, out = figures(made, alike, alike, programs=noise(80))
        assert "all 80 real training images are alike" in out["notes"]
        assert {m["value"] for m in found.values()} == {None}
        assert {m["flag"] for m in found.values()} == {"all 80 real training images are alike"}


def test_copies_among_real_images_make_no_balls(train) -> None:
    copies = train.subset(np.repeat(np.arange(60), 20))
    found, out = figures(train.images[:300], copies)
    assert out["notes"] == ["of 1,200 real training images only 60 are different"]
    assert all((m["value"] is None) == (name in OF_NEIGHBOURS) for name, m in found.items())
    assert "have 5 copies or more" in found["precision"]["flag"]


def test_generated_images_that_are_all_alike_are_bad_and_said_to_be(train) -> None:
    found, out = figures(np.repeat(train.images[:1], 60, 0), train)
    assert out["notes"] == ["all 60 generated images are alike"]
    assert found["precision"]["value"] == 1  # they are one real image: true, and flagged
    assert all("all 60 generated images are alike" in m["flag"] for m in found.values())


def test_bounds_of_degenerate_sets_are_left_out(train, test) -> None:
    alike = test.subset(np.zeros(100, int))
    found, out = figures(train.images[:100], train, alike, programs=noise(100))
    assert out["notes"][1:] == ["all 100 real test images are alike"]  # the first says which classes it lacks
    for m in found.values():
        assert m["value"] is not None
        assert m["floor"] is None
        assert m["ceiling"] is not None
    found, _ = figures(train.images[:100], train, test.subset(np.arange(8)))
    assert [name for name, m in found.items() if m["floor"] is None] == list(OF_NEIGHBOURS)
    found, _ = figures(train.images[:100], train, test.subset(np.arange(1)))
    assert all(m["floor"] is None and m["value"] is not None for m in found.values())


def test_accuracy_stands_beside_what_is_had_for_nothing(train, test) -> None:
    options = {"reference": train, "metrics": (), "classifiers": ("logreg",)}
    assert test.labels is not None
    one = test.subset(test.labels == 3)
    out = evaluate_images(train.images[:300], train.labels[:300], test=one, **options)
    assert out["protocol"]["cas"]["most_frequent_class"] == 1
    assert any("all test images are of one class" in note for note in out["notes"])
    assert "100.0 % of them are of the most frequent class" in metric_rows(out)[-1].note
    out = evaluate_images(train.images[:300], train.labels[:300], test=test.subset(np.arange(5)), **options)
    assert "there are only 5 different real test images" in out["notes"]


def test_what_cannot_be_measured_is_refused(train, test) -> None:
    made = train.images[:60]
    for options, message in (
        ({"max_images": 1}, "max_images is 1"),
        ({"features": ("vibes",)}, "pixels-pca, efficientnet-lite0, inception"),
        ({"metrics": ("fid",)}, "metrics is 'fid', but must be one of frechet, kid"),
        ({"classifiers": ("cnn", "oracle")}, "classifiers.1 is 'oracle': input should be 'logreg', 'mlp', 'cnn'"),
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
