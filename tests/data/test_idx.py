from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from dpsyngen.data import load_images
from dpsyngen.errors import DataError


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def pair(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """Images and labels, uncompressed."""
    image_path, label_path = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    image_path.write_bytes(idx(rng.integers(0, 256, (6, 10, 10), dtype=np.uint8)))
    label_path.write_bytes(idx(np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)))
    return image_path, label_path


def compress(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def test_uncompressed(pair: tuple[Path, Path]) -> None:
    data = load_images(pair[0])
    assert data.images.shape == (6, 1, 10, 10)
    assert data.class_names == ("0", "1", "2")


def test_gz_folder_and_mixed_give_the_same(pair: tuple[Path, Path]) -> None:
    expected = load_images(pair[0]).fingerprint()
    assert load_images(pair[0].parent).fingerprint() == expected
    packed = compress(pair[0])
    assert load_images(packed).fingerprint() == expected
    compress(pair[1])
    assert load_images(packed).fingerprint() == expected
    assert load_images(packed.parent).fingerprint() == expected


def test_other_names(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pair[0].rename(tmp_path / "t10k-images.idx3-ubyte")
    pair[1].rename(tmp_path / "t10k-labels.idx1-ubyte")
    assert load_images(tmp_path / "t10k-images.idx3-ubyte").num_classes == 3


def test_a_link_in_a_folder_is_not_followed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    expected = load_images(pair[0]).fingerprint()
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in pair:
        (folder / path.name).symlink_to(path)
    with pytest.raises(DataError, match="symbolic link"):
        load_images(folder)
    assert load_images(folder / pair[0].name).fingerprint() == expected  # named by the user


def test_what_lies_beside_is_named(pair: tuple[Path, Path]) -> None:
    (pair[0].parent / "t10k-images-idx3-ubyte").write_bytes(b"")
    with pytest.warns(UserWarning, match="ignored beside the images: 't10k-images-idx3-ubyte'"):
        load_images(pair[0].parent)


def test_missing_labels(pair: tuple[Path, Path]) -> None:
    pair[1].unlink()
    with pytest.raises(DataError, match="no labels beside it"):
        load_images(pair[0])
    assert load_images(pair[0], labels=False).labels is None


def test_count_mismatch(pair: tuple[Path, Path]) -> None:
    pair[1].write_bytes(idx(np.zeros(5, dtype=np.uint8)))
    with pytest.raises(DataError, match=r"6 images but .* 5 labels"):
        load_images(pair[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw + b"x", "more or fewer"),
        (lambda raw: raw[:9], "truncated"),
        (lambda raw: b"", "not an IDX"),
        (lambda raw: b"\1" + raw[1:], "not an IDX"),
        (lambda raw: raw[:2] + b"\x0d" + raw[3:], "0x0d"),
        (lambda raw: raw[:3] + b"\1" + raw[4:], "labels"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "truncated|memory"),
    ],
)
def test_broken_images(pair: tuple[Path, Path], change: object, match: str, packed: bool) -> None:
    pair[0].write_bytes(change(pair[0].read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=match):
        load_images(compress(pair[0]) if packed else pair[0])


def test_labels_given_as_images(pair: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="holds labels"):
        load_images(pair[1])


def test_broken_gzip(pair: tuple[Path, Path]) -> None:
    packed = compress(pair[0])
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(DataError, match="damaged"):
        load_images(packed)
    packed.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="damaged"):
        load_images(packed)


def test_gzip_bomb_stops_after_the_declared_size(pair: tuple[Path, Path]) -> None:
    pair[0].write_bytes(idx(np.zeros((2, 8, 8), dtype=np.uint8)) + bytes(50_000_000))
    with pytest.raises(DataError, match="more or fewer"):
        load_images(compress(pair[0]))


def test_empty(pair: tuple[Path, Path]) -> None:
    empty = idx(np.zeros((0, 8, 8), dtype=np.uint8))
    # The second is a find of the fuzzer: nothing at all, of more rows and columns than an array may have.
    for content in (empty, empty[:8] + b"\xff" * 8):
        pair[0].write_bytes(content)
        with pytest.raises(DataError, match="no images"):
            load_images(pair[0], labels=False)
