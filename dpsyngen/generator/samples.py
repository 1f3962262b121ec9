"""Writing generated images: PNGs in class folders with a metadata.csv, one .npz, or one .parquet.

Hugging Face ``datasets`` opens the folder ("imagefolder") and the Parquet file as they are.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import RunError
from dpsyngen.files import require_absent_or_empty, write_atomically, write_text
from dpsyngen.programs.saving import png, require_parquet

_TAKEN = ("metadata.csv", "about.json")  # files beside the class folders
_FILES = (".npz", ".parquet")
_LONGEST = 200  # bytes of a folder name; file systems allow 255


def check_target(out: Path) -> None:
    """Raise RunError if writing to `out` would overwrite anything, ConfigError if what it needs is not installed."""
    if out.suffix == ".parquet":
        require_parquet()
    if out.suffix in _FILES:
        if out.exists():
            raise RunError(f"--out {out} exists already.  Choose another path or move it away.")
        return
    require_absent_or_empty(out, "--out")
    if not out.name:
        raise RunError(f"--out {out} has no name of its own, so it cannot appear whole.  Give a new folder in it.")


def folder_names(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """A folder name for each class: the class name where that is a safe file name, distinct on any file system.

    Some file systems take "A" and "a", or two spellings of one accent, for the same.
    """
    out: list[str] = []
    taken = set(_TAKEN)
    for number, name in enumerate(class_names):
        safe = re.sub(r"[^\w .+-]", "_", name).strip(" .")
        safe = safe.encode()[:_LONGEST].decode(errors="ignore").strip(" .")
        while not safe or _folded(safe) in taken:
            safe = f"{number}_{safe}".rstrip("_")
        out.append(safe)
        taken.add(_folded(safe))
    return tuple(out)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def write_samples(
    out: Path,
    batches: Iterable[NDArray[np.uint8]],
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...],
    about: dict[str, Any],
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write images to `out`: a ``.npz`` or ``.parquet`` file, or else a folder; it appears whole or not at all.

    Args:
        out: must not exist (or be an empty folder).
        batches: uint8 [n, C, H, W] each.
        labels: class of each image, or None.
        class_names: names of the classes.
        about: provenance, written beside the images: ``about.json``, where the names of the classes are, too; the array
            ``about`` of a ``.npz``; the key ``about`` of a Parquet file's metadata.
        on_progress: called with the number of images written so far.
    """
    check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        _write_npz(out, batches, labels, class_names, about, on_progress)
    elif out.suffix == ".parquet":
        _write_parquet(out, batches, labels, class_names, about, on_progress)
    else:
        _write_folder(out, batches, labels, class_names, about, on_progress)


def _write_npz(
    out: Path,
    batches: Iterable[NDArray[np.uint8]],
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...],
    about: dict[str, Any],
    on_progress: Callable[[int], None] | None,
) -> None:
    collected: list[NDArray[np.uint8]] = []
    for batch in batches:
        collected.append(batch)
        if on_progress:
            on_progress(sum(map(len, collected)))
    arrays: dict[str, Any] = {"images": np.concatenate(collected), "about": json.dumps(about)}
    if labels is not None:
        arrays |= {"labels": labels, "class_names": np.array(class_names)}

    def write(path: Path) -> None:
        with open(path, "wb") as f:
            np.savez_compressed(f, **arrays)

    write_atomically(out, write)


def _write_parquet(
    out: Path,
    batches: Iterable[NDArray[np.uint8]],
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...],
    about: dict[str, Any],
    on_progress: Callable[[int], None] | None,
) -> None:
    """A row group for each batch; columns ``image`` and, with classes, ``label``, in the form of ``datasets``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    columns = [("image", image)]
    if labels is not None:
        features["label"] = {"names": list(class_names), "_type": "ClassLabel"}
        columns.append(("label", pa.int64()))
    notes = {"huggingface": json.dumps({"info": {"features": features}}), "about": json.dumps(about)}
    schema = pa.schema(columns, metadata=notes)

    def write(path: Path) -> None:
        number = 0
        with pq.ParquetWriter(path, schema, compression="none") as file:  # PNG is compressed
            for batch in batches:
                rows = range(number, number + len(batch))
                named = [{"bytes": png(x), "path": f"{n:07d}.png"} for n, x in zip(rows, batch, strict=True)]
                values = [pa.array(named, image)]
                if labels is not None:
                    values.append(pa.array(labels[rows.start : rows.stop], pa.int64()))
                file.write_table(pa.table(values, schema=schema))
                number = rows.stop
                if on_progress:
                    on_progress(number)

    write_atomically(out, write)


def _write_folder(
    out: Path,
    batches: Iterable[NDArray[np.uint8]],
    labels: NDArray[np.int64] | None,
    class_names: tuple[str, ...],
    about: dict[str, Any],
    on_progress: Callable[[int], None] | None,
) -> None:
    from PIL import Image

    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        folders = folder_names(class_names)
        # Only those with images: a folder without any is refused when the samples are read back.
        for present in () if labels is None else np.unique(labels).tolist():
            (partial / folders[present]).mkdir()
        number = 0
        with open(partial / "metadata.csv", "w", newline="", encoding="utf-8") as f:
            table = csv.writer(f)
            table.writerow(["file_name", *(["label", "class_name"] if labels is not None else [])])
            for batch in batches:
                for pixels in batch:
                    name = f"{number:07d}.png"
                    row: list[Any] = [name]
                    if labels is not None:
                        label = int(labels[number])
                        name = f"{folders[label]}/{name}"
                        row = [name, label, class_names[label]]
                    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
                    image.save(partial / name)
                    table.writerow(row)
                    number += 1
                if on_progress:
                    on_progress(number)
        names = {} if labels is None else {"class_names": list(class_names)}
        write_text(partial / "about.json", json.dumps(about | names, indent=1, ensure_ascii=False) + "\n")
        if out.is_dir():
            out.rmdir()  # empty, as checked
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
