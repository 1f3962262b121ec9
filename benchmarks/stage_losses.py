"""Who denoises real images better at each noise level: the variants of an experiment, and programs alone.

    dpsyngen compare paper-small --out runs/paper
    dpsyngen stages --programs dead-leaves --proxy fashion-mnist --resolution 12 --preset paper-cpu --network nano \\
        --steps 600 --images 512 --set stages.variant=both --set public.learning_rate=3e-3 --set public.ema=0.98 \\
        --out runs/stages
    python benchmarks/stage_losses.py runs/paper fashion-mnist:test --programs runs/stages

Squared error on test images over that of the experiment's baseline (DPDM, or Gaussian for ``compare fashion-mnist``) at
the same ε and seed, mean and standard deviation over seeds: below 1 is better.
Private networks are told the class, networks of programs know none.  No guidance.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from dpsyngen.config import load_config
from dpsyngen.data import ImageDataset, load_images
from dpsyngen.diffusion.denoiser import Denoiser, NetworkDenoiser
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.experiments.experiment import Experiment
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.thresholds.gap import log_sigma_grid
from dpsyngen.training.networks import load_weights, make_denoiser
from dpsyngen.training.plan import Shape
from dpsyngen.training.run import Run

LEVELS = log_sigma_grid(0.5)


def losses(denoiser: Denoiser, test: ImageDataset, labels: torch.Tensor | None) -> np.ndarray:
    """Mean squared error of a pixel at each of LEVELS, with the same noise for every denoiser."""
    clean = to_float(torch.from_numpy(test.batch(np.arange(len(test)))))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    out = []
    with torch.no_grad():
        for level in LEVELS:
            sigma = torch.full((len(clean),), math.exp(level))
            out.append(float((denoiser(clean + math.exp(level) * noise, sigma, labels) - clean).square().mean()))
    return np.array(out)


def programs(folder: Path) -> list[NetworkDenoiser]:
    """Networks that `dpsyngen stages` trained on the program, one a seed; they know no class."""
    about = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    config = load_config({"network": about["network"]})
    out = []
    for name in about["networks"]:
        if name.startswith(f"{about['student']}-"):
            denoiser = make_denoiser(config, Shape(about["resolution"], about["channels"], (), 1), False, 0)
            load_weights(folder / "networks" / name, denoiser)
            out.append(denoiser.eval())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("test")
    parser.add_argument("--programs", type=Path, help="folder of dpsyngen stages")
    parser.add_argument("-n", type=int, default=2000, help="test images")
    args = parser.parse_args()
    experiment = Experiment(args.experiment)
    test = load_images(args.test, resolution=experiment.spec.data.resolution)
    test = test.subset(np.random.default_rng(0).permutation(len(test))[: args.n])
    found: dict[tuple[float, int, str], np.ndarray] = {}
    for job in experiment.jobs:
        if job.kind == "run" and experiment.result_path(job).exists():
            release = Run(experiment.run_path(job)).release
            row = f"{job.variant} {job.label}".strip()
            found[job.epsilon, job.seed, row] = losses(
                ReleasedGenerator(release).denoiser(), test, torch.from_numpy(test.labels)
            )
    for denoiser in programs(args.programs) if args.programs else ():
        alone = losses(denoiser, test, None)
        for epsilon, seed in sorted({key[:2] for key in found}):
            found[epsilon, seed, f"programs alone, network {len(found)}"] = alone
    print("epsilon,row,seeds," + ",".join(f"{level:.2f}" for level in LEVELS))
    ratios: dict[tuple[float, str], list[np.ndarray]] = defaultdict(list)
    for (epsilon, seed, row), loss in found.items():
        if (baseline := found.get((epsilon, seed, experiment.spec.baseline))) is not None:
            ratios[epsilon, row.partition(",")[0]].append(loss / baseline)
    for (epsilon, row), values in sorted(ratios.items()):
        cells = [f"{mean:.3f}" for mean in np.mean(values, 0)]
        if len(values) > 1:
            cells = [f"{cell}±{spread:.3f}" for cell, spread in zip(cells, np.std(values, 0, ddof=1), strict=True)]
        print(f"{epsilon:g},{row},{len(values)},{','.join(cells)}")


if __name__ == "__main__":
    main()
