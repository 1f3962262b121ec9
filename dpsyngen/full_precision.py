"""Where numbers must be computed in fp32 whatever the machine would rather do.

Two things make matrix products and convolutions of fp32 tensors coarser than fp32: autocast, which casts their inputs
to bf16 (8 bits of significand), and TF32, which rounds them to 11 bits.  On an NVIDIA GPU from Ampere on TF32 is on for
convolutions unless it is turned off.  Neither harms the inside of a network much; both would void a clipping bound, and
spoil moments that are exact on paper.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

# What is asked of the products: the precision of matrix products, whether convolutions may use TF32.  In PyTorch's own
# words, or, where the program that we are part of uses the newer names, the precision of each operation.
_Setting = dict[str, Any]
_OPERATIONS = (("cuda", "matmul"), ("cudnn", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))


def _operations() -> Iterator[tuple[str, Any]]:
    """Objects with ``fp32_precision``, for PyTorch from 2.9 on."""
    for backend, name in _OPERATIONS:
        operation = getattr(getattr(torch.backends, backend), name, None)
        if operation is not None:
            with contextlib.suppress(AttributeError, RuntimeError):
                str(operation.fp32_precision)
                yield f"{backend}.{name}", operation


def _read() -> _Setting:
    each = {name: str(operation.fp32_precision) for name, operation in _operations()}
    try:
        return {"matmul": torch.get_float32_matmul_precision(), "cudnn": torch.backends.cudnn.allow_tf32, "each": each}
    except RuntimeError:  # set by the newer names, which PyTorch does not say in the older ones
        return {"each": each}


def _write(setting: _Setting) -> None:
    if "matmul" in setting:
        torch.set_float32_matmul_precision(setting["matmul"])
        torch.backends.cudnn.allow_tf32 = setting["cudnn"]
    for name, operation in _operations():
        value = setting["each"].get(name)
        if value is not None and str(operation.fp32_precision) != value:
            operation.fp32_precision = value


def _asked_for(now: _Setting, tf32: bool) -> _Setting:
    """Like `now`, but with TF32 for all operations of an NVIDIA GPU, or for none."""
    each = {
        name: "tf32" if tf32 and not name.startswith("mkldnn") else "ieee"
        for name, value in now["each"].items()
        if "matmul" not in now or (name.startswith("mkldnn") and value not in ("none", "ieee"))
    }
    if "matmul" not in now:
        return {"each": each}
    return {"matmul": "high" if tf32 else "highest", "cudnn": tf32, "each": each}


class _Products:
    """The setting of the process, which has only one, shared by threads that need different things of it.

    Exactness wins: while any thread needs it, what others ask for is kept for later.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exact = 0  # threads that need fp32
        self._later: _Setting = {}

    def begin_exact(self) -> None:
        with self._lock:
            if self._exact == 0:
                self._later = _read()
                _write(_asked_for(self._later, tf32=False))
            self._exact += 1

    def end_exact(self) -> None:
        with self._lock:
            self._exact -= 1
            if self._exact == 0:
                _write(self._later)

    def ask(self, tf32: bool) -> _Setting:
        """Allow TF32 or forbid it; returns what was before."""
        with self._lock:
            before = self._later if self._exact else _read()
            self._put(_asked_for(before, tf32))
            return before

    def give_back(self, setting: _Setting) -> None:
        with self._lock:
            self._put(setting)

    def _put(self, setting: _Setting) -> None:
        if self._exact:
            self._later = setting
        else:
            _write(setting)


_products = _Products()


@contextlib.contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Within, products of fp32 tensors are fp32: no autocast on `device` in this thread, no TF32 in the process.

    Args:
        device: type of the device that is computed on, such as "cuda".

    Threads may be inside of it at the same time.  Whoever allows TF32 through :func:`tf32` meanwhile gets it when the
    last of them has left.
    """
    _products.begin_exact()
    try:
        off = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if off else contextlib.nullcontext():
            yield
    finally:
        _products.end_exact()


def in_full_precision(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorates a function of tensors that is computed in :func:`full_precision`, on whichever device they are."""

    @functools.wraps(function)
    def exact(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.compiler.is_compiling():  # tracing, where modes of the process are not to be changed
            return function(*args, **kwargs)
        devices = [v.device.type for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        with full_precision(next((d for d in devices if d != "cpu"), "cpu")):
            return function(*args, **kwargs)

    return exact


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within, fp32 products on an NVIDIA GPU may use TF32, or must not; what was before is restored.

    For the whole process, as PyTorch has it.
    """
    before = _products.ask(allowed)
    try:
        yield
    finally:
        _products.give_back(before)


def tf32_allowed() -> tuple[bool, bool]:
    """Whether (matrix products, convolutions) of fp32 tensors may use TF32 now."""
    now = _read()
    if "matmul" in now:
        return now["matmul"] != "highest", bool(now["cudnn"])
    return now["each"].get("cuda.matmul") == "tf32", now["each"].get("cudnn.conv") == "tf32"
