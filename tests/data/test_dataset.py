from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from dpsyngen.data import ImageDataset
from dpsyngen.errors import DataError
from dpsyngen.privacy.randomness import Randomness


def make(n: int = 5, **changes: object) -> ImageDataset:
    fields: dict = {
        "images": np.arange(n * 3 * 8 * 8).astype(np.uint8).reshape(n, 3, 8, 8),
        "labels": np.arange(n, dtype=np.int64) % 2,
        "class_names": ("a", "b"),
        "source": "test",
    }
    return ImageDataset(**(fields | changes))


def test_properties() -> None:
    data = make()
    assert (len(data), data.resolution, data.channels, data.num_classes) == (5, 8, 3, 2)
    unlabelled = make(labels=None, class_names=())
    assert unlabelled.num_classes == 0
    assert unlabelled.subset([1]).labels is None


def test_batch_is_a_writable_copy_and_may_be_empty() -> None:
    data = make()
    batch = data.batch([3, 0])
    assert np.array_equal(batch, data.images[[3, 0]])
    batch[:] = 0
    assert data.images[3].any()
    assert data.batch([]).shape == (0, 3, 8, 8)
    assert data.batch(np.zeros(5, dtype=bool)).shape == (0, 3, 8, 8)
    with pytest.raises(IndexError):
        data.batch([5])


def test_batch_of_a_view_is_contiguous() -> None:
    grey = np.zeros((4, 1, 8, 8), dtype=np.uint8)
    batch = make(4, images=np.broadcast_to(grey, (4, 3, 8, 8))).batch([0, 2])
    assert batch.flags.c_contiguous
    assert batch.flags.writeable


def test_subset_keeps_classes() -> None:
    part = make().subset(np.array([4, 0]))
    assert part.class_names == ("a", "b")
    assert part.labels is not None
    assert part.labels.tolist() == [0, 0]
    assert len(make().subset([])) == 0


def test_fingerprint_depends_on_every_part_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make().fingerprint()
    changed = make().images.copy()
    changed[4, 2, 7, 7] ^= 1
    others = [
        make(images=changed),
        make(labels=np.zeros(5, dtype=np.int64)),
        make(class_names=("a", "c")),
        make(labels=None, class_names=()),
        make(4),
    ]
    assert len({base, *(other.fingerprint() for other in others)}) == 6
    assert make(source="elsewhere").fingerprint() == base
    monkeypatch.setattr("dpsyngen.data.dataset._HASH_CHUNK_BYTES", 1)  # one image a chunk
    assert make().fingerprint() == base


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((5, 3, 8, 8), dtype=np.float32)},
        {"images": np.zeros((5, 2, 8, 8), dtype=np.uint8)},
        {"images": np.zeros((5, 3, 8, 9), dtype=np.uint8)},
        {"labels": None},
        {"class_names": ()},
        {"class_names": ("a", "a")},
        {"labels": np.zeros(4, dtype=np.int64)},
        {"labels": np.zeros(5, dtype=np.int32)},
        {"labels": np.full(5, 2, dtype=np.int64)},
        {"labels": np.full(5, -1, dtype=np.int64)},
    ],
)
def test_fields_that_do_not_fit(changes: dict) -> None:
    with pytest.raises(DataError):
        make(**changes)


def test_import_is_light() -> None:
    code = "import sys, dpsyngen.data; print([m for m in ('PIL', 'pooch', 'sklearn', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_classes_of_another_set() -> None:
    images = np.zeros((3, 1, 8, 8), np.uint8)
    test = ImageDataset(images, np.array([1, 0, 1]), ("cafe\u0301", "x"), "here")
    found = test.with_classes(("w", "x", "caf\u00e9"), "test")
    assert found.labels is not None
    assert found.labels.tolist() == [1, 2, 1]
    assert found.absent_classes == ("w",)
    assert test.absent_classes == ()
    with pytest.raises(DataError, match="not among them: 'x'"):
        test.with_classes(("w", "cafe\u0301"), "test")
    bare = ImageDataset(images, None, (), "here")
    assert bare.with_classes((), "test") is bare
    for own, other in ((bare, ("w",)), (test, ())):
        with pytest.raises(DataError, match="test images have the classes"):
            own.with_classes(other, "test")


# ------------------------------------------------------------------------------------- images of one person


def of_persons(seed: int, persons: int = 12, most: int = 9) -> ImageDataset:
    rng = np.random.default_rng(seed)
    whose = np.repeat(np.arange(persons), rng.integers(1, most + 1, persons))
    rng.shuffle(whose)
    images = rng.integers(0, 256, (len(whose), 1, 8, 8), dtype=np.uint8)
    images[::5] = images[0]  # some are alike
    return ImageDataset(images, None, (), "test").with_persons(whose)


def contents(data: ImageDataset) -> Counter[bytes]:
    return Counter(image.tobytes() for image in data.array())


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_without_a_person_at_most_that_many_images_are_gone(most: int, seed: int) -> None:
    """Neighbouring data sets: the choice among the images of all others is the same."""
    rank = Randomness.from_insecure_seed(seed).tag
    data = of_persons(seed)
    chosen = data.at_most(most, rank)
    assert chosen.images_a_person()[0] <= most
    assert len(chosen) == data.images_a_person(most)[1]
    for person in range(12):
        without = data.subset(data.persons != person).at_most(most, rank)  # type: ignore[arg-type]
        assert contents(without) <= contents(chosen)
        assert sum((contents(chosen) - contents(without)).values()) == min(most, int((data.persons == person).sum()))


def test_the_choice_is_at_random_and_follows_from_the_key() -> None:
    data = of_persons(1)
    picked = [contents(data.at_most(2, Randomness.from_insecure_seed(seed).tag)) for seed in (0, 0, 1, 2)]
    assert picked[0] == picked[1]
    assert len({tuple(sorted(p)) for p in picked}) == 3
    distinct = ImageDataset(np.arange(5 * 64, dtype=np.uint8).reshape(5, 1, 8, 8) % 251, None, (), "t")
    one = distinct.with_persons(["a"] * 5)
    counts = Counter(one.at_most(1, Randomness.from_insecure_seed(s).tag).array()[0, 0, 0, 0] for s in range(500))
    assert all(60 < counts[first] < 140 for first in distinct.array()[:, 0, 0, 0])
    assert data.at_most(9, Randomness.from_insecure_seed(0).tag) is data


@pytest.mark.parametrize("persons", [[1, 2], [1.5] * 5, [[1]] * 5, [None] * 5])
def test_persons_that_do_not_fit(persons: list) -> None:
    with pytest.raises(DataError, match="whose image each is"):
        ImageDataset(np.zeros((5, 1, 8, 8), dtype=np.uint8), None, (), "t").with_persons(persons)
