"""What commands import, for the process that tests/forked.py forks them from."""

from __future__ import annotations

import importlib
import os

import torch

THEIRS = ("matplotlib.figure", "sklearn.linear_model", "sklearn.neural_network", "torch._dynamo", "torch.distributed")
OURS = ("fit", "generator.ranks", "privacy.accounting", "programs.saving", "report.html", "training.follower")

for name in (*THEIRS, *(f"dpsyngen.{name}" for name in OURS)):
    importlib.import_module(name)
torch.set_num_threads(1)
if os.listdir("/proc/self/task") != [str(os.getpid())]:
    raise RuntimeError("other threads are running, so forking is not safe")
