"""Datasets of Python: PyTorch's map-style, torchvision's and Hugging Face's among them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from dpsyngen.config import load_config
from dpsyngen.data import MapStyle, cache, load_images, save_images
from dpsyngen.data.load import load_private
from dpsyngen.data.store import StoredImages
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.training.plan import shape_of
from tests.data.encoded import pixels

IMAGES = pixels(30)
LABELS = [i % 2 for i in range(30)]


class Vision:
    """As torchvision's data sets: pairs of a PIL image and a number, and names of classes."""

    classes = ("zebra", "ant")

    def __init__(self, transform: Any = None, images: np.ndarray = IMAGES) -> None:
        self.transform, self.images, self.reads = transform, images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.reads += 1
        image = Image.fromarray(self.images[index])
        return self.transform(image) if self.transform else image, LABELS[index]


class Items:
    """Whatever items it is given."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """As torchvision's ToTensor: [C, H, W], floating point in [0, 1]."""
    return torch.from_numpy(np.array(image)).float().div(255)[None]


REFERENCE = load_images((IMAGES, np.array(LABELS)))


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("transform", [None, to_tensor, np.asarray])
def test_a_data_set_like_those_of_torchvision(transform, workers) -> None:
    source = Vision(transform)
    assert isinstance(source, MapStyle)
    data = load_images(source, workers=workers)
    assert data.class_names == ("zebra", "ant")
    assert np.array_equal(data.images, REFERENCE.images)
    assert np.array_equal(data.labels, LABELS)
    assert load_images(source, labels=False).labels is None


def test_items_are_read_once_when_the_form_is_given() -> None:
    source = Vision()
    load_images(source, resolution=16, channels="grey")
    tried_twice = 16
    assert source.reads <= 1 + 2 * tried_twice + 30


def test_subsets_keep_the_names() -> None:
    data = load_images(Subset(Subset(Vision(), range(10, 20)), [0, 2, 4]))  # type: ignore[arg-type]
    assert data.class_names == ("zebra", "ant")
    assert np.array_equal(data.images[:, 0], IMAGES[[10, 12, 14]])


def test_names_of_several_words() -> None:
    data = load_images(Items(list(zip(IMAGES, LABELS, strict=True)), classes=[("ant", "emmet"), ("bee",)]))
    assert data.class_names == ("ant, emmet", "bee")


@pytest.mark.parametrize(
    ("items", "labelled"),
    [
        (list(IMAGES), False),
        ([{"image": i, "label": n} for i, n in zip(IMAGES, LABELS, strict=True)], True),
        ([{"img": Image.fromarray(i), "labels": np.int32(n)} for i, n in zip(IMAGES, LABELS, strict=True)], True),
        ([[i[None], torch.tensor(n)] for i, n in zip(IMAGES, LABELS, strict=True)], True),
        ([(i[..., None] / np.float32(255), str(n)) for i, n in zip(IMAGES, LABELS, strict=True)], True),
        ([(i,) for i in IMAGES], False),
    ],
)
def test_items_of_every_form(items, labelled) -> None:
    data = load_images(Items(items))
    assert np.array_equal(data.images, REFERENCE.images)
    assert data.class_names == (("0", "1") if labelled else ())


def test_tensor_datasets() -> None:
    data = load_images(TensorDataset(torch.from_numpy(IMAGES), torch.tensor(LABELS)))
    assert data.fingerprint() == REFERENCE.fingerprint()


def test_images_of_other_sizes_and_modes_follow_the_rules_for_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 256, (50, 20, 4), dtype=np.uint8)),
        Image.fromarray(rng.integers(0, 65536, (32, 32)).astype(np.uint16)),
    ]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    assert load_images(Items(images)).fingerprint() == load_images(tmp_path).fingerprint()


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (IMAGES[0] / 255 * 2 - 1, r"outside 0\.\.1(.|\n)*\(x \+ 1\) / 2"),
        (IMAGES[0] * 1.0, "outside 0..1"),
        (np.full((16, 16), np.nan), "NaN"),
        (IMAGES[0].astype(np.int64), "type int64"),
        (np.zeros((2, 16, 16), dtype=np.uint8), "shape"),
        (np.zeros(16, dtype=np.uint8), "shape"),
        (np.zeros((0, 16), dtype=np.uint8), "empty"),
        ("a path", "'str'"),
        (None, "'NoneType'"),
        (Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "floating-point"),
    ],
)
def test_images_that_are_none(image, why) -> None:
    items: list[Any] = [*IMAGES[:5], image]
    with pytest.raises(DataError, match=rf"1 item(.|\n)*item 5: (.|\n)*{why}"):
        load_images(Items(items), resolution=16, channels="grey")
    data = load_images(Items(items), skip_bad=True)
    assert (len(data), len(data.skipped)) == (5, 1)


