"""What a machine has, and how it is used: device, precision, memory format, compiling, transfer.

Nothing here changes a guarantee: whatever is chosen, gradients are clipped and summed in fp32
(:mod:`dpsyngen.full_precision`).
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsyngen.config import ComputeConfig
from dpsyngen.distributed import Ranks
from dpsyngen.errors import ConfigError, require, shown
from dpsyngen.files import memory_bytes, proc
from dpsyngen.full_precision import tf32
from dpsyngen.version import __version__

Precision = Literal["fp32", "tf32", "bf16"]

# ------------------------------------------------------------------------------------------------ what there is


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, CUDA compute capability ((8, 0) is Ampere) and memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def architecture(self) -> str:
        """Such as "compute capability 8.0"."""
        return f"compute capability {self.capability[0]}.{self.capability[1]}"


@dataclass(frozen=True)
class Facts:
    """What a choice rests on."""

    gpus: tuple[Gpu, ...]  # that CUDA sees, by number
    built_for: str  # "cuda", "rocm" or "cpu": what this PyTorch was built for


def find() -> Facts:
    """The facts of this machine, as PyTorch and the driver of its GPUs state them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(number) for number in range(count)]
    built_for = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
    return Facts(tuple(Gpu(p.name, (p.major, p.minor), p.total_memory) for p in gpus), built_for)


# ------------------------------------------------------------------------------------------------- what is chosen


@dataclass(frozen=True)
class Compute:
    """How one process computes, made by :func:`choose`.

    DP-SGD steps compute by :meth:`for_dp_steps`, and so do public steps on a network that DP-SGD steps train as well.
    """

    device: str  # "cpu" or "cuda:0", …
    precision: Precision  # of a network's products: tf32 rounds factors to 11 bits of significand, bf16 (autocast) to 8
    channels_last: bool  # images lie in memory with their channels innermost
    compile: bool  # networks are compiled
    reasons: dict[str, str] = field(hash=False)  # why, by the names of the other attributes
    allowed: tuple[Precision, ...] = ("fp32",)  # what this device has

    @property
    def kind(self) -> str:
        """The device without its number: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    def for_dp_steps(self) -> Compute:
        """The same, never compiled.

        The engine learns per-example gradients from the functions that a network calls
        (``dpsyngen.privacy.rules.Recorder``, a TorchFunctionMode), and compiled code calls none.
        """
        return replace(self, compile=False)

    def pins(self) -> dict[str, Any]:
        """What must be the same when a step is taken again, as it rounds sums; for :meth:`pinned`."""
        return {"device": self.kind, "precision": self.precision, "channels_last": self.channels_last}

    def pinned(self, pins: dict[str, Any]) -> Compute:
        """Compute as an earlier session, of these :meth:`pins`, did; ConfigError if this machine cannot."""
        if self.pins() == pins:
            return self
        device, precision, channels_last = pins.get("device"), pins.get("precision"), pins.get("channels_last")
        if device != self.kind:
            raise ConfigError(
                f"it computed on {device!r}, and this session would on {self.kind!r}: use --device {device}"
            )
        if precision not in self.allowed or not isinstance(channels_last, bool):
            raise ConfigError(
                f"it computed in {precision!r}, but {self.device} here has {', '.join(self.allowed)} only: go on with "
                "a device like the one that it was begun on"
            )
        why = "as in the run's first session: steps that are taken again must round the same way"
        changed = {k: why for k in ("precision", "channels_last") if getattr(self, k) != pins[k]}
        return replace(self, precision=precision, channels_last=channels_last, reasons=self.reasons | changed)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move a module, before optimizers and averages are made, to the device and memory format (images follow)."""
        module = module.to(self.device)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module  # type: ignore[call-overload]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Within, networks compute in the precision that was chosen.

        Enter it anew for each training step: autocast keeps casts of weights until it is left.  On a GPU it allows or
        forbids TF32, too, for the whole process; on a CPU in fp32 it changes nothing.
        """
        with contextlib.ExitStack() as stack:
            if self.kind == "cuda":
                stack.enter_context(tf32(self.precision == "tf32"))
            if self.precision == "bf16":
                stack.enter_context(torch.autocast(self.kind, torch.bfloat16))
            yield

    def compiled(self, network: nn.Module, trains: bool = False) -> nn.Module:
        """Compile a network by ``torch.compile`` if that was asked for; returns the same module.

        It is changed in place: its class and the names of its parameters stay, and copies of it are not compiled.  On a
        CPU a network that `trains` stays as it is: PyTorch 2.13 compiles wrong gradients for it (docs/hardware.md).
        """
        if self.compile and not (trains and self.kind == "cpu"):
            network.compile()
        return network

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Each choice with its ``value`` and ``why``."""
        names = ("device", "precision", "channels_last", "compile")
        return {name: {"value": getattr(self, name), "why": self.reasons.get(name, "")} for name in names}


