"""What `dpsyngen doctor` says about a machine: what it has, what would be chosen on it and why, and what would help."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dpsyngen.hardware.compute import Compute
from dpsyngen.hardware.facts import Facts, find
from dpsyngen.version import __version__

_LITTLE_DISK = 5 * 2**30  # a run of small networks takes some hundred MB, but feature caches and samples take more
_LITTLE_MEMORY = 4 * 2**30
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        system, processor: in words.
        python, dpsyngen, torch: versions.
        cuda, cudnn, nccl: versions that PyTorch brought; None if it is built without.
        cores: that this process may use.
        threads: that PyTorch uses.
        memory, available: bytes of main memory, in all and now; limits of a container are counted in.
        disk: where, in the working directory, and bytes free there.
        torchrun: what torchrun told this process, by the names of the environment; None if it was not started so.
        facts: what choices rest on.
    """

    system: str
    processor: str
    python: str
    dpsyngen: str
    torch: str
    cuda: str | None
    cudnn: str | None
    nccl: str | None
    cores: int
    threads: int
    memory: int
    available: int
    disk: int
    torchrun: dict[str, str] | None
    facts: Facts

    def rows(self) -> Iterator[tuple[str, str]]:
        """(what, how much) for people."""
        yield "system", f"{self.system}, Python {self.python}, dpsyngen {self.dpsyngen}"
        built = " and ".join(
            f"{name} {v}" for name, v in (("CUDA", self.cuda), ("cuDNN", self.cudnn), ("NCCL", self.nccl)) if v
        )
        yield "PyTorch", f"{self.torch}, {f'with {built}' if built else 'for CPUs only'}"
        yield "processor", f"{self.processor}, {self.cores} cores, {self.threads} threads"
        yield "memory", f"{_gib(self.memory)}, {_gib(self.available)} of it available"
        yield "disk", f"{_gib(self.disk)} free in the working directory"
        for i, gpu in enumerate(self.facts.gpus):
            yield f"GPU {i}", f"{gpu.name}, {gpu.architecture}, {_gib(gpu.memory)}"
        if not self.facts.gpus:
            yield "GPU", "none"
        if self.torchrun is not None:
            t = self.torchrun
            yield (
                "torchrun",
                f"process {t.get('RANK')} of {t.get('WORLD_SIZE')}, number {t.get('LOCAL_RANK')} of "
                f"{t.get('LOCAL_WORLD_SIZE')} on this machine",
            )

    def to_dict(self) -> dict[str, Any]:
        """All of it, for programs."""
        return asdict(self)


def look(folder: Path | None = None) -> Machine:
    """The machine that this process runs on.

    Args:
        folder: whose disk is asked about; None: the working directory.
    """
    memory, available = _memory()
    return Machine(
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        processor=_processor(),
        python=platform.python_version(),
        dpsyngen=__version__,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=_version(torch.backends.cudnn.version() if torch.version.cuda else None),
        nccl=_nccl(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=memory,
        available=available,
        disk=shutil.disk_usage(folder or Path.cwd()).free,
        torchrun={k: os.environ[k] for k in _TORCHRUN if k in os.environ} if "RANK" in os.environ else None,
        facts=find(),
    )


def advice(machine: Machine, compute: Compute) -> Iterator[str]:
    """What would make it faster, or keep it from failing; a sentence each."""
    facts = machine.facts
    if not facts.gpus and _nvidia_driver():
        if facts.built_for == "cpu":
            yield (
                "There is an NVIDIA driver, but this PyTorch is built for CPUs only: install one for CUDA (pytorch.org "
                "has the command for your driver)."
            )
        else:
            yield (
                f"There is an NVIDIA driver, but PyTorch {machine.torch} cannot use a GPU: `nvidia-smi` says whether "
                "the driver works and which CUDA it allows; CUDA_VISIBLE_DEVICES may hide the GPU."
            )
    elif not facts.gpus:
        yield (
            "No GPU: presets cpu-small and cpu are made for this; `dpsyngen compare SPEC --dry-run` estimates how long "
            "a comparison takes."
        )
    if compute.kind == "cuda" and not facts.triton:
        yield "Triton is not installed, so networks are not compiled: install the PyTorch for CUDA, which brings it."
    if len(facts.gpus) > 1 and machine.torchrun is None:
        n = len(facts.gpus)
        yield f"{n} GPUs: one process uses one of them; `torchrun --nproc-per-node {n} -m dpsyngen train …` uses all."
    if machine.threads < machine.cores and machine.torchrun is None:
        told = (
            f"OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']}"
            if "OMP_NUM_THREADS" in os.environ
            else "it was told to"
        )
        yield f"PyTorch uses {machine.threads} of {machine.cores} cores ({told}); unset OMP_NUM_THREADS to use all."
    if machine.threads > machine.cores:
        yield (
            f"PyTorch uses {machine.threads} threads on {machine.cores} cores, which wait for each other: set "
            f"OMP_NUM_THREADS={machine.cores}."
        )
    if machine.available < _LITTLE_MEMORY:
        yield f"Only {_gib(machine.available)} of memory are available: end other programs, or give --physical-batch."
    if machine.disk < _LITTLE_DISK:
        yield f"Only {_gib(machine.disk)} are free in the working directory: give --out a folder on another disk."


# ---------------------------------------------------------------------------------------------------- looking


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _version(number: int | None) -> str | None:
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _nccl() -> str | None:
    if torch.version.cuda is None:
        return None
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError, OSError):  # built without
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> tuple[int, int]:
    """Bytes in all and available, of the machine or of the container (cgroup v2) if that allows less."""
    total = available = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemTotal":
                total = int(value.split()[0]) * 1024
            elif name == "MemAvailable":
                available = int(value.split()[0]) * 1024
    if not total:
        total = available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        total, available = min(total, limit), min(available, max(limit - used, 0))
    return total, available


def _nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()
