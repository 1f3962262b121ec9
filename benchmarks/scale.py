"""What the number of records costs: memory and time of a DP-SGD step at one expected batch, for 10⁴ to 10⁶ records.

    python benchmarks/scale.py              # 10⁴, 10⁵ and 10⁶ records, about five minutes on two cores
    python benchmarks/scale.py --quick      # 10⁴ and 10⁵

The records are images drawn by a program (dead leaves, 28×28, grey), stored as a folder of arrays.  Steps for all
numbers of records are timed in one process, in turns.  Memory is measured in a process for each: the highest resident
set while steps are taken (VmHWM, set back before them) above what the process held before it opened the images.
All times but "a step" are processor time, which hardly depends on what else the machine does.  The last line is JSON,
which --out writes to a file.  What more GPUs give: benchmarks/scale_model.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

RESOLUTION, CLASSES, BATCH, PHYSICAL, COPIES = 28, 10, 64, 32, 4
SIZES, QUICK = (10_000, 100_000, 1_000_000), (10_000, 100_000)
STEPS, WARM_UP = 24, 4


# ------------------------------------------------------------------------------------------------------ the records


class Drawn:
    """`count` images of a program as an ImageStore: each is drawn when it is read."""

    dtype = np.dtype(np.uint8)

    def __init__(self, count: int) -> None:
        from dpsyngen.programs import make_program

        self.shape = (count, 1, RESOLUTION, RESOLUTION)
        self._program = make_program("dead-leaves", resolution=RESOLUTION, channels=1, seed=0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self._program.batch(index, threads=os.cpu_count())


def make_records(folder: Path, count: int) -> float:
    """Draw `count` images into a folder of arrays, some in memory at a time; returns the seconds that it took."""
    from dpsyngen.data import ImageDataset, save_images

    begun = time.perf_counter()
    labels = np.arange(count, dtype=np.int64) % CLASSES
    save_images(ImageDataset(Drawn(count), labels, tuple(map(str, range(CLASSES))), "drawn"), folder)
    return time.perf_counter() - begun


# ------------------------------------------------------------------------------------------------------ one process


def status_mb(field: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field}: this benchmark needs Linux")


def measured(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds of processor time, highest resident set in MB while it ran)."""
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    begun = time.process_time()
    result = work()
    return result, time.process_time() - begun, status_mb("VmHWM")


class Bench:
    """The network and the settings that all sizes share."""

    def __init__(self) -> None:
        import torch

        from dpsyngen.config import load_config
        from dpsyngen.privacy.randomness import Randomness
        from dpsyngen.training.networks import make_denoiser
        from dpsyngen.training.plan import Shape

        settings = {"network": {"size": "tiny"}, "private": {"batch": BATCH, "copies": COPIES}}
        self.config = load_config(settings, preset="cpu-small")
        self.randomness = Randomness.from_insecure_seed(0)
        names = tuple(map(str, range(CLASSES)))
        self.denoiser = make_denoiser(self.config, Shape(RESOLUTION, 1, names, SIZES[0]), True, seed=0)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=1e-4)

    def open(self, folder: Path) -> Any:
        """The records.  A folder for the cache makes a small set stay in its file, too: all sizes are read alike."""
        from dpsyngen.data import load_images

        return load_images(folder, cache=folder / "cache")

    def step(self, dataset: Any) -> Callable[[int], Any]:
        """What takes step number i on these records."""
        from dpsyngen.diffusion.loss import NoiseLevels
        from dpsyngen.training.private import Computing, DpSgd, PrivateStep
        from dpsyngen.workers import Workers

        n = self.config.network
        take = PrivateStep(
            dataset,
            NoiseLevels(n.noise_mean, n.noise_std, -3.0, 2.0),
            n.label_dropout,
            DpSgd(len(dataset), 1.0, 1.0, self.config.private),
            self.randomness,
            Computing(PHYSICAL, workers=Workers()),
        )
        return lambda i: take(self.denoiser, self.optimizer, i)


def memory(folder: Path, moments: bool) -> dict[str, Any]:
    """Memory of this process for the records in `folder`, and the time of passes over all of them."""
    from dpsyngen.privacy.randomness import poisson_sample
    from dpsyngen.training.moments import estimate_moments
    from dpsyngen.training.plan import plan_moments

    bench = Bench()
    before = status_mb("VmRSS")
    dataset, opened, _ = measured(lambda: bench.open(folder))
    step = bench.step(dataset)
    _, _, highest = measured(lambda: [step(i) for i in range(8)])
    count, rate = len(dataset), BATCH / len(dataset)
    chosen, drawing, _ = measured(lambda: [poisson_sample(bench.randomness, i, count, rate) for i in range(STEPS)])
    _, reading, _ = measured(lambda: [dataset.batch(rows) for rows in chosen])
    _, hashing, _ = measured(dataset.fingerprint)
    out: dict[str, Any] = {
        "records": count,
        "open_seconds": opened,
        "sampling_seconds": drawing / STEPS,
        "reading_seconds": reading / STEPS,
        "memory_before_mb": before,
        "step_memory_mb": highest - before,
        "fingerprint_seconds": hashing,
    }
    if moments:
        plan, own = plan_moments(10.0, CLASSES), bench.randomness
        _, seconds, top = measured(lambda: estimate_moments(dataset, CLASSES, count, plan, own, rank=100))
        out |= {"moments_seconds": seconds, "moments_memory_mb": top - before}
    return out


