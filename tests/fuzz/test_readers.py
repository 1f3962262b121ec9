"""Every reader of images, with files that are nearly right."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsyngen.data import load_images
from dpsyngen.errors import DpsyngenError
from tests.data.encoded import pixels, png, samples, table, write_parquet, write_saved, write_tar
from tests.fuzz import seeds
from tests.fuzz.mutations import spoil_bytes, spoil_png
from tests.fuzz.properties import (
    accepted,
    examples,
    is_printable,
    is_sound,
    load_or_refuse,
    nothing_else_happens,
    tried,
    zip_of,
)

pytestmark = pytest.mark.slow

numbers = st.integers(0, 2**64 - 1)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for one file at a time.  Small limits keep the many inputs that reach them quick."""
    monkeypatch.setattr("dpsyngen.data.decode.MAX_PIXELS", 2**18)
    monkeypatch.setattr("dpsyngen.data.store.memory_bytes", lambda: (0, 2**25))
    return tmp_path_factory.mktemp("input")


def test_the_seeds_themselves_are_read(folder: Path) -> None:
    still = {
        "dcm": range(len(seeds.dicom()) - 2),
        "png": (0, 1, 2, 3, 4, 5, 7),
        "jpg": (0, 1, 2, 3, 4),
        "webp": (0, 1),
        "gif": (0, 1),
    }
    for suffix, files in seeds.images().items():
        for i in still.get(suffix, range(len(files) - (suffix == "tif"))):
            path = folder / f"a.{suffix}"
            path.write_bytes(files[i])
            assert load_or_refuse(f"seed {suffix}", folder) is not None, (suffix, i)
            path.unlink()
    for i, content in enumerate(seeds.npy()):
        (folder / "a.npy").write_bytes(content)
        plain = (
            i < len(seeds.npy()) - 2
        )  # the last two have headers of versions that only tables need: refused in words
        assert (load_or_refuse("seed npy", folder / "a.npy") is not None) is plain, i


@pytest.mark.parametrize("suffix", sorted(seeds.images()))
def test_image_files(folder: Path, suffix: str) -> None:
    files = seeds.images()[suffix]
    others = [content for all_of_them in seeds.images().values() for content in all_of_them]

    @examples(100 if suffix in ("png", "tif") else 60)
    @given(numbers)
    def check(number: int) -> None:
        random = Random(number)
        spoil = spoil_png if suffix == "png" and random.random() < 0.6 else spoil_bytes
        # A name that lies about the format is part of it.
        name = f"a.{random.choice(sorted(seeds.images())) if random.random() < 0.1 else suffix}"
        (folder / name).write_bytes(spoil(random.choice(files), random.choice(others), random))
        try:
            resolution = random.choice((None, 8, 20))
            load_or_refuse(suffix, folder, resolution=resolution, channels=random.choice(("auto", "grey", "rgb")))
        finally:
            (folder / name).unlink()

    check()


@examples(120)
@given(numbers)
def _npy(folder: Path, number: int) -> None:
    random = Random(number)
    path = folder / "a.npy"
    path.write_bytes(spoil_bytes(random.choice(seeds.npy()), random.choice(seeds.npy()), random))
    data = load_or_refuse("npy", path, resolution=random.choice((None, 8)))
    del data  # a map of a file that is about to be written anew
    path.unlink()


def test_npy(folder: Path) -> None:
    _npy(folder)


@examples(120)
@given(numbers)
def _npz(folder: Path, number: int) -> None:
    random = Random(number)
    members = seeds.members()
    chosen = [(f"{key}.npy", random.choice(members[key])) for key in members if random.random() < 0.8]
    if chosen and random.random() < 0.7:
        at = random.randrange(len(chosen))
        chosen[at] = (chosen[at][0], spoil_bytes(chosen[at][1], random.choice(members["labels"]), random))
    if random.random() < 0.2:
        name = random.choice(("images", "images.npy", "../images.npy", "/etc/x.npy", "labels.npy", "a\x00.npy", ""))
        chosen.insert(random.randrange(len(chosen) + 1), (name, random.choice(members["images"])))
    content = zip_of(chosen, random.choice((0, 8, 8, 12, 14)))
    if random.random() < 0.4:
        content = spoil_bytes(content, zip_of([("images.npy", members["images"][0])]), random)
    path = folder / "a.npz"
    path.write_bytes(content)
    load_or_refuse("npz", path, labels=random.random() < 0.8, skip_bad=random.random() < 0.3)


