"""One entrance for private images: folders, arrays, tables, tar files, named sets, and datasets of Python."""

from __future__ import annotations

import difflib
import glob
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack

import numpy as np
from pydantic import ValidationError

from dpsyngen.config import Config, DataConfig, explain
from dpsyngen.data.arrays import dataset_from_arrays, read_array_file, read_array_folder, read_npz
from dpsyngen.data.cache import build
from dpsyngen.data.dataset import NEARLY_BLACK, ImageDataset, is_nearly_black
from dpsyngen.data.decode import Form, as_array
from dpsyngen.data.folder import IMAGE_SUFFIXES, SHARD_SUFFIXES, find_files, find_folder, find_in_folder, find_pattern
from dpsyngen.data.labels import ignored
from dpsyngen.data.map_style import MapStyle, is_map_style, read_map_style
from dpsyngen.data.named import find_train_images, is_idx, parse_name, read_idx_pair, read_named, suggest
from dpsyngen.data.source import FormOptions, Options
from dpsyngen.data.store import CLASS_NAMES, IMAGES, LABELS
from dpsyngen.errors import ConfigError, DataError, listed, printable, require
from dpsyngen.files import PARTIAL, expanded

PathLike = str | os.PathLike[str]
Data = TypeVar("Data", bound=DataConfig)
Source = PathLike | ImageDataset | MapStyle | tuple[np.ndarray, np.ndarray | None]

_KINDS = (
    "a folder of images, Parquet files, WebDataset .tar files, a folder of save_to_disk, a .npz or .npy file, an IDX "
    "file (-idx3-ubyte, .gz too) or a named set"
)