@pytest.mark.parametrize("label", [1.5, [0, 1], np.array([1.0]), {}])
def test_labels_that_are_none(label) -> None:
    with pytest.raises(DataError, match="item 1: the label is"):
        load_images(Items([(IMAGES[0], 0), (IMAGES[1], label)]))


class Failing(Items):
    broken = 2

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise KeyError("no such file")
        return self.items[index]


def test_missing_labels_and_failing_items() -> None:
    source = Failing([(IMAGES[0], 0), (IMAGES[1], None), (IMAGES[2], 0)])
    with pytest.raises(DataError, match=r"item 1: no label(.|\n)*item 2: KeyError"):
        load_images(source)
    assert len(load_images(source, skip_bad=True)) == 1


def test_a_first_item_that_fails_is_left_out_as_any_other() -> None:
    source = Failing([{"img": image, "cls": i % 2} for i, image in enumerate(IMAGES[:5])])
    source.broken = 0
    with pytest.raises(DataError, match=r"1 item(.|\n)*item 0: KeyError"):
        load_images(source)
    data = load_images(source, skip_bad=True)
    assert (len(data), data.class_names) == (4, ("0", "1"))


@pytest.mark.parametrize("items", [[(1, 2, 3)], [{"pixels": 3}], [()]])
def test_items_of_another_form(items) -> None:
    with pytest.raises(ConfigError, match=r"items (of|have)"):
        load_images(Items(items))


def test_random_augmentation_is_refused() -> None:
    rng = np.random.default_rng(0)

    def flip(image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image

    with pytest.raises(DataError, match="not the same when it is read again"):
        load_images(Vision(flip))
    labels = iter(range(1000))

    class Renamed(Vision):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return super().__getitem__(index)[0], next(labels)

    with pytest.raises(DataError, match="not the same"):
        load_images(Renamed())


def test_what_cannot_be_sampled_from_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match="Save it first"):
        load_images(iter(IMAGES))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"dataset\['train'\]"):
        load_images({"train": Vision(), "test": Vision()})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no images"):
        load_images(Items([]))
    for wrong in (3, {1, 2}, {"a": 1}, None):
        with pytest.raises(ConfigError, match="images must be"):
            load_images(wrong)  # type: ignore[arg-type]


def test_large_ones_lie_in_a_file_without_a_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setenv("DPSYNGEN_CACHE", str(tmp_path / "cache"))
    data = load_images(Vision())
    assert isinstance(data.images, StoredImages)
    assert data.images.shape == REFERENCE.images.shape
    assert np.array_equal(data.array(), REFERENCE.images)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == []
    assert np.array_equal(data.subset([3, 1]).batch([0, 1])[:, 0], IMAGES[[3, 1]])
    with pytest.raises(DataError, match="item 29"):
        load_images(Items([*IMAGES[:29], "x"]), resolution=16, channels="grey")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == []
    save_images(data, tmp_path / "saved")
    assert load_images(tmp_path / "saved").fingerprint() == data.fingerprint()


def test_a_killed_process_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setenv("DPSYNGEN_CACHE", str(tmp_path))
    if (child := os.fork()) == 0:
        load_images(Vision(), on_progress=lambda done, total: os.kill(os.getpid(), 9))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == 9
    assert list(tmp_path.iterdir()) == []


def test_training_takes_them(tiny_settings) -> None:
    config = load_config(tiny_settings | {"data": {"resolution": 8}}, preset="cpu-small")
    shape = shape_of(load_private(Vision(), config), config)
    assert (shape.class_names, shape.records, shape.resolution) == (("zebra", "ant"), 30, 8)


def test_other_keys_of_items_are_named() -> None:
    items = [{"image": np.full((8, 8), 90 + i, np.uint8), "dx": "ab"[i % 2], "text": str(i)} for i in range(4)]

    class Items:
        def __len__(self) -> int:
            return len(items)

        def __getitem__(self, i: int) -> dict:
            return items[i]

    with pytest.warns(UserWarning, match="ignored in each item: 'dx', 'text'"):
        assert load_images(Items()).labels is None
    with pytest.warns(UserWarning, match="ignored in each item: 'text'"):
        assert load_images(Items(), label_column="dx").class_names == ("a", "b")