def times(folders: list[Path]) -> list[dict[str, float]]:
    """Seconds of a step (median) for each of the folders, in turns, so that a slow moment of the machine hits all."""
    bench = Bench()
    steps = [bench.step(bench.open(folder)) for folder in folders]
    wall: list[list[float]] = [[] for _ in steps]
    processor: list[list[float]] = [[] for _ in steps]
    for i in range(WARM_UP + STEPS):
        for k, step in enumerate(steps):
            begun, used = time.perf_counter(), time.process_time()
            step(i)
            wall[k].append(time.perf_counter() - begun)
            processor[k].append(time.process_time() - used)
    median = statistics.median
    return [
        {"step_seconds": median(w[WARM_UP:]), "step_processor_seconds": median(p[WARM_UP:])}
        for w, p in zip(wall, processor, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------ all of them


def in_a_process(*arguments: object) -> Any:
    """What this script prints, as JSON, when it is called with these arguments."""
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def records(sizes: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """Part 1: the table over numbers of records."""
    folders = [folder / str(count) for count in sizes]
    for place, count in zip(folders, sizes, strict=True):
        if not place.exists():
            print(f"{count:,} images drawn in {make_records(place, count):.0f} s", flush=True)
    in_a_process("--memory", folders[0])  # warms the machine
    rows = [
        in_a_process("--memory", place, *(["--moments"] if place == folders[-1] else [])) | measures
        for place, measures in zip(folders, in_a_process("--times", *folders), strict=True)
    ]
    first, last = rows[0], rows[-1]
    million = 1e6 / last["records"]
    return {
        "what": f"DP-SGD steps at an expected batch of {BATCH}, K = {COPIES}, network tiny, {RESOLUTION}×{RESOLUTION}",
        "rows": rows,
        "ratios": {
            k: last[k] / first[k] for k in ("records", "step_seconds", "step_processor_seconds", "step_memory_mb")
        },
        "seconds_per_million_records": {
            k: last[f"{k}_seconds"] * million for k in ("sampling", "fingerprint", "moments")
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    out = ["| records | a step, s | processor, s | of it sampling, ms | reading, ms | memory, MB | fingerprint, s |"]
    out.append("|---:" * 7 + "|")
    for r in rows:
        out.append(
            f"| {r['records']:,} | {r['step_seconds']:.3f} | {r['step_processor_seconds']:.3f} "
            f"| {1e3 * r['sampling_seconds']:.2f} | {1e3 * r['reading_seconds']:.2f} | {r['step_memory_mb']:.0f} "
            f"| {r['fingerprint_seconds']:.2f} |"
        )
    return "\n".join(out)


def main() -> None:
    """Make the records, measure, print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10⁴ and 10⁵ records only")
    parser.add_argument(
        "--folder", type=Path, help="where the records go (1 GB), and stay; default: a temporary folder"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--moments", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=Path, nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory is not None:
        print(json.dumps(memory(given.memory, given.moments)))
        return
    if given.times is not None:
        print(json.dumps(times(given.times)))
        return
    with tempfile.TemporaryDirectory(prefix="dpsyngen-scale-") as temporary:
        folder = Path(temporary) if given.folder is None else given.folder
        folder.mkdir(parents=True, exist_ok=True)
        found = records(QUICK if given.quick else SIZES, folder)
    found = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "date": time.strftime("%Y-%m-%d"), **found}
    ratios, passes = found["ratios"], found["seconds_per_million_records"]
    print(table(found["rows"]))
    print(
        f"\nFor {ratios['records']:.0f} times the records: {ratios['step_seconds']:.2f} times the time of a step "
        f"({ratios['step_processor_seconds']:.2f} of processor time), {ratios['step_memory_mb']:.2f} times the memory."
        f"\nProcessor time for a million records: {1e3 * passes['sampling']:.1f} ms of Poisson sampling in each step; "
        f"once a run {passes['fingerprint']:.1f} s for the fingerprint and, where a variant uses them, "
        f"{passes['moments']:.0f} s for DP moments."
    )
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
