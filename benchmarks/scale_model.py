"""Steps a second from 1 to 64 GPUs: a model, made of what is measured here and of what is assumed.

Measured: the bytes of a DP-SGD step, by counting every call of torch.distributed in real runs of 2 and 4 processes; the
seconds that the main process alone spends on noise and on the optimizer, for each parameter; the seconds that every
process spends on Poisson sampling, for each record, and on noisy images, for each row; the floating-point operations of
a row.  Assumed: the GPU's sustained rate, the least time of a pass, and the links between GPUs (see ``CLUSTERS``).

A step of n processes takes

    sampling(records) + max(floor, rows / n * operations / rate) + rows / n * noisy images
    + broadcast(weights) + reduce(clipped sums) + small messages + parameters * (noise + optimizer)

where a broadcast or a reduce of S bytes takes latency * hops + S / bandwidth (alpha-beta model), the better of a ring
(n - 1 hops) and a tree (2 log2 n hops), both pipelined.  Nothing is taken to overlap.

    python benchmarks/scale_model.py --json benchmarks/results/scale-model-2-cores.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin disturb other processes; before torch is loaded

import torch

COUNTS = (1, 2, 4, 8, 16, 32, 64)
PRESETS = ("paper-28", "gpu")
TERAFLOPS = (3.0, 10.0, 30.0)  # 3: what DPDM's published hours come to, see docs/comparing.md
RECORDS, SIDE, CLASSES = 60_000, 28, 10
GB = 1e9


@dataclass(frozen=True)
class Link:
    """Seconds of a hop, and bytes a second of one direction; assumed."""

    latency: float
    bandwidth: float


NVLINK, INFINIBAND, ETHERNET = Link(6e-6, 150 * GB), Link(15e-6, 20 * GB), Link(60e-6, 1.1 * GB)
CLUSTERS = {
    "8 GPUs a node, InfiniBand": (8, NVLINK, INFINIBAND),
    "8 GPUs a node, 10 GbE": (8, NVLINK, ETHERNET),
    "1 GPU a node, 10 GbE": (1, NVLINK, ETHERNET),
}
TCP = 60e-6  # seconds of a small message, which goes over gloo


# ------------------------------------------------------------------------------------------------------ measured


def measured_run(processes: int, threads: int) -> list[dict[str, Any]]:
    """Steps of a run of so many processes, as the main one sees them; without the first, which builds things."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [*command, str(Path(__file__).with_name("scale_model_run.py")), folder],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=280,
        )
        steps: list[dict[str, Any]] = json.loads((Path(folder) / "steps.json").read_text())
    return steps[1:]


def _seconds(work: Any, times: int = 5) -> float:
    """Core-seconds, the least of some, on one thread: what other work on the machine does not change."""
    work()
    taken = []
    for _ in range(times):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return min(taken)


def unit_times() -> dict[str, float]:
    """Parameters and operations of the network of paper-28, and core-seconds of what GPUs do not do."""
    torch.set_num_threads(1)
    from torch.utils.flop_counter import FlopCounterMode

    from dpsyngen.diffusion.denoiser import NetworkDenoiser
    from dpsyngen.diffusion.loss import NoiseLevels, denoising_loss, make_noisy
    from dpsyngen.diffusion.unet import UNet
    from dpsyngen.privacy.noise import standard_normal
    from dpsyngen.privacy.randomness import Randomness, poisson_sample

    denoiser = NetworkDenoiser(UNet("base", SIDE, 1, CLASSES), CLASSES)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    count = sum(p.numel() for p in parameters)
    generator = torch.Generator().manual_seed(0)

    def noisy(rows: int) -> Any:
        images = torch.zeros(rows, 1, SIDE, SIDE)
        options: dict[str, Any] = {"num_classes": CLASSES, "label_dropout": 0.1, "generator": generator}
        return make_noisy(images, torch.zeros(rows, dtype=torch.int64), NoiseLevels(-1.2, 1.2), copies=8, **options)

    with FlopCounterMode(display=False) as counter:
        denoising_loss(denoiser, noisy(1)).sum().backward()
    optimizer = torch.optim.Adam(parameters)
    secret = Randomness.from_insecure_seed(0)
    return {
        "parameters": count,
        "operations_per_row": counter.get_total_flops() / 8,
        "noise_seconds_per_parameter": _seconds(lambda: standard_normal(secret, 0, count)) / count,
        "optimizer_seconds_per_parameter": _seconds(optimizer.step) / count,
        "sampling_seconds_per_record": _seconds(lambda: poisson_sample(secret, 0, 10**6, 0.01)) / 10**6,
        "noisy_seconds_per_row": _seconds(lambda: noisy(256)) / (256 * 8),
    }


# --------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Step:
    """A DP-SGD step of a preset."""

    batch: int
    copies: int
    records: int

    def seconds(
        self, n: int, unit: dict[str, float], teraflops: float, cluster: str, floor: float, small: float
    ) -> dict[str, float]:
        """Seconds of its parts on `n` GPUs; `small` are the bytes of small messages of one process."""
        rows = math.ceil(self.batch / n) * self.copies
        size = 4 * unit["parameters"]
        return {
            "network": max(floor, rows * unit["operations_per_row"] / (teraflops * 1e12)),
            "noisy images": rows * unit["noisy_seconds_per_row"],
            "sampling": self.records * unit["sampling_seconds_per_record"],
            "transfer": 2 * collective(size, n, cluster) + small_messages(small + 4 * self.batch / n, n),
            "noise": unit["parameters"] * unit["noise_seconds_per_parameter"],
            "optimizer": unit["parameters"] * unit["optimizer_seconds_per_parameter"],
        }


