"""Generated images as a user holds them."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from dpsyngen.errors import ConfigError, RunError
from dpsyngen.generator.samples import Samples


def make(count: int = 12, classes: int = 3, channels: int = 1, names: tuple[str, ...] | None = None) -> Samples:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, channels, 8, 8), dtype=np.uint8)
    chosen = names or tuple(f"class {i}" for i in range(classes))
    labels = np.arange(count) % len(chosen) if chosen else None
    return Samples(pixels, labels, chosen, {"seed": 3, "sampler": "ddim"}, private=True)


def test_length_items_and_slices() -> None:
    s = make()
    image, label = s[4]
    assert len(s) == len(list(s)) == 12
    assert np.array_equal(image, s.images[4])
    assert (label, type(label)) == (1, int)
    for index in (slice(2, 9, 3), [2, 5, 8], np.array([2, 5, 8]), np.isin(np.arange(12), [2, 5, 8])):
        part = s[index]
        assert np.array_equal(part.images, s.images[[2, 5, 8]])
        assert part.labels.tolist() == [2, 2, 2]
        assert (part.class_names, part.settings, part.private) == (s.class_names, s.settings, True)
    assert len(s[[]]) == 0
    assert s[-1][1] == 2
    with pytest.raises(IndexError):
        s[12]


def test_without_classes_an_item_is_the_image_alone() -> None:
    s = make(classes=0)
    assert np.array_equal(s[1], s.images[1])
    assert s[:2].labels is None


def test_a_data_loader_takes_them() -> None:
    from torch.utils.data import DataLoader

    s = make()
    batches = list(DataLoader(s, batch_size=5))
    assert [tuple(images.shape) for images, _ in batches] == [(5, 1, 8, 8), (5, 1, 8, 8), (2, 1, 8, 8)]
    assert np.array_equal(np.concatenate([labels for _, labels in batches]), s.labels)


def test_they_can_be_images_to_train_on() -> None:
    """As any map-style data set can, with their class names."""
    from dpsyngen.data import load_images

    s = make(names=("cat", "dog", "a"))
    data = load_images(s)
    assert data.class_names == s.class_names
    assert np.array_equal(data.batch(np.arange(12)), s.images)
    assert np.array_equal(data.labels, s.labels)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pillow_images_have_the_same_pixels(channels, mode) -> None:
    s = make(channels=channels)
    pictures = s.to_pil()
    assert {p.mode for p in pictures} == {mode}
    back = np.stack([np.asarray(p).reshape(8, 8, channels).transpose(2, 0, 1) for p in pictures])
    assert np.array_equal(back, s.images)


def test_a_notebook_gets_a_row_for_each_class_with_its_name() -> None:
    s = make(names=("cat", "<dog>", "x & y"))
    page = s._repr_html_()
    assert re.findall(r"<th[^>]*>(.*?)</th>", page) == ["cat", "&lt;dog&gt;", "x &amp; y"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(p))) for p in re.findall(r"base64,([^\"]+)", page)]
    assert [p.size for p in pictures] == [(4 * 9 + 1, 10)] * 3  # four images of eight pixels, with gaps
    strip = np.asarray(pictures[1])
    assert np.array_equal(strip[1:9, 1:9], s.images[1, 0])
    assert np.array_equal(strip[1:9, 10:18], s.images[4, 0])


def test_what_is_shown_stays_small_and_says_how_much_it_leaves_out() -> None:
    s = make(count=2000, classes=40)
    page = s._repr_html_()
    assert "2,000 generated images, 80 of them shown" in page
    assert page.count("<img") == 10
    assert "1,000 generated images, 32 of them shown" in make(1000, classes=0)._repr_html_()
    assert Image.open(io.BytesIO(s._repr_png_())).size == (8 * 49 + 1, 10 * 49 + 1)


def test_a_class_with_fewer_images_leaves_its_row_open() -> None:
    s = make(count=5, classes=3)
    grid = np.asarray(s.grid(scale=1))
    assert grid.shape == (3 * 9 + 1, 2 * 9 + 1)
    assert (grid[19:27, 10:18] == 128).all()
    assert np.array_equal(np.asarray(s.grid(columns=5, scale=1))[1:9, 10:18], s.images[1, 0])


def test_no_images_are_shown_as_words() -> None:
    empty = make()[:0]
    assert empty._repr_png_() is None
    assert "0 images" in empty._repr_html_()
    with pytest.raises(ConfigError, match="no images"):
        empty.grid()


def test_names_in_the_text_form_cannot_move_the_cursor() -> None:
    s = make(names=("a\u202eb", "c"))
    assert "\u202e" not in repr(s)
    assert "\u202e" not in s._repr_html_()


def test_saved_images_can_be_read_again_and_tell_where_they_are_from(tmp_path) -> None:
    from dpsyngen.data import load_images

    s = make()
    assert s.save(tmp_path / "folder") == tmp_path / "folder"
    s.save(tmp_path / "file.npz")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == [
        "about.json",
        "class 0",
        "class 1",
        "class 2",
        "metadata.csv",
    ]
    about = json.loads((tmp_path / "folder" / "about.json").read_text())
    assert about | {"private": True, "count": 12, "seed": 3, "sampler": "ddim"} == about
    data = load_images(tmp_path / "file.npz")
    assert np.array_equal(data.images, s.images)
    assert data.class_names == s.class_names
    with pytest.raises(RunError, match="exists already"):
        s.save(tmp_path / "folder")
