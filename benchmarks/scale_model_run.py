"""A short run of the network of paper-28 for benchmarks/scale_model.py: `[torchrun] scale_model_run.py FOLDER`.

The main process writes into FOLDER/steps.json, for each DP-SGD step, its seconds and the bytes that torch.distributed
was given to carry.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

STEPS, BATCH, COPIES, SIDE, CLASSES = 8, 32, 2, 28, 10


def main(out: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from dpsyngen import fit as api
    from dpsyngen.training.private import PrivateStep

    sent: dict[str, int] = defaultdict(int)
    _count_calls(sent)
    steps: list[dict[str, Any]] = []
    take = PrivateStep.__call__

    def timed(self: Any, *arguments: Any) -> Any:
        sent.clear()
        begun, cpu = time.perf_counter(), time.process_time()
        figures = take(self, *arguments)
        took = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
        steps.append({**took, "examples": figures["examples"], "bytes": dict(sent)})
        return figures

    PrivateStep.__call__ = timed  # type: ignore[method-assign]
    images = np.random.default_rng(0).integers(0, 256, (256, SIDE, SIDE), dtype=np.uint8)
    private = {"steps": STEPS, "batch": BATCH, "copies": COPIES, "warmup": 0, "checkpoint_every": 100}
    settings = {"stages": {"variant": "dpdm"}, "private": {**private, "physical_batch": BATCH}}
    settings["privacy"] = {"insecure_seed": 0}  # the same records in all runs
    labels = np.arange(256) % CLASSES
    api.train((images, labels), out=out / "run", epsilon=10, preset="paper-28", settings=settings)
    if steps:
        (out / "steps.json").write_text(json.dumps(steps))


def _count_calls(sent: dict[str, int]) -> None:
    """Count what each call of torch.distributed is given to carry, by its name."""
    import torch.distributed as dist

    def watch(name: str, size: Any) -> None:
        call = getattr(dist, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            sent[name] += size(arguments[0])
            return call(*arguments, **named)

        setattr(dist, name, counted)

    for name in ("broadcast", "reduce", "all_reduce"):
        watch(name, lambda tensor: tensor.numel() * tensor.element_size())
    for name in ("broadcast_object_list", "gather_object"):
        watch(name, lambda value: len(pickle.dumps(value)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