def collective(size: float, n: int, cluster: str) -> float:
    """Seconds to bring `size` bytes from one process to all, or to add them up in one."""
    per_node, inside, between = CLUSTERS[cluster]
    within, nodes = min(n, per_node), math.ceil(n / per_node)
    links = [(link, m) for link, m in ((inside, within), (between, nodes)) if m > 1]
    hops = sum(link.latency * min(m - 1, 2 * math.log2(m)) for link, m in links)
    return hops + max((size / link.bandwidth for link, _ in links), default=0.0)


def small_messages(size: float, n: int) -> float:
    """The command to all, as two broadcasts, and the figures of all to the main process, one after the other."""
    return TCP * (2 * math.log2(n) + 2 * (n - 1)) + (n - 1) * size / ETHERNET.bandwidth if n > 1 else 0.0


def steps_of(records: int) -> dict[Step, str]:
    """The steps of the presets, and the names of the presets that take them."""
    from dpsyngen.config import load_config, with_batch

    out: dict[Step, str] = {}
    for preset in PRESETS:
        p = with_batch(load_config({"privacy": {"epsilon": 1.0}}, preset=preset), records).private
        step = Step(p.batch, p.copies, records)
        out[step] = f"{out[step]} and {preset}" if step in out else preset
    return out


def tables(unit: dict[str, float], small: float, floor: float, records: int) -> list[dict[str, Any]]:
    """Print steps a second for each preset, rate and cluster, and what they consist of."""
    rows: list[dict[str, Any]] = []
    for (step, presets), rate in itertools.product(steps_of(records).items(), TERAFLOPS):
        print(f"\n{presets}: batch {step.batch:,}, K = {step.copies}; assumed {rate:g} teraflops a GPU")
        print(f"{'GPUs':>4}  " + "  ".join(f"{name:^33}" for name in CLUSTERS))
        print(f"{'':4}  " + "  ".join(f"{'steps/s':>9} {'ratio':>7} {'efficiency':>15}" for _ in CLUSTERS))
        found = {(n, c): step.seconds(n, unit, rate, c, floor, small) for n in COUNTS for c in CLUSTERS}
        total = {key: sum(parts.values()) for key, parts in found.items()}
        for n in COUNTS:
            cells = []
            for cluster in CLUSTERS:
                t, ratio = total[n, cluster], total[1, cluster] / total[n, cluster]
                cells.append(f"{1 / t:9.3f} {ratio:7.2f} {ratio / n:15.0%}")
                about = {"presets": presets, "teraflops": rate, "cluster": cluster, "gpus": n}
                rows.append({**about, "steps_per_second": 1 / t, "ratio": ratio, "seconds": found[n, cluster]})
            print(f"{n:4}  " + "  ".join(cells))
        first = next(iter(CLUSTERS))
        one, many, most = total[1, first], found[COUNTS[-1], first], total[COUNTS[-1], first]
        print("64, InfiniBand: " + ", ".join(f"{k} {v / most:.0%}" for k, v in many.items()))
        alone = sum(many[k] for k in ("sampling", "noise", "optimizer"))
        print(f"not shared out: {1e3 * alone:.0f} ms a step, so never more than {one / alone:.0f} times one GPU")
        # Noise is a function of (key, step), so it could be drawn while the GPUs compute.
        ahead = (one - many["noise"]) / (most - min(many["noise"], many["network"]))
        print(f"64 GPUs with the noise drawn while they compute: {ahead:.1f} times one")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--records", type=int, default=RECORDS, help="private images, for Poisson sampling")
    parser.add_argument("--floor", type=float, default=0.02, help="assumed least seconds of a pass on a GPU")
    options = parser.parse_args()
    unit = unit_times()
    print("\n".join(f"{k:33} {v:,.4g}" for k, v in unit.items()))
    runs = {f"{p} x {t}": measured_run(p, t) for p, t in ((1, 1), (2, 1), (4, 1), (1, 2))}
    size, carried = 4 * int(unit["parameters"]), {}
    for processes in (2, 4):
        found = [step["bytes"] for step in runs[f"{processes} x 1"]]
        for name in ("broadcast", "reduce"):
            if {f[name] for f in found} != {size}:
                sys.exit(f"{processes} processes: a step's {name} carried {found}, but the model has {size} bytes")
        small = statistics.mean(f["broadcast_object_list"] + f["gather_object"] for f in found)
        carried[processes] = small
        print(
            f"{processes} processes: {size:,} bytes of weights and of sums a step, as modelled; {small:,.0f} of others"
        )
    wall, cpu = (
        {k: statistics.mean(s[what] for s in v) for k, v in runs.items()} for what in ("seconds", "cpu_seconds")
    )
    # What of the main process's work is shared out, t = alone + shared / n, from 1 and 2 processes.
    shared = 2 * (cpu["1 x 1"] - cpu["2 x 1"])
    alone = cpu["1 x 1"] - shared
    print("seconds of a step here, processes x threads: " + ", ".join(f"{k}: {v:.2f}" for k, v in wall.items()))
    print("core-seconds of its main process: " + ", ".join(f"{k}: {v:.2f}" for k, v in cpu.items()))
    print(f"so {alone:.2f} + {shared:.2f} / n; expected for 4 {alone + shared / 4:.2f}, measured {cpu['4 x 1']:.2f}")
    rows = tables(unit, carried[2], options.floor, options.records)
    if options.json:
        about = {
            "cpu": platform.machine(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
            "torch": torch.__version__,
        }
        assumed = {"floor_seconds": options.floor, "tcp_seconds": TCP, "records": options.records}
        assumed |= {name: f"{per} a node, {inside}, {between}" for name, (per, inside, between) in CLUSTERS.items()}
        found = {"units": unit, "small_bytes": carried, "seconds": wall, "cpu_seconds": cpu, "steps": runs}
        document = {"machine": about, "assumed": assumed, "measured": found, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
