"""Named sets: ``digits``, ``fashion-mnist``, ``mnist`` and ``cifar10``, each with ``:train``, ``:test`` or
``:all``.

These sets are public; they stand in for private ones in examples, tests and comparisons.

Where the files are looked for, in this order: ``$DPSYNGEN_DATA``, ``~/.cache/dpsyngen``,
``/usr/share/datasets`` and ``/usr/share``, each in a sub-folder with the set's name, and directly; and in
``/usr/share/dataset-<name>``, where a Linux distribution may put them.  If none has them they are downloaded
to ``~/.cache/dpsyngen/<name>`` and checked against a known checksum.  MNIST and Fashion-MNIST use the *same
file names*, so files that are found count only if they begin with the labels of the right set.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpsyngen.data.cifar import ARCHIVE_NAME, CIFAR10_CLASSES, cifar_files_in, read_cifar10
from dpsyngen.data.idx import labels_beside, read_idx_labels, read_idx_pair
from dpsyngen.errors import ConfigError, DataError, printable

SPLITS = ("train", "test", "all")
_SYSTEM_FOLDERS = (Path("/usr/share/datasets"), Path("/usr/share"))


@dataclass(frozen=True)
class NamedSet:
    """What is known of a set before its files are seen."""

    name: str
    class_names: tuple[str, ...]
    folders: tuple[str, ...] = ()
    checksums: tuple[tuple[str, str], ...] = ()  # (file name, pooch hash) of each file to download
    mirrors: tuple[str, ...] = ()  # URL prefixes
    first_labels: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (split, the labels of its first images)


_DIGIT_NAMES = tuple(str(i) for i in range(10))
_SETS = {
    entry.name: entry
    for entry in (
        NamedSet("digits", _DIGIT_NAMES),
        NamedSet(
            "fashion-mnist",
            # The published name "T-shirt/top" stays: names are shown, never used as paths.
            (
                "T-shirt/top",
                "Trouser",
                "Pullover",
                "Dress",
                "Coat",
                "Sandal",
                "Shirt",
                "Sneaker",
                "Bag",
                "Ankle boot",
            ),
            ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "FashionMNIST", "dataset-fashion-mnist"),
            # The publishers' MD5 sums.  Re-packed copies (Linux distributions) differ; only downloads are
            # checked.
            (
                ("train-images-idx3-ubyte.gz", "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                ("train-labels-idx1-ubyte.gz", "md5:25c81989df183df01b3e8a0aad5dffbe"),
                ("t10k-images-idx3-ubyte.gz", "md5:bef4ecab320f06d8554ea6380940ec79"),
                ("t10k-labels-idx1-ubyte.gz", "md5:bb300cfdad3c16e7a12a480ee83cd310"),
            ),
            (
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            ),
            (("train", (9, 0, 0, 3, 0, 2, 7, 2, 5, 5)), ("test", (9, 2, 1, 1, 6, 1, 4, 6, 5, 7))),
        ),
        NamedSet(
            "mnist",
            _DIGIT_NAMES,
            ("mnist", "MNIST/raw", "MNIST", "dataset-mnist"),
            (
                ("train-images-idx3-ubyte.gz", "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873"),
                ("train-labels-idx1-ubyte.gz", "md5:d53e105ee54ea40749a09fcbcd1e9432"),
                ("t10k-images-idx3-ubyte.gz", "md5:9fb629c4189551a2d022fa330f9573f3"),
                ("t10k-labels-idx1-ubyte.gz", "md5:ec29112dd5afa0611ce80d1b7f02629c"),
            ),
            (
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
            (("train", (5, 0, 4, 1, 9, 2, 1, 3, 1, 4)), ("test", (7, 2, 1, 0, 4, 1, 4, 9, 5, 9))),
        ),
        NamedSet(
            "cifar10",
            CIFAR10_CLASSES,
            ("cifar10", "cifar-10", "CIFAR10", "dataset-cifar10"),
            # The binary version: the Python one holds pickles, which can run code when read.
            ((ARCHIVE_NAME, "md5:c32a1d4ab5d03f1284b67883e8d87530"),),
            ("https://www.cs.toronto.edu/~kriz/",),
        ),
    )
}
NAMES = tuple(_SETS)


def parse_name(source: str) -> tuple[str, str] | None:
    """(set, split) when ``source`` names a set, as in ``"mnist"`` or ``"CIFAR-10:test"``, else None.

    Case, hyphens and underscores do not matter.  A text with a path separator is always a path.

    Raises:
        ConfigError: the set is known but its split is not.
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


def suggest(source: str) -> str:
    """A sentence with the named sets, beginning with the one that ``source`` resembles."""
    close = difflib.get_close_matches(source.partition(":")[0].lower(), NAMES, n=1, cutoff=0.6)
    return (f"Did you mean '{close[0]}'? " if close else "") + f"Named sets: {', '.join(NAMES)}."