def kind_of(device: str) -> str:
    """The device, with "auto" replaced by "cuda" or "cpu"; which GPU it is, :func:`device_of` says in each process."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    return there if device == "auto" else device


def device_of(device: str, ranks: Ranks) -> str:
    """The device of this process: "cuda" is the GPU of its local rank; ConfigError if processes would share one."""
    if ranks.alone or not kind_of(device).startswith("cuda"):
        return device
    return decide(device, ComputeConfig(), find(), ranks.local_rank).device


def choose(device: str = "auto", compute: ComputeConfig | None = None) -> Compute:
    """How to compute on this machine; ConfigError if the device is not there, or cannot do what was asked for.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", …; where several processes work together,
            what :func:`device_of` gives.
        compute: what was asked for; None: all automatic.
    """
    chosen = decide(device, compute or ComputeConfig(), find())
    if chosen.kind == "cuda":
        try:
            torch.zeros(1, device=chosen.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device {chosen.device} cannot be used ({str(error).strip().splitlines()[0]}).  Another program may "
                "be on it, or its driver too old for this PyTorch: see `dpsyngen doctor`, or give --device cpu."
            ) from None
    return chosen


def decide(device: str, asked: ComputeConfig, facts: Facts, local_rank: int | None = None) -> Compute:
    """The rules of :func:`choose`, for a machine of these facts; each choice gets its reason.

    `local_rank` is the number of this process on its machine, where several work together: that of its GPU.
    """
    name, why, gpu = _device(device, facts, local_rank)
    allowed: tuple[Precision, ...] = ("fp32",)
    precision: Precision = "fp32"
    reasons = {
        "device": why,
        "compile": "compiling takes up to minutes: only where compute.compile asks for it (docs/hardware.md)",
        "channels_last": "a CPU's results stay the same bits, and a GPU gained nothing by it (docs/hardware.md)",
    }
    if gpu is None:
        allowed = ("fp32", "bf16")
        reasons["precision"] = "on a CPU results stay the same bits; bf16 seldom pays there (docs/hardware.md)"
    elif facts.built_for == "cuda" and gpu.capability >= (8, 0):  # Ampere; AMD's capabilities mean something else
        allowed, precision = ("fp32", "tf32", "bf16"), "tf32"
        why = f"{gpu.architecture} has fast units for it; bf16 is 20 times coarser and gains up to a fifth more"
        reasons["precision"] = why
    else:
        old = f"{gpu.architecture} has no units for bf16 or TF32; they begin with 8.0 (Ampere)"
        reasons["precision"] = "nothing else was tried on AMD GPUs" if facts.built_for == "rocm" else old
    if asked.precision not in ("auto", *allowed):
        called = "the CPU" if gpu is None else f"{gpu.name} ({gpu.architecture})"
        raise ConfigError(
            f"compute.precision is {asked.precision}, but {called} has {', '.join(allowed)} only.  Leave it at "
            "auto, or use an NVIDIA GPU of compute capability 8.0, Ampere, or later."
        )
    reasons |= {name: "asked for" for name, value in asked if value != "auto"}
    if asked.precision != "auto":
        precision = asked.precision
    if precision != "fp32":
        reasons["precision"] += "; norms and clipped sums of DP-SGD are fp32 all the same"
    return Compute(
        device=name,
        precision=precision,
        channels_last=asked.channels_last is True,
        compile=asked.compile is True,
        reasons=reasons,
        allowed=allowed,
    )


def _device(device: str, facts: Facts, local_rank: int | None) -> tuple[str, str, Gpu | None]:
    """Name, reason, and the GPU if it is one."""
    none = "no GPU that PyTorch can use was found"
    if facts.built_for == "cpu":
        none = "this PyTorch is built for CPUs only, so it would not see a GPU"
    there = len(facts.gpus)
    choices = " or ".join(["auto", "cpu", *["cuda"][:there], *(f"cuda:{i}" for i in range(there))])
    if device == "auto" and not there:
        return "cpu", none, None
    try:
        parsed = torch.device("cuda" if device == "auto" else device)
    except (RuntimeError, TypeError):
        parsed = torch.device("meta")  # refused below
    if parsed.type == "cpu":
        return "cpu", "asked for", None
    if parsed.type == "cuda" and not there:
        raise ConfigError(f"device is {shown(device)}, which this machine cannot use: {none}.  Choose {choices}.")
    number = parsed.index if parsed.index is not None else local_rank or 0
    if local_rank is not None and local_rank >= there:
        raise ConfigError(
            f"this machine has {there} GPU{'s' if there > 1 else ''}, but a process number {local_rank} (from 0) was "
            f"started on it: use --nproc-per-node {there}, or --device cpu."
        )
    require(parsed.type == "cuda" and number < there, "device", device, choices)
    if local_rank not in (None, number):
        several = "with several processes each takes the GPU of its own number: use --device cuda"
        raise ConfigError(f"device is 'cuda:{number}', but {several}.")
    gpu = facts.gpus[number]
    why = f"{gpu.name}, {gpu.architecture}, {gpu.memory / 2**30:.0f} GiB"
    return f"cuda:{number}", why if device == "auto" else "asked for", gpu


# --------------------------------------------------------------------------------------------------- transfer


def send(array: NDArray[Any], device: str | torch.device) -> Tensor:
    """A copy of the array (of any layout, read-only or not) on the device, which may be overwritten once this returns.

    To a GPU it goes through page-locked memory, which PyTorch reuses only after it has arrived, and travels while the
    CPU goes on; kernels that use it wait for it.  Convert it there, so that bytes travel as bytes.
    """
    there = torch.from_numpy(np.array(array))
    if torch.device(device).type == "cuda":
        there = there.pin_memory()
    return there.to(device, non_blocking=True)


# --------------------------------------------------------------------------------- what `dpsyngen doctor` says


@dataclass(frozen=True)
class Machine:
    """What there is, in words, versions and bytes."""

    system: str
    processor: str
    python: str
    dpsyngen: str
    torch: str
    cores: int  # that this process may use
    threads: int  # that PyTorch uses
    memory: int  # the limit of a container counted in
    available: int
    facts: Facts

    def rows(self) -> Iterator[tuple[str, str]]:
        """(what, how much) for people."""
        yield "system", f"{self.system}, Python {self.python}, dpsyngen {self.dpsyngen}"
        yield "PyTorch", f"{self.torch}, {'for CPUs only' if self.facts.built_for == 'cpu' else self.facts.built_for}"
        yield "processor", f"{self.processor}, {self.cores} cores, {self.threads} threads"
        yield "memory", f"{_gib(self.memory)}, {_gib(self.available)} of it available"
        for i, gpu in enumerate(self.facts.gpus):
            yield f"GPU {i}", f"{gpu.name}, {gpu.architecture}, {_gib(gpu.memory)}"
        if not self.facts.gpus:
            yield "GPU", "none"


def look() -> Machine:
    """The machine that this process runs on."""
    memory, available = memory_bytes()
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        processor=next(proc("/proc/cpuinfo", "model name"), platform.processor() or platform.machine()),
        python=platform.python_version(),
        dpsyngen=__version__,
        torch=torch.__version__,
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        memory=memory,
        available=available,
        facts=find(),
    )


def advice(machine: Machine) -> Iterator[str]:
    """What would make this machine faster, or keep a run from failing; a sentence each."""
    gpus = len(machine.facts.gpus)
    if not gpus and Path("/proc/driver/nvidia/version").exists():
        why = "cannot use a GPU: `nvidia-smi` says whether the driver works and which CUDA it allows; "
        why += "CUDA_VISIBLE_DEVICES may hide the GPU."
        if machine.facts.built_for == "cpu":
            why = "is built for CPUs only: install one for CUDA (pytorch.org has the command for your driver)."
        yield f"There is an NVIDIA driver, but this PyTorch, {machine.torch}, {why}"
    elif not gpus:
        yield "No GPU: presets cpu-small and cpu are made for this; `dpsyngen compare SPEC --dry-run` estimates times."
    if gpus > 1:
        yield f"{gpus} GPUs: one process uses one; `torchrun --nproc-per-node {gpus} -m dpsyngen train …` uses all."
    if machine.threads < machine.cores:
        limit = os.environ.get("OMP_NUM_THREADS", "not set")
        yield f"PyTorch uses {machine.threads} of {machine.cores} cores: OMP_NUM_THREADS is {limit}."
    if machine.available < 4 * 2**30:
        yield f"Only {_gib(machine.available)} of memory are available: end other programs, or give --physical-batch."


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
