"""What precision, memory format and compiling are worth, in a DP-SGD step, a public step and a call for sampling.

Every row computes the same from the same weights: fp32, TF32 or bf16; plain or channels last; as it is or compiled
(DP-SGD steps are never compiled).  "ratio" is the time over that of fp32, plain and not compiled in the same round, the
median over rounds; the rows take turns, so that a slow moment of the machine hits all.  "off" is how far the result
(the denoised images; the gradient; the clipped sum) lies from that one's, relative to its norm.  "ms" is the shortest
round.  Compiling itself is not in the times but in a column of its own.

    python benchmarks/gpu.py                                   # on a GPU where there is one, else on the CPU
    python benchmarks/gpu.py --device cpu --network tiny@28 --json compute.json
    python benchmarks/gpu.py --compile none --rounds 3         # less than a minute

The last line is JSON.  What `dpsyngen doctor` chooses on this machine is marked with a star.  Compiled code is kept for
the next run only if TORCHINDUCTOR_CACHE_DIR is set.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Threads that spin while they wait slow down a machine shared with others.  Must be set before PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from dpsyngen.config import ComputeConfig
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.loss import NoiseLevels, NoisyBatch, denoising_loss, make_noisy
from dpsyngen.diffusion.unet import UNet, count_parameters
from dpsyngen.hardware import Compute, choose, look, send
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.workers import Workers, summed_gradients

CLASSES = 10
BASELINE = ("fp32", False, False)
TASKS = ("sampling", "public step", "DP-SGD step")
LEVELS = NoiseLevels(-0.5, 1.0)

Result = list[Tensor]


@dataclass
class Row:
    """One way to compute one task.

    Attributes:
        task: one of TASKS.
        precision, channels_last, compiled: the way.
        chosen: whether it is what is chosen on this machine.
        milliseconds: the shortest round.
        ratio: median over rounds.
        off: relative distance of the result from the baseline's.
        compile_seconds: until the first compiled result was there.
        error: why there is no time.
    """

    task: str
    precision: str
    channels_last: bool
    compiled: bool
    chosen: bool
    milliseconds: float = 0.0
    ratio: float = 0.0
    off: float = 0.0
    compile_seconds: float = 0.0
    error: str = ""
    _times: list[float] = field(default_factory=list, repr=False)

    @property
    def way(self) -> tuple[str, bool, bool]:
        """Precision, channels last, compiled."""
        return self.precision, self.channels_last, self.compiled

    def to_dict(self) -> dict[str, Any]:
        """For the JSON document."""
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items() if not k.startswith("_")}


class Tasks:
    """The three things that are timed, on random images.

    Args:
        network: "size@resolution".
        examples: images of a batch.
        copies: K of the training steps.
    """

    def __init__(self, network: str, examples: int, copies: int) -> None:
        self.size, _, pixels = network.partition("@")
        self.resolution, self.examples, self.copies = int(pixels), examples, copies
        self.channels = 1 if self.resolution == 28 else 3

    def denoiser(self) -> NetworkDenoiser:
        """With the same weights each time, the last layers of which are not almost zero."""
        torch.manual_seed(0)
        unet = UNet(self.size, self.resolution, self.channels, CLASSES)
        with torch.no_grad():
            for p in unet.parameters():
                p += 0.02 * torch.randn_like(p)
        return NetworkDenoiser(unet, CLASSES)

    def batch(self, compute: Compute) -> NoisyBatch:
        """As the training steps make it."""
        rng = np.random.default_rng(0)
        shape = (self.examples, self.channels, self.resolution, self.resolution)
        images = send(rng.integers(0, 256, shape, dtype=np.uint8), compute.device) / 127.5 - 1
        labels = send(rng.integers(0, CLASSES, self.examples), compute.device)
        return make_noisy(
            images,
            labels,
            LEVELS,
            copies=self.copies,
            num_classes=CLASSES,
            label_dropout=0.0,
            generator=torch.Generator().manual_seed(0),
        )

    def make(self, task: str, compute: Compute) -> Callable[[], Result]:
        """The task, computed in this way."""
        denoiser = compute.compiled(compute.prepare(self.denoiser()), trains=task != "sampling")
        batch = self.batch(compute)
        workers = Workers(None if compute.kind == "cpu" else 1)

        def part_of(part: slice) -> NoisyBatch:
            return batch.rows(slice(part.start * self.copies, part.stop * self.copies))

        if task == "sampling":

            @torch.no_grad()
            def sampling() -> Result:
                with compute.autocast():
                    return [denoiser(batch.noisy, batch.sigma, batch.labels)]

            return sampling

        if task == "public step":
            parameters = list(denoiser.parameters())

            def public() -> Result:
                with compute.autocast():
                    gradients, _ = summed_gradients(
                        parameters, lambda part: denoising_loss(denoiser, part_of(part)), self.examples, workers
                    )
                return gradients

            return public

        engine = PerExampleGradients(denoiser, 1.0, kernels=KernelChoices(), workers=workers)

        def private() -> Result:
            with compute.autocast():
                return engine.sum(
                    lambda part: denoising_loss(denoiser, part_of(part)),
                    self.examples,
                    copies=self.copies,
                    physical_batch=self.examples,
                ).sums

        return private


def ways(compute: Compute, task: str, compiling: str) -> list[tuple[str, bool, bool]]:
    """Precision, channels last and compiled of each row, the baseline first."""
    plain = [(p, last, False) for p, last in itertools.product(compute.allowed, (False, True))]
    wrong = compute.kind == "cpu" and task == "public step"  # gradients of compiled code (docs/hardware.md)
    if task == "DP-SGD step" or compiling == "none" or wrong:
        return plain
    if compiling == "all":
        return plain + [(p, last, True) for p, last, _ in plain]
    if compute.kind == "cpu":  # where compiling takes a minute
        return [*plain, ("fp32", False, True)]
    return [*plain, ("fp32", False, True), (compute.allowed[-1], True, True)]


def chosen_way(compute: Compute, task: str) -> tuple[str, bool, bool]:
    """What is chosen on this machine."""
    c = compute.for_dp_steps() if task == "DP-SGD step" else compute
    return c.precision, c.channels_last, c.compile


def distance(a: Result, b: Result) -> float:
    """‖a - b‖ / ‖b‖ over all tensors."""
    total = sum(float(y.double().square().sum()) for y in b)
    return (sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True)) / total) ** 0.5


def measure(tasks: Tasks, task: str, compute: Compute, rounds: int, compiling: str) -> list[Row]:
    """All rows of one task."""

    def timed(run: Callable[[], Result]) -> tuple[float, Result]:
        _wait(compute)
        begun = time.perf_counter()
        out = run()
        _wait(compute)
        return time.perf_counter() - begun, out

    rows, runs = [], {}
    expected: Result = []
    for way in ways(compute, task, compiling):
        precision, last, compiled = way
        row = Row(task, precision, last, compiled, way == chosen_way(compute, task))
        rows.append(row)
        asked = ComputeConfig(precision=precision, channels_last=last, compile=compiled)  # type: ignore[arg-type]
        own = choose(compute.device, asked)
        own = own.for_dp_steps() if task == "DP-SGD step" else own
        run = tasks.make(task, own)
        try:
            first, _ = timed(run)  # kernels are chosen, networks compiled
        except RuntimeError as error:  # no compiler
            row.error = str(error).strip().splitlines()[0]
            continue
        if compiled:
            row.compile_seconds = first
        out = timed(run)[1]
        expected = expected or out
        row.off = distance(out, expected)
        runs[way] = run
    for _ in range(rounds):
        seconds = {way: timed(run)[0] for way, run in runs.items()}
        for row in rows:
            if row.way in seconds:
                row._times.append(seconds[row.way] / seconds[BASELINE])
                row.milliseconds = min(row.milliseconds or math.inf, 1e3 * seconds[row.way])
    for row in rows:
        if row._times:
            row.ratio = statistics.median(row._times)
    return rows


def _wait(compute: Compute) -> None:
    if compute.kind == "cuda":
        torch.cuda.synchronize(compute.device)


def transfer(compute: Compute, rounds: int) -> dict[str, float] | None:
    """Milliseconds until the CPU goes on and until 64 MiB are there, plainly and by ``send``; None on a CPU."""
    if compute.kind != "cuda":
        return None
    array = np.zeros(64 * 2**20, np.uint8)
    ways: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: torch.from_numpy(array).to(compute.device),
        "send": lambda: send(array, compute.device),
    }
    out: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name, move in ways.items():
            _wait(compute)
            begun = time.perf_counter()
            move()
            out.setdefault(f"{name}, CPU goes on", []).append(1e3 * (time.perf_counter() - begun))
            _wait(compute)
            out.setdefault(f"{name}, there", []).append(1e3 * (time.perf_counter() - begun))
    return {k: round(statistics.median(v[1:]), 4) for k, v in out.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--network", help="size@resolution; default: tiny@28 on a CPU, base@28 on a GPU")
    parser.add_argument("--examples", type=int, help="images of a batch; default: 64 on a CPU, 1024 on a GPU")
    parser.add_argument("--copies", type=int, default=1, help="K of the training steps")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", choices=("none", "some", "all"), default="some", help="which rows are compiled")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--json", type=Path, help="file for the results")
    given = parser.parse_args()
    given.compiled_before = "TORCHINDUCTOR_CACHE_DIR" in os.environ
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        _measure_all(given)
        return
    # Compiled anew each time: with what an earlier run left in the cache it would not be a first use's time.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        _measure_all(given)


def _measure_all(given: argparse.Namespace) -> None:
    compute = choose(given.device)
    on_cpu = compute.kind == "cpu"
    tasks = Tasks(
        given.network or ("tiny@28" if on_cpu else "base@28"), given.examples or (64 if on_cpu else 1024), given.copies
    )
    machine = look()
    parameters = count_parameters(tasks.denoiser())
    print(
        f"{compute.device}: {compute.reasons['device'] if not on_cpu else machine.processor}, {machine.threads} threads"
    )
    print(f"{tasks.size}@{tasks.resolution}, {parameters:,} parameters, {tasks.examples} images, K = {tasks.copies}")
    rows: list[Row] = []
    for task in given.tasks:
        print(f"\n{task:<14} {'':<8}{'layout':<15}{'':<10}{'ms':>9}{'ratio':>8}{'off':>10}{'compiling':>11}")
        for row in measure(tasks, task, compute, given.rounds, given.compile):
            rows.append(row)
            layout, how = "channels last" if row.channels_last else "plain", "compiled" if row.compiled else ""
            star = "*" if row.chosen else ""
            times = row.error or f"{row.milliseconds:9.2f}{row.ratio:8.2f}{row.off:10.1e}"
            took = f"{row.compile_seconds:9.1f} s" if row.compiled and not row.error else ""
            print(f"{star:>14} {row.precision:<8}{layout:<15}{how:<10}{times}{took}")
    document = {
        "date": datetime.date.today().isoformat(),
        "device": compute.device,
        "machine": asdict(machine),
        "network": f"{tasks.size}@{tasks.resolution}",
        "parameters": parameters,
        "examples": tasks.examples,
        "copies": tasks.copies,
        "rounds": given.rounds,
        "compiled_before": given.compiled_before,
        "rows": [row.to_dict() for row in rows],
        "transfer_ms": transfer(compute, given.rounds),
    }
    if given.json:
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
