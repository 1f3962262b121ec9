"""Which classes a user asks for: by name or by number, one for all images or one for each."""

from __future__ import annotations

import csv
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpsyngen.errors import ConfigError, listed, require, shown
from dpsyngen.files import memory_bytes

MOST_IMAGES = 10**8


def check_count(count: int) -> None:
    """Raise ConfigError for more images than can be drawn at once."""
    allowed = f"at most {MOST_IMAGES:,} at a time; for more, sample again with other seeds"
    require(count <= MOST_IMAGES, "the number of images", count, allowed)


def check_in_memory(count: int, size: int) -> None:
    """Raise ConfigError where so many images of `size` bytes would take more than half of the memory."""
    check_count(count)
    limit = memory_bytes()[1] // (4 * size)  # they are put together at the end, which takes as much again
    allowed = f"at most {limit:,}, which half of the memory holds; `dpsyngen sample` and stream() draw any number"
    require(count <= limit, "the number of images", count, allowed)


def class_number(given: int | str, names: Sequence[str], strict: bool = False) -> int:
    """The number, from 0, of a class that is given by its name or by its number; ConfigError if there is none.

    `strict` refuses a number that is also the name of another class.

    >>> class_number("dog", ["cat", "dog"]), class_number(0, ["cat", "dog"])
    (1, 0)
    """
    if isinstance(given, str) and given in names:
        return names.index(given)
    if strict and not isinstance(given, str) and str(given) in names:
        number = names.index(str(given))
        if number != given:  # labels 1 to 9, say, are classes number 0 to 8
            raise ConfigError(
                f"class {given} could be the one called {str(given)!r}, which is number {number}, or the one with "
                f"that number.  Give names: labels={str(given)!r}."
            )
    try:
        number = int(given)
    except (ValueError, TypeError, OverflowError):
        number = -1
    if not 0 <= number < len(names):
        raise ConfigError(
            f"there is no class {shown(given)}; the classes are {listed(names)} (or 0 to {len(names) - 1})."
        )
    return number


def from_text(texts: Sequence[str], names: Sequence[str]) -> list[str]:
    """The classes that were asked for on a command line: each text is a name, or several as a line of CSV.

    >>> from_text(["Glasses, sun", '"a, b", none'], ["Glasses, sun", "none", "a, b"])
    ['Glasses, sun', 'a, b', 'none']
    """
    lines = [[t] if t in names else next(csv.reader([t], skipinitialspace=True), []) for t in texts]
    asked = [c if c in names else c.strip() for line in lines for c in line if c.strip()]
    if any("," in name for name in names) and not set(asked) <= {*names, *map(str, range(len(names)))}:
        raise ConfigError(
            f"there is no class {shown(next(c for c in asked if c not in names))}; the classes are {listed(names)}.  "
            "Quote a name that has a comma, as in --classes '\"a, b\",c', or give --classes once for each class."
        )
    return asked


def in_turn(count: int, names: Sequence[str], classes: Sequence[int | str] | None) -> NDArray[np.int64] | None:
    """Labels for `count` images: all classes (or those given, by name or number) in turn; None without classes."""
    if not names:
        if classes is not None:
            raise ConfigError("this generator has no classes, so none can be chosen.")
        return None
    chosen = range(len(names)) if classes is None else [class_number(c, names) for c in classes]
    if not chosen:
        raise ConfigError("no class was given: name some, or leave --classes out for all.")
    check_count(count)
    return np.resize(np.array(chosen, dtype=np.int64), count)


def asked_for(
    count: int | None, labels: ArrayLike | None, classes: Sequence[int | str] | None, names: Sequence[str]
) -> tuple[int, NDArray[np.int64] | None]:
    """The number of images and their labels, from what :meth:`dpsyngen.Generator.sample` was given.

    `count` None means as many as there are labels: an array or list of names or numbers, or one for all images.  Where
    there are none, `classes` are taken in turn.  ConfigError if the number is missing, or these do not fit together.
    """
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool) and count >= 1
    require(count is None or whole, "the number of images", count, "a whole number and at least 1")
    if labels is None:
        if count is None:
            raise ConfigError("the number of images is missing: sample(100).")
        if classes is not None and names:
            classes = [class_number(c, names, strict=True) for c in classes]
        return int(count), in_turn(int(count), names, classes)
    if classes is not None:
        raise ConfigError("labels and classes were both given: labels say the class of each image already.")
    if not names:
        raise ConfigError("this generator has no classes, so none can be chosen.")
    # NumPy would make one type of them, and texts of the numbers in ["cat", 2].
    values = np.asarray(labels, dtype=object if isinstance(labels, list | tuple) else None)
    fits = values.ndim <= 1 and values.dtype.kind in "iuUO" and values.size
    require(fits, "labels", labels, "one class for all images or a list of one for each, by name or by number")
    # Arrays hold numbers as Samples.labels does; who writes a number may mean a class that is called so.
    strict = not (isinstance(labels, np.ndarray) and labels.ndim == 1)
    if values.ndim == 0:
        if count is None:
            raise ConfigError("the number of images is missing: sample(10, labels=…).")
        values = np.repeat(values, count)
    elif count is not None and len(values) != count:
        raise ConfigError(f"{len(values)} labels were given for {count} images.")
    given = values.tolist()
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | np.integer | str):
            raise ConfigError(f"{shown(value)} is no class: labels are names or whole numbers.")
    numbers = {value: class_number(value, names, strict) for value in set(given)}
    return len(given), np.array([numbers[value] for value in given], dtype=np.int64)
