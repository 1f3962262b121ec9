"""Arrays on their way to a device."""

from __future__ import annotations

import numpy as np
import torch

from dpsyngen import transfer
from dpsyngen.transfer import send


def test_arrays_may_be_overwritten_once_they_were_sent() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    sent = send(array, "cpu")
    array[:] = 0
    assert sent.tolist() == np.arange(12).reshape(3, 4).tolist()
    sent += 1  # nor the other way round
    assert array.max() == 0
    assert send(array, "cpu", torch.float32).dtype is torch.float32
    array.flags.writeable = False
    assert send(array[::-1, ::2], "cpu").shape == (3, 2)  # read-only, and no layout that PyTorch has
    assert send(np.zeros((0, 3), np.int64), "cpu").shape == (0, 3)


def test_arrays_for_a_gpu_go_through_page_locked_copies(monkeypatch) -> None:
    real, locked = torch.empty, []

    def empty(*args: object, pin_memory: bool = False, **kwargs: object) -> torch.Tensor:
        locked.append(pin_memory)
        return real(*args, **kwargs)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(transfer.torch, "empty", empty)
    array = np.arange(6, dtype=np.int64)[::-2]
    out = transfer.locked(array)
    assert locked == [True]
    assert out.tolist() == [5, 3, 1]
    assert not np.shares_memory(out.numpy(), array)
