"""A folder of arrays, as it is written: ``images.npy``, ``labels.npy`` and ``class_names.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpsyngen.files import write_atomically, write_text

IMAGES, LABELS, CLASS_NAMES = "images.npy", "labels.npy", "class_names.json"
HEADER_BYTES = 128


def write_at(descriptor: int, images: NDArray[np.uint8], offset: int) -> None:
    """Write contiguous images at this offset of a file."""
    data = images.reshape(-1).data
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def write_labels(folder: Path, labels: NDArray[np.int64], class_names: tuple[str, ...]) -> None:
    """Write ``labels.npy`` and ``class_names.json``, mode 0600, as a folder of arrays has them."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.save(file, labels, allow_pickle=False)

    write_atomically(folder / LABELS, write, 0o600)
    write_text(folder / CLASS_NAMES, json.dumps(class_names, ensure_ascii=False), 0o600)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Header of a ``.npy`` file of uint8, always of 128 bytes, so that N can be written anew in place."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}"
    return (
        b"\x93NUMPY\x01\x00"
        + (HEADER_BYTES - 10).to_bytes(2, "little")
        + text.ljust(HEADER_BYTES - 11).encode()
        + b"\n"
    )
