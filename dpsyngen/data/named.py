"""Named sets: ``digits``, ``fashion-mnist``, ``mnist`` and ``cifar10``, each with ``:train``, ``:test`` or ``:all``.

These sets are public; they stand in for private ones in examples, tests and comparisons.  Their formats are here, too:
IDX (MNIST's, with ``.gz`` or not, which is read from any file) and CIFAR's binary records.

Where the files are looked for, in this order: in a sub-folder with the set's name of ``$DPSYNGEN_DATA``,
``~/.cache/dpsyngen``, ``/usr/share/datasets`` and ``/usr/share`` (there also ``dataset-<name>``, as some Linux
distributions call it).  Parquet will do, too: ``train*.parquet`` and ``test*.parquet``, as on the hub.  If there is
nothing, they are downloaded to ``~/.cache/dpsyngen/<name>`` and checked against known checksums.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import math
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsyngen.data.cache import build
from dpsyngen.data.folder import find_files
from dpsyngen.data.source import Options
from dpsyngen.data.store import check_fits
from dpsyngen.errors import ConfigError, DataError, printable
from dpsyngen.files import cache_home, damaged, expanded

SPLITS = ("train", "test", "all")
_SYSTEM_FOLDERS = (Path("/usr/share/datasets"), Path("/usr/share"))


@dataclass(frozen=True)
class NamedSet:
    """What is known of a set before its files are seen."""

    name: str
    class_names: tuple[str, ...]
    folders: tuple[str, ...] = ()
    checksums: tuple[tuple[str, str], ...] = ()  # (file name, MD5) of each file to download
    url: str = ""  # of the folder that they are in


def _idx_files(*md5: str) -> tuple[tuple[str, str], ...]:
    files = [f"{s}-{kind}-ubyte.gz" for s in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return tuple(zip(files, md5, strict=True))


# The published name "T-shirt/top" stays: names are shown, never used as paths.
_GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_DIGITS = tuple(str(i) for i in range(10))
_SETS = {
    entry.name: entry
    for entry in (
        NamedSet("digits", _DIGITS),
        NamedSet(
            "fashion-mnist",
            _GARMENTS,
            ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "FashionMNIST", "dataset-fashion-mnist"),
            # The publishers' sums.  Re-packed copies (Linux distributions) differ; only downloads are checked.
            _idx_files(
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        NamedSet(
            "mnist",
            _DIGITS,
            ("mnist", "MNIST/raw", "MNIST", "dataset-mnist"),
            _idx_files(
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        NamedSet(
            "cifar10",
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            ("cifar10", "cifar-10", "CIFAR10", "dataset-cifar10"),
            # The binary version: the Python one holds pickles, which can run code when read.
            (("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),),
            "https://www.cs.toronto.edu/~kriz/",
        ),
    )
}
NAMES = tuple(_SETS)


def parse_name(source: str) -> tuple[str, str] | None:
    """(set, split) when `source` names a set, as in ``"mnist"`` or ``"CIFAR-10:test"``, else None.

    Case, hyphens and underscores do not matter.  A text with a path separator is always a path.  ConfigError if the set
    is known but its split is not.
    """
    if "/" in source or os.sep in source:
        return None
    name, _, split = source.partition(":")
    found = {_folded(known): known for known in NAMES}.get(_folded(name))
    if found is None:
        return None
    if ":" in source and split not in SPLITS:
        raise ConfigError(f"{printable(source)!r}: the split must be one of {', '.join(SPLITS)}, as in '{found}:test'.")
    return found, split or "train"


def _folded(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def suggest(source: str) -> str:
    """A sentence with the named sets, beginning with the one that `source` resembles."""
    close = difflib.get_close_matches(source.partition(":")[0].lower(), NAMES, n=1, cutoff=0.6)
    return (f"Did you mean '{close[0]}'? " if close else "") + f"Named sets: {', '.join(NAMES)}."


def read_named(name: str, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images (uint8, a layout of ``arrays``), labels ``[N]``, class names of a named set; "all" is train, then test."""
    known = _SETS[name]
    parts = ("train", "test") if split == "all" else (split,)
    folder = Path() if name == "digits" else _locate(known, parts)
    read = [_read_digits(part) if name == "digits" else _read_split(known, folder, part) for part in parts]
    images = read[0][0] if len(read) == 1 else np.concatenate([part for part, _ in read])
    return images, np.concatenate([labels for _, labels in read if labels is not None]), known.class_names


def _read_split(known: NamedSet, folder: Path, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    files = _files_of(known, folder, split)
    if files and files[0].suffix == ".parquet":
        found = build(find_files(files, f"{known.name}:{split}", Options()), Options())
        return found.array(), found.labels
    return _read_cifar10(folder, split) if known.name == "cifar10" else read_idx_pair(_idx_images(folder, split))


def _read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digits, 8×8, values 0..16 scaled to 0..255; 1,437 to train on and 360 to test with.

    The set has no standard split.  Ours is stratified and in an order that needs no random generator, whose stream a
    later version might change: the images of a class are ordered by SHA-256 of ``"dpsyngen-digits-<index>"`` and the
    first ones are tested with, about 360/1797 of each class (largest remainders).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    order = sorted(range(len(labels)), key=lambda i: hashlib.sha256(f"dpsyngen-digits-{i}".encode()).digest())
    quota = np.bincount(labels) * 360 / len(labels)
    count = np.floor(quota).astype(int)
    count[np.argsort(count - quota, kind="stable")[: 360 - count.sum()]] += 1
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        test[[i for i in order if labels[i] == label][: count[label]]] = True
    keep = test if split == "test" else ~test
    return images[keep], labels[keep]


# --------------------------------------------------------------------------------------------- finding and downloading


def _locate(known: NamedSet, parts: tuple[str, ...]) -> Path:
    """The folder that holds the files of these splits, downloading them if need be."""
    given, cache = os.environ.get("DPSYNGEN_DATA"), cache_home()
    roots = [expanded(given)] if given else []
    looked = [root / name for root in (*roots, cache, *_SYSTEM_FOLDERS) for name in known.folders]
    for folder in looked:
        if all(_files_of(known, folder, part) for part in parts):
            return folder
    target = cache / known.name
    stems = tuple({"train": "train-", "test": "t10k-"}[part] for part in parts)
    wanted = {name: md5 for name, md5 in known.checksums if known.name == "cifar10" or name.startswith(stems)}
    try:
        import pooch

        for name, md5 in wanted.items():
            pooch.retrieve(known.url + name, known_hash=f"md5:{md5}", fname=name, path=target)
    except Exception as error:  # no network, wrong checksum, full disk: all lead to the same advice
        by_hand = Path(given or cache) / known.name
        raise DataError(
            f"'{known.name}' is not on this machine and could not be downloaded: {printable(error)[:200]}\n  looked in:"
            + "".join(f"\n    {printable(folder)}" for folder in looked)
            + f"\nBy hand: put {', '.join(wanted)} from {known.url} into {printable(by_hand)} (or set DPSYNGEN_DATA to "
            "the folder above it). 'digits' needs no files."
        ) from error
    return target


def _files_of(known: NamedSet, folder: Path, split: str) -> list[Path]:
    """The publishers' file with the images of a split, or Parquet files; [] if the folder has neither."""
    own = folder / _CIFAR_ARCHIVE if known.name == "cifar10" else _idx_images(folder, split)
    return [own] if os.path.isfile(own) else sorted(folder.glob(f"{split}*.parquet"))


# ---------------------------------------------------------------------------------------------------------------- IDX


def is_idx(path: Path) -> bool:
    """Whether a file (gzip-compressed or not) begins like an IDX file of unsigned bytes."""
    try:
        with _idx_stream(path) as stream:
            return stream.read(3) == b"\0\0\x08"
    except (OSError, EOFError, zlib.error):
        return False


def find_train_images(folder: Path) -> Path | None:
    """The IDX training images in a folder, or None.  Links do not count: nobody named what they lead to."""
    found = _idx_images(folder, "train")
    return found if found.is_file() and not found.is_symlink() else None


def read_idx_pair(images_path: Path, *, labels: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """Images ``[N, H, W]``, and if asked for the labels ``[N]`` found beside them."""
    images = _read_idx(images_path, dims=3, what="images [N, H, W]")
    if not labels:
        return images, None
    labels_path = _labels_beside(images_path)
    values = _read_idx(labels_path, dims=1, what="labels [N]")
    if len(images) != len(values):
        raise DataError(
            f"{printable(images_path)} has {len(images)} images but {printable(labels_path.name)} has {len(values)} "
            "labels. They must come from the same split of the same set."
        )
    return images, values


def _idx_images(folder: Path, split: str) -> Path:
    """The image file of a split, as far as it is there."""
    stem = "train" if split == "train" else "t10k"
    paths = [folder / f"{stem}-images{dot}idx3-ubyte{ending}" for ending in ("", ".gz") for dot in "-."]
    return next((path for path in paths if path.is_file()), paths[0])


def _labels_beside(images: Path) -> Path:
    """The label file that belongs to an image file: ``images`` → ``labels``, ``idx3`` → ``idx1``, ``.gz`` or not."""
    stem = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    endings = (".gz", "") if images.suffix == ".gz" else ("", ".gz")
    candidates = [images.with_name(stem + ending) for ending in endings]
    for path in candidates:
        if path.is_file() and path.name != images.name:
            return path
    raise DataError(
        f"{printable(images)}: no labels beside it (looked for {candidates[0].name} and {candidates[1].name}). "
        "Put them there, or ask for images without labels (labels=False)."
    )


def _idx_stream(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_idx(path: Path, *, dims: int, what: str) -> np.ndarray:
    """Big-endian: two zero bytes, the type, the number of dimensions, each dimension as uint32, then the values."""
    where = printable(path)
    with damaged(path, "an IDX file"), _idx_stream(path) as stream:
        header = stream.read(4 + 4 * dims)
        if len(header) < 4 or header[:2] != b"\0\0":
            raise DataError(f"{where} is not an IDX file: it begins with {header[:4].hex(' ') or 'nothing'}.")
        if header[2:4] != bytes((8, dims)):
            kind = {1: "labels", 3: "images"}.get(header[3], "other data")
            raise DataError(
                f"{where} holds {kind} (of type 0x{header[2]:02x}, {header[3]} dimensions) where {what} of unsigned "
                "bytes (type 0x08) are wanted. Check the name."
            )
        if len(header) != 4 + 4 * dims:
            raise ValueError("its header is cut short")
        shape = tuple(int(n) for n in np.frombuffer(header, dtype=">u4", offset=4))
        size = math.prod(shape)
        check_fits(size, what=str(path))
        # Into memory that is taken once; one byte more shows that there is too much, so a gzip bomb is never inflated.
        data = np.empty(size, dtype=np.uint8)
        if stream.readinto(data.data) != size or stream.read(1):
            raise ValueError(f"its header says {'×'.join(map(str, shape))} values, but there are more or fewer")
    return data.reshape(shape) if size else np.zeros((0,) * dims, dtype=np.uint8)


# -------------------------------------------------------------------------------------------------------------- CIFAR

_CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
_CIFAR_FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
_CIFAR_RECORD = 1 + 3 * 32 * 32  # a label, and the red, green and blue planes
_CIFAR_BYTES = 10_000 * _CIFAR_RECORD  # of each file


def _read_cifar10(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[N, 3, 32, 32]`` and labels uint8 ``[N]``; nothing is unpacked, so no path can lead anywhere."""
    path = folder / _CIFAR_ARCHIVE
    raw = dict.fromkeys(_CIFAR_FILES[split], b"")
    with damaged(path, "the archive of CIFAR-10"):
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in raw and member.isreg() and member.size == _CIFAR_BYTES:
                    raw[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
        lacking = [name for name, content in raw.items() if len(content) != _CIFAR_BYTES]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)} of {_CIFAR_BYTES:,} bytes")
        records = np.frombuffer(b"".join(raw.values()), dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
        labels = records[:, 0]
        if labels.max() > 9:
            raise ValueError("labels over 9: CIFAR-100, perhaps")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels
