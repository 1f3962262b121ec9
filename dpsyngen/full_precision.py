"""Modes of the process: those that our work needs, and where numbers must be computed in fp32.

Two things make products of fp32 tensors coarser than fp32: autocast, which casts their inputs to bf16 (8 bits of
significand), and TF32, which rounds them to 11 bits.  On an NVIDIA GPU from Ampere on PyTorch allows TF32 in
convolutions by default.  Neither harms the inside of a network much; both would void a clipping bound, and spoil
moments that are exact on paper.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TextIO, TypeVar

import numpy as np
import torch
from torch import Tensor

_P = ParamSpec("_P")
_T = TypeVar("_T")

_Setting = dict[str, Any]
# "matmul" and "cudnn": PyTorch's older switches.  "each": the newer ones of single operations (2.9), which count alone
# where the surrounding program has used them: PyTorch then refuses to report the older ones.


def _operations() -> Iterator[tuple[str, Any]]:
    """Objects with ``fp32_precision``."""
    for backend, name in (("cuda", "matmul"), ("cudnn", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv")):
        operation = getattr(getattr(torch.backends, backend), name, None)
        with contextlib.suppress(AttributeError, RuntimeError):
            str(operation.fp32_precision)  # type: ignore[union-attr]
            yield f"{backend}.{name}", operation


def _read() -> _Setting:
    each = {name: str(operation.fp32_precision) for name, operation in _operations()}
    try:
        return {"matmul": torch.get_float32_matmul_precision(), "cudnn": torch.backends.cudnn.allow_tf32, "each": each}
    except RuntimeError:
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
    of_cpu = {name: "ieee" for name in now["each"] if name.startswith("mkldnn")}
    if "matmul" not in now:
        return {"each": dict.fromkeys(now["each"], "tf32" if tf32 else "ieee") | of_cpu}
    coarse = {name: ieee for name, ieee in of_cpu.items() if now["each"][name] not in ("none", "ieee")}
    return {"matmul": "high" if tf32 else "highest", "cudnn": tf32, "each": coarse}


_products = threading.Lock()
_exact = 0  # threads that need fp32 now
_later: _Setting = {}  # what the process gets when there are none any more


def _put(setting: _Setting) -> None:
    global _later
    if _exact:
        _later = setting
    else:
        _write(setting)


@contextlib.contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Within, products of fp32 tensors are fp32: no autocast on `device` ("cuda", …) in this thread, no TF32 at all.

    The process has one setting, shared by threads.  Several may be inside at the same time, and exactness wins: whoever
    allows TF32 through :func:`tf32` meanwhile gets it when the last of them has left.
    """
    global _exact, _later
    with _products:
        if _exact == 0:
            _later = _read()
            _write(_asked_for(_later, tf32=False))
        _exact += 1
    try:
        off = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if off else contextlib.nullcontext():
            yield
    finally:
        with _products:
            _exact -= 1
            _put(_later)


def in_full_precision(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorates a function of tensors that is computed in :func:`full_precision`, on whichever device they are."""

    @functools.wraps(function)
    def exact(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.compiler.is_compiling():  # tracing, where modes of the process are not to be changed
            return function(*args, **kwargs)
        devices = [v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        with full_precision(next((d for d in devices if d != "cpu"), "cpu")):
            return function(*args, **kwargs)

    return exact


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within, fp32 products on an NVIDIA GPU may use TF32, or must not, in the whole process; then as before."""
    with _products:
        before = _later if _exact else _read()
        _put(_asked_for(before, allowed))
    try:
        yield
    finally:
        with _products:
            _put(before)


_modes = threading.Lock()
_inside = 0  # calls of ours, in all threads
_callers: tuple[torch.dtype, int, TextIO | None]  # modes of the process before the first of them
_PROCESS = os.getpid()


@contextlib.contextmanager
def ordinary_modes() -> Iterator[None]:
    """Within, PyTorch has the modes that it is imported with; then the caller's are restored.  Also a decorator.

    That is: gradients, no inference mode, no autocast, new tensors on the CPU in float32, no insistence on
    deterministic algorithms (which some layers lack), and a standard error to write to.  Default type, determinism and
    standard error are the whole process's, and come back when the last call in any thread ends.  In a process that was
    forked PyTorch gets one thread, and keeps it: it would wait for its parent's threads.
    """
    global _inside, _callers
    if os.getpid() != _PROCESS and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    with _modes:
        if _inside == 0:
            _callers = torch.get_default_dtype(), torch.get_deterministic_debug_mode(), sys.stderr
            # Libraries take for granted that there is a standard error.
            _set_modes(torch.float32, 0, _nowhere() if sys.stderr is None else sys.stderr)
        _inside += 1
    try:
        with contextlib.ExitStack() as stack:
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
            yield
    finally:
        with _modes:
            _inside -= 1
            if _inside == 0:
                dtype, deterministic, stderr = _callers
                _set_modes(dtype, deterministic, stderr if sys.stderr is _nowhere() else sys.stderr)


@functools.cache
def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _set_modes(dtype: torch.dtype, deterministic: int, stderr: TextIO | None) -> None:
    sys.stderr = stderr
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)
    if torch.get_deterministic_debug_mode() != deterministic:
        torch.set_deterministic_debug_mode(deterministic)


def _after_fork() -> None:
    """In a forked process other threads, and with them their calls and what they held, are gone."""
    global _modes, _products
    _modes, _products = threading.Lock(), threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
