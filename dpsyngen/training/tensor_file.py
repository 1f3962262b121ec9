"""Writing safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in place.

    The library's own ``save_file`` goes through a temporary file of its own, which a killed process leaves behind, and
    tells of a full disk as a SafetensorError.

    Raises:
        OSError: the disk is full, read-only, …
    """
    # Convolutions may have their channels last in memory (docs/hardware.md); files never do.
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