def load_images(
    source: str | os.PathLike[str] | tuple[np.ndarray, np.ndarray | None] | MapStyle,
    *,
    resolution: int | None = None,
    channels: Literal["auto", "grey", "rgb"] = "auto",
    labels: bool | PathLike = True,
    label_column: str | None = None,
    skip_bad: bool = False,
    cache: str | os.PathLike[str] = "auto",
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **form: Unpack[FormOptions],
) -> ImageDataset:
    """Read the user's private images.  docs/data.md describes each kind of source.

    Args:
        source: one of

            * a named set: ``"digits"``, ``"fashion-mnist"``, ``"mnist"``, ``"cifar10"``, with ``":train"``
              (default), ``":test"`` or ``":all"``.  A file or folder of that name wins, with a warning;
            * a folder of image files (sub-folders are classes, or a table says them), of shards, arrays or IDX files,
              or one that ``Dataset.save_to_disk`` wrote;
            * a ``.parquet``, ``.arrow``, ``.tar`` (WebDataset), ``.npz``, ``.npy`` or IDX file, or a pattern of shards:
              ``"data/train-*.parquet"``, ``"shard-{0000..0099}.tar"``;
            * arrays ``(images, labels or None)``, with names of the classes as a third, if there are any; for images
              also a list of Pillow images, arrays, tensors, paths or contents of files;
            * a dataset of Python: :class:`~dpsyngen.data.map_style.MapStyle` says what it must have.
        resolution: height and width of the result, 8..256.  Images of other sizes are made square (see `fit`) and
            resized.  None: the native size if all images are one square of 8..64 pixels,
            else 32.
        channels: ``"grey"``, ``"rgb"``, or ``"auto"``: grey if every image is stored in grey.
        labels: False ignores labels (for a folder: all images below it, however nested).  A path: a table (CSV, or
            JSON Lines) with the names of image files of a folder, however nested, and their labels.
        label_column: the column, key or array that holds the labels, where it has no usual name ("label", "class", …).
        skip_bad: leave out images that cannot be used and list them in ``.skipped``, instead of raising.
            Whether an image is left out depends on that image alone, so the privacy guarantee is not touched.
        cache: where decoded images lie.  "auto": in memory up to 1 GiB, else in a file below ``$DPSYNGEN_CACHE`` or
            ``~/.cache/dpsyngen/images``.  A path: always in a file in that folder.  Such files are as private as the
            images; they are made for their owner alone, are used again as long as the source does not change, and may
            be removed whenever no run is going on.  Arrays of the right form are used where they lie.
        workers: processes that decode; None: one a core (one in all for a dataset of Python).
        on_progress: called as ``(done, total)`` while images are decoded.

    Keyword Args:
        value_range (tuple[float, float]): the values that are black and white, where files or types do not say so:
            ``(0, 4095)`` for 12 bits stored in 16, ``(0, 1)`` for masks of 0 and 1.  Values beyond are clipped;
            ``(4095, 0)`` inverts.  It is **public**: take it from the format, not from these images.
        fit (str): how images become square: "crop" to the largest centred square, or "pad" with black bars.
        window (tuple[float, float]): of DICOM files, centre and width in values of the modality (Hounsfield units for
            CT), instead of what each says; black and white are half the width from the centre.  It is public, too.
        frames (str): of DICOM files of several: "first", or "all" as an image each (in folders); without it such files
            are refused.
        group_size (int): with ``frames="all"`` the most frames that a file may have, as they are of one person; None:
            any number, where images of each person are chosen later.
        groups (str): path of a table (CSV, …, as for labels) of file names and persons, for
            :attr:`ImageDataset.persons`: every image needs a row.  Names of persons are kept nowhere.
        beside (str): path of a table that may lie among the images and is not read, as `groups` of other images.

    Returns:
        The images.  The shape ``[C, H, W]``, the number of images and the class names are treated as
        **public** (with None and ``"auto"`` the shape follows from the images; give both to fix it
        beforehand).

    Raises:
        DataError: the images or labels cannot be read; all bad files are listed in one message.
        ConfigError: an argument has a value that is not allowed.

    Warns:
        UserWarning: something beside the images is not used (``ImageDataset.ignored``); most images are nearly
            black, so their values probably have another range.
    """
    place = os.fsdecode(os.fspath(cache)) if isinstance(cache, str | os.PathLike) else ""
    require(place.strip() and "\0" not in place, "cache", cache, "'auto' or the path of a folder")
    asked: dict[str, Any] = {"resolution": resolution, "channels": channels, "workers": workers, **form}
    groups, most, beside = asked.pop("groups", None), asked.pop("group_size", 1000), asked.pop("beside", None)
    try:
        d = DataConfig.model_validate({k: v.item() if isinstance(v, np.generic) else v for k, v in asked.items()})
    except ValidationError as error:
        raise ConfigError(explain(error, DataConfig)) from None
    ends, levels = d.value_range or (0, 1), d.window or (0, 1)
    require(ends[0] != ends[1], "value_range", ends, "two different numbers, the values of black and white: 0,4095")
    require(levels[1] > 0, "window", levels, "the centre and the width, which is above 0, such as 40,400")
    table = None if isinstance(labels, bool) else Path(labels).expanduser()
    which = (labels is not False, table, label_column)
    persons = None if groups is None else Path(groups).expanduser()
    checked = Form(d.value_range, d.fit, d.window, d.frames, most)
    tables = (persons, None if beside is None else expanded(beside))
    options = Options(d.resolution, d.channels, *which, skip_bad, place, d.workers, checked, *tables, on_progress)
    dataset = _read(source, options)
    if persons is not None and dataset.persons is None:
        raise ConfigError(
            f"{dataset.source}: its images have no file names, so {printable(persons)} cannot say whose they are. Give "
            "a folder, Parquet or WebDataset; from Python also arrays, and groups=[…] with whose each image is."
        )
    for text in dataset.ignored:
        warnings.warn(f"{text}.", stacklevel=2)
    if is_nearly_black(dataset):
        warnings.warn(NEARLY_BLACK, stacklevel=2)
    return dataset


def _read(source: Any, options: Options) -> ImageDataset:
    if isinstance(source, tuple | list):
        _require_no_table(options, "arrays")
        return _from_tuple(source, options)
    if not isinstance(source, str | os.PathLike):
        _require_no_table(options, "a dataset", columns=True)
        return _from_object(source, options)
    text = os.fspath(source)
    if not text.strip():
        raise ConfigError(f"the images' source is empty; give {_KINDS}.")
    named = parse_name(text) if isinstance(source, str) else None
    text = os.fsdecode(text)
    try:
        path = Path(text).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # too long, or below a folder that may not be entered
        raise DataError(f"{printable(text)} cannot be read ({error.strerror}). Give {_KINDS}.") from error
    except (ValueError, RuntimeError) as error:  # a null byte in the text, or ~ of nobody
        raise DataError(f"{printable(text)} cannot be a path ({printable(error)}). Give {_KINDS}.") from error
    if named is not None and (is_folder or is_file):
        told = f"{printable(text)} is a {'folder' if is_folder else 'file'} here, and is read; the public set is called"
        found = _from_folder(path, options) if is_folder else _from_file(path, options)
        return replace(found, ignored=(f"{told} {':'.join(named)}", *found.ignored))
    if is_folder:
        return _from_folder(path, options)
    if is_file:
        return _from_file(path, options)
    if named is not None:
        _require_no_table(options, ":".join(named))
        images, values, names = read_named(*named)
        if not options.labels:
            return dataset_from_arrays(images, None, None, ":".join(named), options)
        return dataset_from_arrays(images, values, names, ":".join(named), options)
    pattern = find_pattern(text, options)
    if pattern is None:
        raise DataError(_not_found(path, text))
    _require_no_table(options, text)
    return build(pattern, options)