def test_npz(folder: Path) -> None:
    _npz(folder)


@examples(100)
@given(numbers)
def _idx(folder: Path, number: int) -> None:
    random = Random(number)
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
    contents = list(seeds.idx()[0])
    which = random.randrange(2)
    contents[which] = spoil_bytes(contents[which], contents[1 - which], random)
    if random.random() < 0.5:
        names, contents = [name + ".gz" for name in names], [gzip.compress(c, 1, mtime=0) for c in contents]
        if random.random() < 0.5:
            contents[which] = spoil_bytes(contents[which], contents[1 - which], random)
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_bytes(content)
    load_or_refuse("idx", folder, labels=random.random() < 0.8)
    for name in names:
        (folder / name).unlink()


def test_idx(folder: Path) -> None:
    _idx(folder)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small file of each kind that holds encoded images."""
    place = tmp_path_factory.mktemp("encoded")
    images = pixels(6, side=8)
    data = table([png(image) for image in images], [0, 1, 2, 0, 1, 2], ["a", "b", "c"])
    return {
        "tar": write_tar(place / "a.tar", samples(images, [0, 1, 2, 0, 1, 2])).read_bytes(),
        "parquet": write_parquet(place / "a.parquet", data, rows=3).read_bytes(),
        "arrow": next(write_saved(place / "saved", [data]).glob("*.arrow")).read_bytes(),
    }


@pytest.mark.parametrize("suffix", ["tar", "parquet", "arrow"])
def test_files_of_encoded_images(folder: Path, encoded: dict[str, bytes], suffix: str) -> None:
    if suffix != "tar":
        pytest.importorskip("pyarrow")
    others = list(encoded.values())
    path = folder / f"a.{suffix}"
    path.write_bytes(encoded[suffix])
    assert load_or_refuse(f"seed {suffix}", path, workers=1) is not None

    @examples(80)
    @given(numbers)
    def check(number: int) -> None:
        random = Random(number)
        path.write_bytes(spoil_bytes(encoded[suffix], random.choice(others), random))
        options = {"labels": random.random() < 0.8, "skip_bad": random.random() < 0.3}
        load_or_refuse(suffix, path, workers=1, resolution=random.choice((None, 8)), **options)

    check()


_DTYPES = ("u1", "f2", "f4", ">f8", "i4", "U3", "S2", "?", "c8", "M8[s]", "O", "V4", [("r", "u1"), ("g", "f4")])
_SIZES = (0, 1, 2, 3, 4, 8, 9, 64)
_SHAPES = ([3, 9, 9], [3, 8, 8, 3], [3, 1, 8, 9], [3, 3, 64, 64])


def _filled(shape: list[int], dtype: Any, random: Random) -> np.ndarray:
    """An array of values in the range that is wanted, or of any bytes."""
    rng, dtype = np.random.default_rng(random.randrange(2**32)), np.dtype(dtype)
    if dtype.hasobject:
        return np.full(shape, None, dtype=object)
    if random.random() < 0.7:
        if dtype.kind in "fu":
            return (rng.random(shape) * (1 if dtype.kind == "f" else 255)).astype(dtype)
        if dtype.kind in "iUS":
            return rng.integers(0, 5, shape).astype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype=dtype).reshape(shape)


@examples(160)
@given(numbers)
def _arrays(number: int) -> None:
    random = Random(number)

    def any_shape(most: int) -> list[int]:
        shape = random.choices(_SIZES, k=random.randrange(most + 1))
        return shape if np.prod(shape) <= 2**16 else [0]

    shape = random.choice(_SHAPES) if random.random() < 0.7 else any_shape(5)
    images = _filled(shape, random.choice(_DTYPES[:4] if random.random() < 0.7 else _DTYPES), random)
    labels = None
    if random.random() < 0.8:
        label_shape = random.choice(([3], [3, 1])) if random.random() < 0.7 else any_shape(2)
        labels = _filled(label_shape, random.choice(_DTYPES), random)
    tried["arrays"] += 1
    with nothing_else_happens(Path("/nowhere")):
        try:
            data = load_images((images, labels), skip_bad=random.random() < 0.5)
        except DpsyngenError as error:
            is_printable(str(error))
            return
    is_sound(data)
    accepted["arrays"] += 1


def test_arrays() -> None:
    _arrays()