def read_named(name: str, split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images (uint8, a layout of ``arrays``), labels ``[N]`` and class names of a named set.

    ``"all"`` is train, then test.

    Raises:
        DataError: the files are nowhere and cannot be downloaded, or are broken.
    """
    known = _SETS[name]
    parts = ("train", "test") if split == "all" else (split,)
    if name == "digits":
        read = [_read_digits(part) for part in parts]
    elif name == "cifar10":
        folder = _locate(known, parts)
        read = [read_cifar10(folder, part) for part in parts]
    else:
        folder = _locate(known, parts)
        read = [_read_mnist_like(folder, part) for part in parts]
    images = read[0][0] if len(read) == 1 else np.concatenate([images for images, _ in read])
    return images, np.concatenate([labels for _, labels in read]), known.class_names


def _read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digits, 8×8, values 0..16 scaled to 0..255; 1,437 to train on and 360 to test
    with.

    The set has no standard split.  Ours is stratified and in an order that needs no random generator, whose
    stream a later version might change: the images of a class are ordered by SHA-256 of
    ``"dpsyngen-digits-<index>"`` and the first ones are tested with, about 360/1797 of each class (largest
    remainders).
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


def _read_mnist_like(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images_path = _mnist_images(folder, split)
    if images_path is None:  # removed since it was located
        raise DataError(f"{printable(folder)}: the images of the {split} split are gone. Put them back.")
    images, labels = read_idx_pair(images_path, labels=True)
    if labels is None:
        raise AssertionError("labels were asked for")
    return images, labels


def _mnist_images(folder: Path, split: str) -> Path | None:
    stem = "train" if split == "train" else "t10k"
    names = (f"{stem}-images{dot}idx3-ubyte{ending}" for ending in ("", ".gz") for dot in "-.")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _folders(known: NamedSet) -> Iterator[Path]:
    """Every folder where the files of a set may lie, best first."""
    given = os.environ.get("DPSYNGEN_DATA")
    roots = ([Path(given).expanduser()] if given else []) + [_cache(), *_SYSTEM_FOLDERS]
    for root in roots:
        yield from (root / folder for folder in known.folders)
        yield root


def _cache() -> Path:
    return Path.home() / ".cache" / "dpsyngen"


def _locate(known: NamedSet, parts: tuple[str, ...]) -> Path:
    """The folder that holds the files of these splits, downloading them if need be."""
    looked: list[str] = []
    for folder in _folders(known):
        try:
            why_not = _missing(known, folder, parts)
        except OSError as error:
            why_not = error.strerror or "cannot be read"
        if why_not is None:
            return folder
        looked.append(printable(folder) + (f" ({why_not})" if why_not else ""))
    target = _cache() / known.name
    failures = _fetch(known, target, parts)
    if not failures:
        why_not = _missing(known, target, parts)
        if why_not is None:
            return target
        failures = [f"{printable(target)}: {why_not or 'files still missing'}"]
    by_hand = os.environ.get("DPSYNGEN_DATA") or str(_cache())
    files = ", ".join(_needed(known, parts))
    raise DataError(
        f"'{known.name}' is not on this machine and could not be downloaded.\n"
        f"Looked in:\n  " + "\n  ".join(looked) + "\nTried to download:\n  " + "\n  ".join(failures) + "\n"
        f"By hand: put {files} into {printable(Path(by_hand) / known.name)} (or set DPSYNGEN_DATA to the "
        "folder above it). 'digits' needs no files."
    )


def _missing(known: NamedSet, folder: Path, parts: tuple[str, ...]) -> str | None:
    """None if the files of these splits are here; else why not, ``""`` when there is nothing to say."""
    if not folder.is_dir():
        return ""
    if known.name == "cifar10":
        if all(cifar_files_in(folder, part) for part in parts):
            return None
        pickles = (folder / "cifar-10-python.tar.gz", folder / "cifar-10-batches-py")
        return "only the Python version, whose pickles are not read" if any(p.exists() for p in pickles) else ""
    for part in parts:
        images = _mnist_images(folder, part)
        if images is None:
            return ""
        expected = dict(known.first_labels)[part]
        try:
            labels = read_idx_labels(labels_beside(images))
        except DataError as error:
            return str(error)
        if tuple(labels[: len(expected)].tolist()) != expected:
            return f"files with these names, but they do not begin like {known.name}"
    return None


def _needed(known: NamedSet, parts: tuple[str, ...]) -> list[str]:
    stems = {"train": "train-", "test": "t10k-"}
    wanted = tuple(stems[part] for part in parts)
    return [name for name, _ in known.checksums if known.name == "cifar10" or name.startswith(wanted)]


def _fetch(known: NamedSet, target: Path, parts: tuple[str, ...]) -> list[str]:
    """Download the files of these splits; the failures in words, none if all is well."""
    import pooch

    checksums = dict(known.checksums)
    for name in _needed(known, parts):
        failures = []
        for mirror in known.mirrors:
            try:
                pooch.retrieve(mirror + name, known_hash=checksums[name], fname=name, path=target)
                break
            except Exception as error:  # no network, wrong checksum, full disk: all lead to the same advice
                failures.append(f"{mirror}{name}: {printable(error)[:200]}")
        else:
            return failures
    return []


def _folded(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