def _require_no_table(options: Options, where: str, *, columns: bool = False) -> None:
    """Raise ConfigError where labels were asked for from a table, or from a column if there are no `columns`."""
    allowed = "left out here: a table is for image folders"
    require(options.label_file is None, "labels", options.label_file, allowed)
    asked = options.label_column
    allowed = f"left out: {printable(where)} has no columns, and its labels are its own"
    require(asked is None or columns, "label_column", asked, allowed)


def _from_object(source: Any, options: Options) -> ImageDataset:
    if is_map_style(source):
        return read_map_style(source, options)
    if isinstance(source, dict) and source and all(is_map_style(part) for part in source.values()):
        raise ConfigError(
            f"there are the splits {listed(source)}. Give one of them, such as dataset['{next(iter(source))}']."
        )
    hint = ""
    if hasattr(source, "__iter__") and not hasattr(source, "__len__"):
        hint = (
            " A stream cannot be sampled from: Poisson sampling needs each record by its number. Save it first, as "
            "Parquet or WebDataset."
        )
    raise ConfigError(
        f"images must be {_KINDS}, a pair of arrays (images, labels or None), or a dataset with len() and items; not "
        f"{type(source).__name__}.{hint}"
    )


def _from_folder(path: Path, options: Options) -> ImageDataset:
    if (path / PARTIAL).exists():
        raise DataError(f"{printable(path)} holds part of the images only: a command that wrote it was interrupted.")
    if (path / IMAGES).is_file():
        _require_no_table(options, str(path))
        return _beside(path, read_array_folder(path, options), (IMAGES, LABELS, CLASS_NAMES))
    train_images = find_train_images(path)
    if train_images is not None:
        name = train_images.name.removesuffix(".gz")
        used = (name, name.replace("images", "labels").replace("idx3", "idx1"))
        return _beside(path, _from_file(train_images, options), used)
    found = find_in_folder(path, options)
    if found is not None:
        _require_no_table(options, str(path), columns=True)
    return build(found or find_folder(path, options), options)


