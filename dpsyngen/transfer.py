"""From the memory of the machine to a device, without waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def send(array: NDArray[Any], device: str | torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The array on the device.  It may be overwritten as soon as this returns.

    On a GPU it goes through page-locked memory and travels while the CPU goes on; kernels that use it wait for it.
    PyTorch gives that memory to no one else before the array has arrived.

    Args:
        array: of any layout, read-only or not.
        device: where to.
        dtype: of the result; None: that of the array.  Converted on the device, so that bytes travel as bytes.
    """
    if torch.device(device).type == "cuda":
        there = locked(array).to(device, non_blocking=True)
    else:
        there = torch.from_numpy(np.array(array)).to(device)
    return there if dtype is None else there.to(dtype)


def locked(array: NDArray[Any]) -> Tensor:
    """A copy of the array in page-locked memory, on a machine with a GPU."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    out = torch.empty(array.shape, dtype=dtype, pin_memory=True)
    np.copyto(out.numpy(), array)
    return out
