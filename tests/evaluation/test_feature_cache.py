"""What is kept of real images is never served for others, and never trusted when it is damaged."""

from __future__ import annotations

import stat

import numpy as np
import pytest

from dpsyngen.data import load_images
from dpsyngen.errors import DataError
from dpsyngen.evaluation import evaluate_images
from dpsyngen.evaluation.extractors import kept_features


class Counting:
    """Features that say which images, which weights and which call they are from."""

    name = "counting"

    def __init__(self, weights: int = 1, known: bool = True) -> None:
        self.weights, self.known, self.calls = weights, known, 0

    def config(self) -> dict:
        return {"name": self.name}

    def identity(self) -> dict | None:
        return {"weights": self.weights} if self.known else None

    def fit(self, reference) -> None:
        raise AssertionError("nothing to fit")

    def __call__(self, images, on_progress=None) -> np.ndarray:
        self.calls += 1
        sums = images.reshape(len(images), -1).sum(1)
        return np.stack([sums, sums * self.weights, np.full(len(images), self.calls)], 1).astype(np.float32)


@pytest.fixture
def images(tiny_images) -> np.ndarray:
    return tiny_images(0)[0][:, None]


def test_computed_once(tmp_path, images) -> None:
    extractor = Counting()
    lines: list[str] = []
    first = kept_features(tmp_path / "c", extractor, images)
    again = kept_features(tmp_path / "c", extractor, images, lines.append)
    assert extractor.calls == 1
    np.testing.assert_array_equal(first, again)
    assert again.dtype == np.float32
    assert "kept from before" in lines[0]


def test_other_images_and_other_extractors_are_never_served(tmp_path, images) -> None:
    kept_features(tmp_path, Counting(), images)
    changed = images.copy()
    changed[7, 0, 3, 3] ^= 1  # one bit of one pixel
    reordered = images[::-1]
    reshaped = images.reshape(len(images), 1, 4, 16)
    for other in (changed, reordered, images[:-1], reshaped):
        extractor = Counting()
        np.testing.assert_array_equal(kept_features(tmp_path, extractor, other), Counting()(other))
        assert extractor.calls == 1
    heavier = Counting(weights=2)
    np.testing.assert_array_equal(kept_features(tmp_path, heavier, images), Counting(weights=2)(images))
    renamed = Counting()
    renamed.name = "other"
    kept_features(tmp_path, renamed, images)
    assert heavier.calls == renamed.calls == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "pickle", "folder"])
def test_damaged_files_are_computed_again(tmp_path, images, damage) -> None:
    good = kept_features(tmp_path, Counting(), images)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("no features")
    elif damage == "flipped":  # one bit of the first feature
        at = content.index(good.tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage == "pickle":
        with open(path, "wb") as file:
            np.savez(file, features=np.array([{}] * len(images), dtype=object))
    else:
        path.unlink()
        path.mkdir()
    extractor = Counting()
    if damage == "folder":
        with pytest.raises(OSError, match=path.name):
            kept_features(tmp_path, extractor, images)
        return
    np.testing.assert_array_equal(kept_features(tmp_path, extractor, images), good)
    assert extractor.calls == 1
    again = Counting()
    np.testing.assert_array_equal(kept_features(tmp_path, again, images), good)  # and it is whole again
    assert again.calls == 0


def test_the_version_is_part_of_the_key(tmp_path, images, monkeypatch) -> None:
    import dpsyngen.evaluation.extractors as module

    kept_features(tmp_path, Counting(), images)
    monkeypatch.setattr(module, "__version__", "other")
    extractor = Counting()
    kept_features(tmp_path, extractor, images)
    assert extractor.calls == 1


def test_files_are_private_and_nothing_is_left_beside(tmp_path, images) -> None:
    kept_features(tmp_path / "c", Counting(), images)
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700
    (path,) = (tmp_path / "c").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_cannot_be_identified_is_not_kept(tmp_path, images) -> None:
    extractor = Counting(known=False)
    for _ in range(2):
        kept_features(tmp_path, extractor, images)
        kept_features(None, Counting(), images)
    assert extractor.calls == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder(tmp_path, images) -> None:
    (tmp_path / "c").write_text("")
    with pytest.raises(DataError, match="no folder"):
        kept_features(tmp_path / "c", Counting(), images)


def test_an_evaluation_is_the_same_from_the_cache(tmp_path) -> None:
    train, test = load_images("digits"), load_images("digits:test")
    (tmp_path / "own.py").write_text("from torch import nn\nflat = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())\n")
    folder, name = tmp_path / "kept", f"{tmp_path}/own.py:flat"
    options = {"reference": train, "test": test, "features": (name,), "max_images": 80}
    drawn = 255 - train.images[:20]
    plain = evaluate_images(train.images[:60], None, programs=drawn, **options)
    first = evaluate_images(train.images[:60], None, programs=drawn, cache=folder, **options)
    assert len(list(folder.iterdir())) == 3  # real training, test and programmatic images; not the generated ones
    assert plain == first == evaluate_images(train.images[:60], None, programs=drawn, cache=folder, **options)
    # The same folder serves another data set its own figures.
    other = type(train)(255 - train.images, train.labels, train.class_names, train.source)
    options["reference"] = other
    from_cache = evaluate_images(train.images[:60], None, cache=folder, **options)
    assert from_cache == evaluate_images(train.images[:60], None, **options)
    assert from_cache["features"][name]["metrics"] != plain["features"][name]["metrics"]
