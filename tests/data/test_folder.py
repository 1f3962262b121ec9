from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsyngen.data import load_images
from dpsyngen.errors import DataError


def grey(path: Path, side: int = 16) -> None:
    Image.new("L", (side, side), 128).save(path)


def test_class_folders(class_folder: Path) -> None:
    done: list[tuple[int, int]] = []
    data = load_images(class_folder, on_progress=lambda i, n: done.append((i, n)))
    assert data.images.shape == (6, 1, 16, 16)
    assert data.class_names == ("cats", "dogs")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(data.images[4, 0], np.asarray(Image.open(class_folder / "dogs" / "1.png")))
    assert done == [(i, 6) for i in range(1, 7)]
    assert load_images(str(class_folder)).fingerprint() == data.fingerprint()


def test_resolution_and_channels(class_folder: Path) -> None:
    assert load_images(class_folder, resolution=24, channels="rgb").images.shape == (6, 3, 24, 24)
    Image.new("RGB", (16, 16)).save(class_folder / "cats" / "colour.png")
    assert load_images(class_folder).images.shape == (7, 3, 16, 16)
    assert load_images(class_folder, channels="grey").channels == 1
    grey(class_folder / "cats" / "large.png", 40)
    assert load_images(class_folder).resolution == 32


def test_flat_folder_has_no_labels(class_folder: Path) -> None:
    data = load_images(class_folder / "cats")
    assert (len(data), data.labels, data.class_names) == (3, None, ())


def test_labels_can_be_ignored(class_folder: Path) -> None:
    grey(class_folder / "top.png")
    (class_folder / "cats" / "deep").mkdir()
    grey(class_folder / "cats" / "deep" / "x.png")
    data = load_images(class_folder, labels=False)
    assert (len(data), data.labels) == (8, None)


def test_ignored_files(class_folder: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (class_folder / name).write_bytes(b"x")
        (class_folder / "cats" / name).write_bytes(b"x")
    (class_folder / "__MACOSX").mkdir()
    (class_folder / ".git").mkdir()
    assert load_images(class_folder).num_classes == 2


def test_all_bad_files_are_in_one_error(class_folder: Path) -> None:
    cats = class_folder / "cats"
    (cats / "broken.png").write_bytes((cats / "0.png").read_bytes()[:60])
    (cats / "empty.jpg").write_bytes(b"")
    (cats / "notes.txt").write_text("x")
    (cats / "deep").mkdir()
    frames = [Image.new("L", (16, 16), value) for value in (0, 200)]
    frames[0].save(cats / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError) as caught:
        load_images(class_folder)
    message = str(caught.value)
    for text in ("5 items", "broken.png", "empty.jpg: empty file", "notes.txt", "deep", "moving.gif", "--skip-bad"):
        assert text in message
    data = load_images(class_folder, skip_bad=True)
    assert (len(data), len(data.skipped)) == (6, 5)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_all_bad_files_are_listed(class_folder: Path) -> None:
    for i in range(30):
        (class_folder / "dogs" / f"bad{i:02}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="30 items cannot be used") as caught:
        load_images(class_folder)
    told = str(caught.value)
    assert told.count("not an image") == 1  # one reason, of which the first few files are named
    assert f"  {', '.join(f'dogs/bad{i:02}.png' for i in range(5))}, … (30 in all): not an image" in told
    assert len(load_images(class_folder, skip_bad=True).skipped) == 30


def test_bad_files_do_not_decide_the_shape(class_folder: Path) -> None:
    (class_folder / "cats" / "z.png").write_bytes(b"no image")
    assert load_images(class_folder, skip_bad=True).images.shape == (6, 1, 16, 16)


def test_images_beside_class_folders(class_folder: Path) -> None:
    grey(class_folder / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png.*no label"):
        load_images(class_folder)
    assert len(load_images(class_folder, skip_bad=True)) == 6


@pytest.mark.parametrize("skip_bad", [False, True])
def test_empty_class(class_folder: Path, skip_bad: bool) -> None:
    (class_folder / "emus").mkdir()
    with pytest.raises(DataError, match="'emus'"):
        load_images(class_folder, skip_bad=skip_bad)


def test_class_of_bad_files_only(class_folder: Path) -> None:
    (class_folder / "emus").mkdir()
    (class_folder / "emus" / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="'emus'"):
        load_images(class_folder, skip_bad=True)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable image"):
        load_images(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="left out"):
        load_images(tmp_path, skip_bad=True)


def test_split_folders(class_folder: Path) -> None:
    root = class_folder.parent / "set"
    (root / "test").mkdir(parents=True)
    class_folder.rename(root / "train")
    with pytest.raises(DataError, match="splits test, train"):
        load_images(root)
    assert len(load_images(root / "train")) == 6


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("train", "test"), True),
        (("Training", "validation", "masks"), True),
        (("train2017", "val2017"), True),
        (("test_images",), True),
        (("car", "train", "plane"), False),
        (("train-station", "test-tube"), False),
    ],
)
def test_flat_splits(tmp_path: Path, names: tuple[str, ...], refused: bool, labels: bool) -> None:
    for name in names:
        (tmp_path / "in" / name).mkdir(parents=True)
        grey(tmp_path / "in" / name / "a.png")
    if not refused:
        assert len(load_images(tmp_path / "in", labels=labels)) == len(names)
        return
    # Deeper, only a data set without classes is read.
    for root in (tmp_path / "in", *(() if labels else (tmp_path,))):
        with pytest.raises(DataError, match=r"holds the splits .* not classes") as caught:
            load_images(root, labels=labels)
        assert str(tmp_path / "in" / names[0]) in str(caught.value)


def test_links_are_not_followed(class_folder: Path) -> None:
    outside = class_folder.parent / "outside"
    outside.mkdir()
    grey(outside / "secret.png")
    (class_folder / "cats" / "leaves.png").symlink_to(outside / "secret.png")
    (class_folder / "dogs" / "stays.png").symlink_to(class_folder / "dogs" / "0.png")
    (class_folder / "linked").symlink_to(outside)
    with pytest.raises(DataError, match="3 items"):
        load_images(class_folder)
    for labels in (True, False):
        data = load_images(class_folder, skip_bad=True, labels=labels)
        assert (len(data), len(data.skipped)) == (6, 3)
    alias = class_folder.parent / "alias"  # the folder that was named may itself be a link
    alias.symlink_to(class_folder / "cats")
    assert len(load_images(alias, skip_bad=True)) == 3


def test_pipes_do_not_block(class_folder: Path) -> None:
    os.mkfifo(class_folder / "cats" / "pipe.png")
    with pytest.raises(DataError, match="not a plain file"):
        load_images(class_folder)


def test_names_of_any_bytes(class_folder: Path) -> None:
    try:
        bad = os.fsencode(class_folder / "cats") + b"/\xff\n.png"
        Path(os.fsdecode(bad)).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    with pytest.raises(DataError) as caught:
        load_images(class_folder)
    str(caught.value).encode("utf-8")


def test_a_folder_too_large_for_memory(class_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpsyngen.data.store.memory_bytes", lambda: (0, 2000))
    with pytest.raises(DataError, match="memory"):
        load_images(class_folder)


def test_one_image_is_told_apart_from_a_folder(class_folder: Path) -> None:
    with pytest.raises(DataError, match="give the folder that the images are in"):
        load_images(class_folder / "cats" / "0.png")
