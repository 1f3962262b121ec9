from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsyngen.data import load_images, named
from dpsyngen.errors import ConfigError, DataError
from tests.data.encoded import png, table, write_parquet


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty DPSYNGEN_DATA on a machine with no other data and no network."""

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network in tests")

    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setenv("DPSYNGEN_DATA", str(root))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(named, "_SYSTEM_FOLDERS", (tmp_path / "system",))
    monkeypatch.setattr("pooch.retrieve", offline)
    return root


def write_fashion_test(folder: Path, first: tuple[int, ...] = (9, 2, 1, 1, 6, 1, 4, 6, 5, 7)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    labels = bytes(first) + bytes(10)
    images = bytes((0, 0, 8, 3)) + struct.pack(">3I", 20, 28, 28) + bytes(20 * 28 * 28)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(bytes((0, 0, 8, 1)) + struct.pack(">I", 20) + labels)
    )


def test_digits_split_is_fixed_and_stratified() -> None:
    train, test, both = (load_images(f"digits:{split}") for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (1437, 360, 1797)
    assert test.labels is not None
    assert both.labels is not None
    assert np.bincount(test.labels).min() >= 34
    assert np.abs(np.bincount(test.labels) - np.bincount(both.labels) * 360 / 1797).max() < 1
    assert (both.images.min(), both.images.max(), both.images.shape[1:]) == (0, 255, (1, 8, 8))
    assert load_images("digits").fingerprint() == train.fingerprint()
    # Pinned: published numbers depend on the split.
    assert test.fingerprint() == "d16eec4aa89bc74c02368afeb82875a123a3875495336b411583334285fbdb6e"
    as_rows = both.images.reshape(1797, -1)
    parts = np.concatenate([train.images, test.images]).reshape(1797, -1)
    assert np.array_equal(np.sort(as_rows.sum(1)), np.sort(parts.sum(1)))


def test_names() -> None:
    assert named.parse_name("FashionMNIST:test") == ("fashion-mnist", "test")
    assert named.parse_name("CIFAR-10") == ("cifar10", "train")
    assert named.parse_name("./digits") is None
    assert named.parse_name("photos") is None
    for split in ("digits:", "digits:valid"):
        with pytest.raises(ConfigError, match="train, test, all"):
            named.parse_name(split)


@pytest.mark.parametrize("name", ["digits", "Digits", "mnist", "cifar10", "fashion_mnist"])
def test_an_own_folder_wins_over_a_set_of_its_name(
    class_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class_folder.rename(class_folder.parent / name)
    monkeypatch.chdir(class_folder.parent)
    with pytest.warns(UserWarning, match=f"{name} is a folder here, and is read; the public set is called .*:train"):
        assert len(load_images(name)) == 6
    for path in (f"./{name}", Path(name)):  # that need no word
        assert load_images(path).ignored == ()
    assert len(load_images("digits:train")) == 1437


def test_an_own_file_wins_over_a_set_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 8, 8), np.uint8))
    (tmp_path / "a.npy").rename(tmp_path / "mnist")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not read"):  # instead of a download
        load_images("mnist")


def test_unknown_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'fashion-mnist'"):
        load_images("fashion-mnits")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"Did you mean .*photos"):
        load_images(tmp_path / "photo")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="unpack"):
        load_images(tmp_path / "a.zip")
    for text in ("a\0b", "a\0b/c"):
        with pytest.raises(DataError, match=r"cannot be a path|neither"):
            load_images(text)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="channels"):
        load_images("digits", channels="colour")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="resolution"):
        load_images("digits", resolution=4)


def test_fashion_mnist(fashion_root: Path) -> None:
    test = load_images("fashion-mnist:test")
    assert test.images.shape == (10000, 1, 28, 28)
    assert test.labels is not None
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert test.class_names[9] == "Ankle boot"
    assert len(load_images("fashion-mnist")) == 60000


@pytest.mark.parametrize("folder", ["root/fashion-mnist", "root/FashionMNIST/raw", "system/dataset-fashion-mnist"])
def test_places(data_root: Path, folder: str) -> None:
    write_fashion_test(data_root.parent / folder)
    assert len(load_images("fashion-mnist:test")) == 20


def test_the_cache_is_looked_in(data_root: Path) -> None:
    write_fashion_test(data_root.parent / "home/.cache/dpsyngen/fashion-mnist")
    assert len(load_images("fashion-mnist:test", labels=False)) == 20


def test_download_failure_says_where_it_looked(data_root: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_images("mnist")
    message = str(caught.value)
    for text in (str(data_root / "mnist"), ".cache/dpsyngen", "no network in tests", "By hand", "train-images"):
        assert text in message
    assert "t10k" not in message


def test_downloads_are_of_one_split_and_checked(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> None:
        asked.append((url, known_hash))
        write_fashion_test(path)

    monkeypatch.setattr("pooch.retrieve", retrieve)
    assert len(load_images("fashion-mnist:test")) == 20
    assert [url.rpartition("/")[2][:11] for url, _ in asked] == ["t10k-images", "t10k-labels"]
    assert all(known_hash.startswith("md5:") for _, known_hash in asked)


def cifar_file(label: int = 3) -> bytes:
    records = np.zeros((10_000, 3073), dtype=np.uint8)
    records[:, 0] = label
    records[:, 1:1025] = 200  # red
    return records.tobytes()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_cifar10_archive(data_root: Path) -> None:
    folder = data_root / "cifar10"
    write_tar(
        folder / "cifar-10-binary.tar.gz",
        {"../../evil.txt": b"x", "cifar-10-batches-bin/test_batch.bin": cifar_file()},
    )
    data = load_images("cifar10:test")
    assert data.images.shape == (10_000, 3, 32, 32)
    assert data.images[0].max(axis=(1, 2)).tolist() == [200, 0, 0]
    assert data.labels is not None
    assert set(data.labels.tolist()) == {3}
    assert data.class_names[3] == "cat"
    assert [path.name for path in folder.iterdir()] == ["cifar-10-binary.tar.gz"]
    with pytest.raises(DataError, match="lacks data_batch_1"):
        load_images("cifar10")


def test_a_set_in_parquet_files(data_root: Path) -> None:
    (data_root / "cifar10").mkdir()
    coloured = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    for split, rows in (("train", slice(0, 10)), ("test", slice(10, 20))):
        content = table([png(image) for image in coloured[rows]], range(10))
        write_parquet(data_root / "cifar10" / f"{split}-00000-of-00001.parquet", content)
    for name, rows in (("cifar10", slice(0, 10)), ("cifar10:test", slice(10, 20)), ("cifar10:all", slice(0, 20))):
        data = load_images(name)
        assert np.array_equal(data.images, coloured[rows].transpose(0, 3, 1, 2))
        assert (data.class_names[3], data.labels.tolist()[:10]) == ("cat", list(range(10)))  # type: ignore[union-attr]


@pytest.mark.parametrize(("content", "match"), [(b"short", "lacks test_batch.bin"), (cifar_file(11), "labels over 9")])
def test_cifar10_broken(data_root: Path, content: bytes, match: str) -> None:
    archive = data_root / "cifar10" / "cifar-10-binary.tar.gz"
    write_tar(archive, {"test_batch.bin": content})
    with pytest.raises(DataError, match=match):
        load_images("cifar10:test")
    archive.write_bytes(archive.read_bytes()[:50])
    with pytest.raises(DataError, match="damaged"):
        load_images("cifar10:test")


@pytest.mark.network
def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPSYNGEN_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(named, "_SYSTEM_FOLDERS", ())
    try:
        data = load_images("mnist:test")  # 1.6 MB
    except DataError as error:
        pytest.skip(str(error).splitlines()[0])
    assert data.images.shape == (10_000, 1, 28, 28)
