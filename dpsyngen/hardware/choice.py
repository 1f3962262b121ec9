"""The rules by which a device, a precision and a memory format are chosen, each with its reason."""

from __future__ import annotations

from typing import cast

import torch

from dpsyngen.config import ComputeConfig
from dpsyngen.errors import ConfigError, shown
from dpsyngen.hardware.compute import Compute, Precision
from dpsyngen.hardware.facts import Facts, Gpu, find

_ASKED = "asked for"
_WARM_UP = 200
"""Calls of a network before it is compiled, where nobody asked: some batches of images, or the first training steps."""


def kind_of(device: str) -> str:
    """A device as commands pass it on: "auto" becomes "cuda" or "cpu", anything else stays.

    Which GPU a process gets may depend on the processes beside it, so that is left to :func:`choose`.
    """
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(device: str = "auto", compute: ComputeConfig | None = None, *, local_rank: int | None = None) -> Compute:
    """How to compute on this machine.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ….
        compute: what was asked for; None: all automatic.
        local_rank: number of this process on its machine, where several work together: that of its GPU.

    Raises:
        ConfigError: the device is not there, or cannot do what was asked for.
    """
    chosen = decide(device, compute or ComputeConfig(), find(), local_rank)
    if chosen.kind == "cuda":
        try:
            torch.zeros(1, device=chosen.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device {chosen.device} is there, but cannot be used ({str(error).strip().splitlines()[0]}).  Another "
                "program may be on it, or its driver too old for this PyTorch: `dpsyngen doctor` shows versions, and "
                "--device cpu does without."
            ) from None
    return chosen


def decide(device: str, asked: ComputeConfig, facts: Facts, local_rank: int | None = None) -> Compute:
    """:func:`choose` by facts that are given."""
    name, why, gpu = _device(device, facts, local_rank)
    allowed = _allowed(gpu, facts)
    precision, why_precision = _precision(asked.precision, gpu, facts)
    if precision not in allowed:
        needed = "" if gpu is None else " (the others need an NVIDIA GPU of compute capability 8.0, Ampere, or later)"
        raise ConfigError(
            f"compute.precision is {precision}, but {_called(name, gpu)} has {', '.join(allowed)} only{needed}.  Leave "
            "it at auto."
        )
    dp_precision, why_dp = _dp_precision(asked.precision, allowed, gpu)
    last, why_last = _channels_last(asked.channels_last, precision, gpu)
    compile_, why_compile = _compile(asked.compile, gpu, facts)
    return Compute(
        device=name,
        precision=precision,
        channels_last=last,
        compile=compile_,
        allowed=allowed,
        dp_precision=dp_precision,
        dp_channels_last=asked.channels_last is True,
        compile_after=0 if asked.compile is True else _WARM_UP,
        reasons={
            "device": why,
            "precision": why_precision,
            "channels_last": why_last,
            "compile": why_compile,
            "dp_precision": why_dp,
            "dp_channels_last": _ASKED
            if asked.channels_last is True
            else "the engine takes batches apart by example, which the plain layout suits",
            "dp_compile": "per-example gradients come from the functions that a network calls; compiled code has none",
        },
    )


# ---------------------------------------------------------------------------------------------------- device


def _device(device: str, facts: Facts, local_rank: int | None) -> tuple[str, str, Gpu | None]:
    """Name, reason, and the GPU if it is one."""
    if device == "auto":
        if not facts.gpus:
            return "cpu", _no_gpu(facts), None
        number = _number_of(local_rank, None, facts)
        gpu = facts.gpus[number]
        return f"cuda:{number}", f"{gpu.name}, {gpu.architecture}, {gpu.memory / 2**30:.0f} GiB", gpu
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device is {shown(device)}, but must be {_choices(facts)}.") from None
    if parsed.type == "cpu":
        return "cpu", _ASKED, None
    if parsed.type == "mps":
        raise ConfigError(
            "device is 'mps', which has no fp64: noise levels, and the norms that bound one image's gradient, need "
            "it.  Use --device cpu on this machine."
        )
    if parsed.type != "cuda":
        raise ConfigError(f"device is {shown(device)}, but must be {_choices(facts)}.")
    if not facts.gpus:
        raise ConfigError(
            f"device is {shown(device)}, which this machine cannot use: {_no_gpu(facts)}.  Choose {_choices(facts)}."
        )
    number = _number_of(local_rank, parsed.index, facts)
    return (
        f"cuda:{number}",
        _ASKED if local_rank is None else f"{_ASKED}; process {local_rank} of this machine",
        (facts.gpus[number]),
    )


