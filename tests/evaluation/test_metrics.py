"""The figures of a set of images, and what is written beside each."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from dpsyngen.data import load_images
from dpsyngen.errors import ConfigError
from dpsyngen.evaluation import FeatureSpec, evaluate_images, frechet_distance, make_extractor


def test_all_figures_carry_their_protocol() -> None:
    train, test = load_images("digits"), load_images("digits:test")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (300, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(300) % 10
    specs = [FeatureSpec("pixels-pca")]
    bad = evaluate_images(noise, labels, reference=train, test=test, features=specs, classifiers=("logreg",))
    good = evaluate_images(
        train.images[:300], train.labels[:300], reference=train, test=test, features=specs, classifiers=("logreg",)
    )
    json.dumps(bad)
    distance = "frechet"
    assert good[distance]["pixels-pca"]["distance"] < 0.2 * bad[distance]["pixels-pca"]["distance"]
    assert good["cas"]["logreg"]["accuracy"] > 0.8 > 0.4 > bad["cas"]["logreg"]["accuracy"]
    figure = bad[distance]["pixels-pca"]
    assert figure["generated_images"] == 300
    assert figure["real_images"] == len(train)
    assert figure["floor_images"] == len(test)
    assert figure["floor"] < figure["distance"]
    assert figure["enough_images"]
    assert bad["cas_chosen"] == "logreg"
    assert bad["protocol"] == {
        "generated_images": 300,
        "real_train_images": len(train),
        "real_test_images": len(test),
        "seed": 0,
        "cas": {
            "held_out_share": 0.1,
            "split": "generated images, by class",
            "chosen_on": "held-out generated images",
            "scored_on": "real test images, once",
            "seed": 0,
        },
    }
    without = evaluate_images(noise, None, reference=train, test=None, features=specs)
    assert without["cas"] == {}
    assert "floor" not in without[distance]["pixels-pca"]
    with pytest.raises(ConfigError, match="same size"):
        evaluate_images(noise[:, :, :4, :4], None, reference=train, test=None)
    with pytest.raises(ConfigError, match="max_images"):
        evaluate_images(noise, None, reference=train, test=None, max_images=1)
    with pytest.raises(ConfigError, match="pixels-pca, efficientnet-lite0, inception"):
        evaluate_images(noise, None, reference=train, test=None, features=("vibes",))


def test_subsets_are_counted_and_too_few_images_are_marked() -> None:
    train, test = load_images("digits"), load_images("digits:test")
    made = train.images[:200]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the mark stands on the figure; it is not said twice
        out = evaluate_images(made, None, reference=train, test=test, features=("pixels-pca",), max_images=50)
    figure = out["frechet"]["pixels-pca"]
    assert (figure["generated_images"], figure["real_images"], figure["floor_images"]) == (50, 50, 50)
    assert figure["features"]["dimensions"] == 49  # 50 reference images span no more
    assert figure["subset_seed"] == 0
    few = evaluate_images(made[:30], None, reference=train, test=None)["frechet"]["pixels-pca"]
    assert not few["enough_images"]
    assert out == evaluate_images(made, None, reference=train, test=test, max_images=50)


def test_figures_are_strict_json_where_a_class_has_no_test_image() -> None:
    train, test = load_images("digits"), load_images("digits:test")
    kept = test.labels != 9
    part = type(test)(test.images[kept], test.labels[kept], test.class_names, test.source)
    out = evaluate_images(train.images, train.labels, reference=train, test=part, features=(), classifiers=("logreg",))
    json.dumps(out, allow_nan=False)
    assert out["cas"]["logreg"]["per_class_accuracy"][9] is None


def test_distances_and_floor_are_those_of_the_parts() -> None:
    train, test = load_images("digits"), load_images("digits:test")
    made = 255 - train.images[:400]
    out = evaluate_images(made, None, reference=train, test=test)["frechet"]["pixels-pca"]
    extractor = make_extractor("pixels-pca")
    extractor.fit(train.images)
    real = extractor(train.images)
    assert out["distance"] == pytest.approx(frechet_distance(extractor(made), real), rel=1e-9)
    assert out["floor"] == pytest.approx(frechet_distance(extractor(test.images), real), rel=1e-9)
    # The training images themselves are at no distance; that is memorisation, and lies below the floor.
    copied = evaluate_images(train.images, None, reference=train, test=test)["frechet"]["pixels-pca"]
    assert copied["distance"] < 1e-6 < copied["floor"]


def test_no_test_images_or_no_labels_no_accuracy() -> None:
    train, test = load_images("digits"), load_images("digits:test")
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
        json.dumps(out, allow_nan=False)


def test_each_figure_says_that_it_is_private_and_of_which_features() -> None:
    train, test = load_images("digits"), load_images("digits:test")
    lines: list[str] = []
    out = evaluate_images(
        train.images[:40],
        train.labels[:40],
        reference=train,
        test=test,
        features=("pixels-pca", "efficientnet-lite0"),
        classifiers=("logreg", "mlp"),
        max_images=12,
        seed=5,
        on_progress=lines.append,
    )
    json.dumps(out, allow_nan=False)
    assert "private" in out["private"]
    assert set(out["frechet"]) == {"pixels-pca", "efficientnet-lite0"}
    assert out["frechet"]["efficientnet-lite0"]["features"]["dimensions"] == 1280
    assert not out["frechet"]["efficientnet-lite0"]["enough_images"]
    assert all(f["subset_seed"] == 5 and "floor" in f for f in out["frechet"].values())
    assert out["cas_chosen"] in out["cas"]
    best = max(r["validation_accuracy"] for r in out["cas"].values())
    assert out["cas"][out["cas_chosen"]]["validation_accuracy"] == best
    assert [line.split()[0] for line in lines] == ["Fréchet", "Fréchet", "training", "training"]


def test_test_images_of_another_size_are_refused() -> None:
    train = load_images("digits")
    other = load_images("digits:test", resolution=16)
    with pytest.raises(ConfigError, match="test images are"):
        evaluate_images(train.images, None, reference=train, test=other)