def _beside(folder: Path, found: ImageDataset, used: Sequence[str]) -> ImageDataset:
    """The data set, told of what else lies in its folder."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    others = [name for name in names if name.removesuffix(".gz") not in used]
    return replace(found, ignored=(*found.ignored, *ignored(str(folder), others)))


def _from_file(path: Path, options: Options) -> ImageDataset:
    where = printable(path)
    suffix = path.suffix.lower()
    _require_no_table(options, str(path), columns=suffix in (".npz", *SHARD_SUFFIXES))
    if suffix == ".npz":
        images, values, names, told = read_npz(path, labels=options.labels, label_column=options.label_column)
        return replace(dataset_from_arrays(images, values, names, where, options), ignored=told)
    if suffix == ".npy":
        return read_array_file(path, None, None, options, where=where)
    if suffix in SHARD_SUFFIXES:
        return build(find_files([path], where, options), options)
    if "idx" in path.name.lower() or "ubyte" in path.name.lower() or is_idx(path):
        images, values = read_idx_pair(path, labels=options.labels)
        return dataset_from_arrays(images, values, None, where, options)
    advice = f"give {_KINDS}"
    if suffix in (".zip", ".gz", ".tgz", ".7z", ".zst"):
        advice = "unpack it and give what is in it"
    elif suffix in IMAGE_SUFFIXES:
        advice = "give the folder that the images are in"
    raise DataError(f"{where}: files of this kind are not read; {advice}.")


def _from_tuple(arrays: Sequence[Any], options: Options) -> ImageDataset:
    if len(arrays) not in (2, 3):
        raise ConfigError(f"arrays must come as a pair (images, labels or None), not {len(arrays)} items.")
    images, values, names = (*arrays, None)[:3]
    values = as_array(values) if options.labels and values is not None else None
    first = images[0] if isinstance(images, list | tuple) and len(images) else None
    if isinstance(first, str | bytes | os.PathLike) or hasattr(first, "getexif") or hasattr(first, "__array__"):
        source = f"a list of {len(images):,} images"
    else:
        images = as_array(images)
        source = f"arrays of shape {list(images.shape)}"
    return dataset_from_arrays(images, values, names if options.labels else None, source, options)


def _not_found(path: Path, text: str) -> str:
    near: list[str] = []
    with suppress(OSError, ValueError):  # a parent that cannot be listed, or named, has no suggestions to offer
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1, cutoff=0.7)
    hint = f"Did you mean {printable(path.parent / near[0])}? " if near else ""
    return f"{printable(path)!r} is neither a file or folder nor a named set. {hint}{suggest(text)}"


def whole_source(source: str) -> str:
    """A source that means the same in any working folder: an absolute path, or a named set with its split."""
    path = expanded(source)
    named = None if path.exists() else parse_name(source)
    if any(c in source for c in "*?[{") and not (path.exists() or path.is_absolute()):
        return os.path.join(glob.escape(os.getcwd()), path)  # the folder's own name is no part of the pattern
    return str(path.absolute()) if source and named is None else ":".join(named or ())


def with_whole_paths(d: Data) -> Data:
    """The settings with absolute paths of the images, their labels and their cache, for later sessions, which may begin
    in another working folder.
    """
    labels = str(expanded(d.labels).absolute()) if isinstance(d.labels, str) else d.labels
    cache = d.cache if d.cache == "auto" else str(expanded(d.cache).absolute())
    return d.model_copy(update={"source": whole_source(d.source), "labels": labels, "cache": cache})


def load_private(
    source: Source,
    config: Config,
    on_progress: Callable[[int, int], None] | None = None,
    groups: PathLike | None = None,
) -> ImageDataset:
    """The private images as the section ``data`` of `config` asks for them; an ImageDataset is taken as it is.

    `groups` is the table of persons, of the images that are trained on.
    """
    if isinstance(source, ImageDataset):
        return source
    asked: dict[str, Any] = {"groups": groups, "beside": config.privacy.groups}
    asked |= config.data.model_dump(exclude={"source", "records"})
    if config.data.frames == "all":
        asked["group_size"] = None if config.privacy.most_per_person else config.privacy.group_size
    return load_images(source, **asked, on_progress=on_progress)


def load_named_or_given(
    data: Source | None, config: Config, on_reading: Callable[[int, int], None] | None = None
) -> ImageDataset:
    """The images that were given, or else those that the configuration names."""
    source = config.data.source if data is None else data
    if isinstance(source, str) and not source:
        raise ConfigError(
            "no images were given: use --data with a folder, a file or a named set.  A run that was started from "
            "arrays in memory needs the same images again as data."
        )
    if isinstance(source, ImageDataset):
        asked, colour = config.data, {1: "grey", 3: "rgb"}[source.channels]
        for name, has in (("resolution", source.resolution), ("channels", colour)):
            value = getattr(asked, name)
            require(value in (None, "auto", has), f"data.{name}", value, f"{has}, which the data set has, or left out")
    return load_private(source, config, on_reading, config.privacy.groups)


@contextmanager
def said_of_a_run(given: object) -> Iterator[None]:
    """Where a run's images cannot be read and none are `given`, say that they may have moved."""
    try:
        yield
    except DataError as error:
        if given is not None:
            raise
        raise DataError(f"{error}  They are those of the run: if they have moved, say where with --data.") from error


def with_persons(source: Any, groups: Any, config: Config) -> Any:
    """A source with whose image each is, from what a user holds: an array ``[N]`` for images in memory.  A table of
    persons is read with the files that it names.
    """
    if groups is None or isinstance(groups, str | os.PathLike):
        return source
    if isinstance(source, str | os.PathLike):
        raise ConfigError("for files, groups is the path of a table of file names and persons, not an array.")
    return load_private(source, config).with_persons(groups)


def as_source(images: Any, labels: Any, class_names: Sequence[str] | None) -> Any:
    """A source for :func:`load_images` from what a user holds.

    Args:
        images: arrays, PyTorch tensors, lists of images in any form; or a folder, file, named set or data set.
        labels: for arrays: one an image, numbers or names; None: no classes.
        class_names: names for labels 0, 1, …; None: the labels themselves.
    """
    if not (isinstance(images, list) or hasattr(images, "__array__")):
        if labels is not None or class_names is not None:
            raise ConfigError(
                "labels and class_names go with arrays of images only; a folder, file or data set has classes of its "
                "own (settings={'data': {'labels': False}} leaves them out)."
            )
        return images
    if class_names is not None and labels is None:
        raise ConfigError("class_names are names for labels 0, 1, …, but there are no labels.")
    return images, labels, None if class_names is None else list(class_names)
