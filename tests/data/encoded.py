"""Sources of encoded images for tests, written by means of their own: tarfile, pyarrow, json."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def pixels(count: int, side: int = 16, seed: int = 0) -> np.ndarray:
    """Random grey images, uint8 [count, side, side]."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], layout: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file; its times of change are fractions, which pax headers hold, as WebDataset's own writer makes them."""
    with tarfile.open(path, "w", format=layout) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), time.time()
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(images: np.ndarray, labels: Sequence[Any] | None = None, first: int = 0) -> list[tuple[str, bytes]]:
    """Members of a WebDataset: 000000.png, and 000000.cls if there are labels."""
    out = []
    for i, image in enumerate(images):
        out.append((f"{first + i:06}.png", png(image)))
        if labels is not None:
            out.append((f"{first + i:06}.cls", str(labels[i]).encode()))
    return out


def table(
    images: Sequence[bytes | None], labels: Sequence[Any] | None = None, names: Sequence[str] | None = None
) -> Any:
    """An Arrow table as Hugging Face datasets makes it."""
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array([{"bytes": data, "path": "/etc/passwd"} for data in images], type=kind)}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels)
    if names is not None:
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    return pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(path: Path, data: Any, rows: int = 10) -> Path:
    import pyarrow.parquet as pq

    pq.write_table(data, path, row_group_size=rows)
    return path


def write_saved(folder: Path, parts: Sequence[Any]) -> Path:
    """A folder as save_to_disk writes it, one file for each table."""
    import pyarrow as pa

    folder.mkdir()
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as writer:
            writer.write_table(part, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder
