from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dpsyngen.data import ImageDataset
from dpsyngen.errors import DataError


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