def _number_of(local_rank: int | None, index: int | None, facts: Facts) -> int:
    there = len(facts.gpus)
    if local_rank is not None and local_rank >= there:
        raise ConfigError(
            f"this machine has {there} GPU{'s' if there > 1 else ''}, but a process number {local_rank} (from 0) was "
            f"started on it: use --nproc-per-node {there}, or --device cpu."
        )
    if local_rank is not None and index is not None and index != local_rank:
        raise ConfigError(
            f"device is 'cuda:{index}', but with several processes each takes the GPU of its own number: use "
            "--device cuda."
        )
    number = index if index is not None else local_rank or 0
    if number >= there:
        raise ConfigError(f"device is 'cuda:{number}', but must be {_choices(facts)}.")
    return number


def _no_gpu(facts: Facts) -> str:
    if facts.built_for == "cpu":
        return "this PyTorch is built for CPUs only, so it would not see a GPU"
    return "no GPU that PyTorch can use was found"


def _choices(facts: Facts) -> str:
    gpus = [f"cuda:{i}" for i in range(len(facts.gpus))]
    return " or ".join(["auto", "cpu", *(["cuda"] if gpus else []), *gpus])


def _called(device: str, gpu: Gpu | None) -> str:
    return f"the {device.partition(':')[0].upper()}" if gpu is None else f"{gpu.name} ({gpu.architecture})"


# ------------------------------------------------------------------------------------------------- precision


def _modern(gpu: Gpu | None, facts: Facts) -> bool:
    """Whether it has the units for TF32 and bf16.  AMD's numbers mean other things."""
    return gpu is not None and facts.built_for == "cuda" and gpu.capability >= (8, 0)


def _allowed(gpu: Gpu | None, facts: Facts) -> tuple[Precision, ...]:
    if gpu is None:
        return ("fp32", "bf16")
    return ("fp32", "tf32", "bf16") if _modern(gpu, facts) else ("fp32",)


def _precision(asked: str, gpu: Gpu | None, facts: Facts) -> tuple[Precision, str]:
    if asked != "auto":
        return cast(Precision, asked), _ASKED
    if gpu is None:
        return (
            "fp32",
            "on a CPU results stay the same bits; bf16 pays only on CPUs with units for it (docs/hardware.md)",
        )
    if _modern(gpu, facts):
        return (
            "bf16",
            f"{gpu.architecture} has fast units for it, and drawing and public training tolerate its rounding",
        )
    if facts.built_for == "rocm":
        return "fp32", "an AMD GPU: nothing else was tried there"
    return "fp32", f"{gpu.architecture} has no units for bf16 or TF32; they begin with 8.0 (Ampere)"


def _dp_precision(asked: str, allowed: tuple[Precision, ...], gpu: Gpu | None) -> tuple[Precision, str]:
    inside = "; norms and clipped sums are fp32 whatever is chosen"
    if asked != "auto":
        return cast(Precision, asked), _ASKED + inside
    if "tf32" in allowed:
        return "tf32", "products inside the network only, with the range of fp32: no loss scaling" + inside
    return "fp32", "no TF32 here" if gpu is not None else "as on any CPU"


# ------------------------------------------------------------------------------------------ format and compiling


def _channels_last(asked: object, precision: Precision, gpu: Gpu | None) -> tuple[bool, str]:
    if asked != "auto":
        return bool(asked), _ASKED
    if gpu is None:
        return False, "on a CPU results stay the same bits; it gains little there (docs/hardware.md)"
    if precision == "fp32":
        return False, "it pays with tensor cores, which fp32 does not use"
    return True, "the layout of tensor cores: no transposing around each convolution"


def _compile(asked: object, gpu: Gpu | None, facts: Facts) -> tuple[bool, str]:
    if asked is False:
        return False, _ASKED
    if gpu is None:
        if not asked or asked == "auto":
            return (
                False,
                "on a CPU results stay the same bits, and compiling costs more than most runs gain (docs/hardware.md)",
            )
        if facts.compiler is None:
            raise ConfigError(
                "compute.compile is true, but there is no C++ compiler on this machine: install g++ or clang++, set "
                "CXX, or leave compute.compile at auto."
            )
        return True, _ASKED
    if not facts.triton or gpu.capability < (7, 0):
        what = "Triton is not installed" if not facts.triton else f"{gpu.architecture} is below 7.0, which Triton needs"
        if asked is True:
            raise ConfigError(f"compute.compile is true, but {what}.  Leave compute.compile at auto.")
        return False, what
    if asked is True:
        return True, _ASKED
    return (
        True,
        f"small layers are fused into few kernels; from call {_WARM_UP + 1} of a network on, as compiling takes time",
    )


def check_device(device: str, compute: ComputeConfig | None = None) -> None:
    """Raise ConfigError if this machine cannot compute on `device`, or not as `compute` asks; see
    :func:`dpsyngen.hardware.choose`.
    """
    choose(device, compute)
