"""What there is to compute with, without using it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as its maker calls it.
        capability: CUDA compute capability, (major, minor): (8, 0) is Ampere.
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def architecture(self) -> str:
        """Such as "compute capability 8.0"."""
        return f"compute capability {self.capability[0]}.{self.capability[1]}"


@dataclass(frozen=True)
class Facts:
    """What a choice rests on.

    Attributes:
        gpus: that CUDA sees, by number.
        built_for: "cuda", "rocm" or "cpu": what this PyTorch was built for.
        triton: whether Triton is installed, which compiled networks need on a GPU.
        compiler: the C++ compiler that compiled networks need on a CPU, or None.
    """

    gpus: tuple[Gpu, ...]
    built_for: str
    triton: bool
    compiler: str | None


def find() -> Facts:
    """The facts of this machine, as the driver of its GPUs tells them."""
    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(number)
            gpus.append(Gpu(p.name, (p.major, p.minor), p.total_memory))
    built_for = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))), None)
    return Facts(tuple(gpus), built_for, importlib.util.find_spec("triton") is not None, compiler)
