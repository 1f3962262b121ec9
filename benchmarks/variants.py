"""The five variants on equal terms: same data, ε, steps, batch and network, several seeds; the table of the README.

Each run is a job; jobs that are done are skipped, so the script can be stopped and started again, and several copies
of it may share one output folder (one core each: OMP_NUM_THREADS=1).

    python benchmarks/variants.py --out runs/variants            # run what is missing, then print the table
    python benchmarks/variants.py --out runs/variants --table    # only the table

The runs use reproducible noise (--insecure-seed), so they are stamped NOT PRIVATE; the noise has the same law.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from dpsyngen import api
from dpsyngen.config import load_config
from dpsyngen.data import ImageDataset, load_images
from dpsyngen.evaluation import FeatureSpec, FeatureStatistics, classification_accuracy, frechet_distance
from dpsyngen.generator import Generator

VARIANTS = ("dpdm", "finetune", "cleaning", "coarse", "both")
FEATURES = ("pixels-pca", "efficientnet-lite0")
IMAGES = 3000


class Real:
    """Statistics of the real images, computed once a process."""

    def __init__(self, train: ImageDataset, test: ImageDataset) -> None:
        self.train, self.test = train, test
        rng = np.random.default_rng(0)
        rows = np.sort(rng.choice(len(train), min(10_000, len(train)), replace=False))
        real = train.batch(rows)
        self.extractors = {}
        self.statistics = {}
        self.floor = {}
        for name in FEATURES:
            extractor = FeatureSpec(name).make()
            extractor.fit(real)
            self.extractors[name] = extractor
            self.statistics[name] = FeatureStatistics.of(extractor(real))
            held_out = FeatureStatistics.of(extractor(test.images[: len(real)]))
            self.floor[name] = frechet_distance(held_out, self.statistics[name])


def job(real: Real, variant: str, seed: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train, sample and measure one run."""
    settings = {
        "privacy": {"epsilon": args.epsilon, "insecure_seed": seed},
        "stages": {"variant": variant},
        "network": {"seed": seed},
        "program": {"seed": seed, "params": {"mode": "reference"}},  # as when the results in README were made
    }
    config = load_config(settings, preset=args.preset)
    begun = time.time()
    training = api.prepare(config, folder, real.train)
    for p in training.steps():
        if p.step % 50 == 0:
            print(f"{variant} seed {seed} {p.phase} {p.step}/{p.steps} {time.time() - begun:.0f} s", flush=True)
    trained = time.time()
    samples = Generator(training.run.release).sample(IMAGES, seed=seed, sampler="dpmpp", steps=15)
    sampled = time.time()
    assert samples.labels is not None
    assert real.test.labels is not None
    scores = classification_accuracy(
        samples.images,
        samples.labels,
        real.test.images,
        real.test.labels,
        num_classes=real.test.num_classes,
        seed=seed,
    )
    row: dict[str, Any] = {
        "variant": variant,
        "seed": seed,
        "epsilon": training.ledger.epsilon() if args.epsilon != float("inf") else "inf",
        "delta": training.ledger.delta,
        "noise_multiplier": training.plan.mechanism.noise_multiplier,
        "parameters": training.parameters,
        "seconds_training": trained - begun,
        "seconds_sampling": sampled - trained,
        "cas": {name: r.accuracy for name, r in scores.items()},
        "frechet": {},
        "floor": real.floor,
        "images": IMAGES,
        "records": len(real.train),
        "config": config.model_dump(mode="json"),
    }
    for name, extractor in real.extractors.items():
        row["frechet"][name] = frechet_distance(FeatureStatistics.of(extractor(samples.images)), real.statistics[name])
    return row


def table(out: Path) -> str:
    """The results as Markdown: mean ± standard deviation over seeds."""
    rows = [json.loads(p.read_text()) for p in sorted(out.glob("*.json"))]
    lines = [
        "| variant | seeds | CNN % | MLP % | logistic % | Fréchet, EfficientNet | Fréchet, pixels | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def cell(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
        v = np.array(values) * scale
        spread = f" ± {v.std(ddof=1):.{digits}f}" if len(v) > 1 else ""
        return f"{v.mean():.{digits}f}{spread}"

    for variant in VARIANTS:
        mine = [r for r in rows if r["variant"] == variant]
        if mine:
            lines.append(
                f"| {variant} | {len(mine)} | {cell([r['cas']['cnn'] for r in mine], 100)} "
                f"| {cell([r['cas']['mlp'] for r in mine], 100)} | {cell([r['cas']['logreg'] for r in mine], 100)} "
                f"| {cell([r['frechet']['efficientnet-lite0'] for r in mine])} "
                f"| {cell([r['frechet']['pixels-pca'] for r in mine], 1, 2)} "
                f"| {cell([r['seconds_training'] / 60 for r in mine])} |"
            )
    if rows:
        floor = rows[0]["floor"]
        lines.append(
            f"| real test images |  |  |  |  | {floor['efficientnet-lite0']:.1f} | {floor['pixels-pca']:.2f} |  |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--preset", default="cpu-small")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.table:
        real = Real(load_images(args.data), load_images(f"{args.data}:test"))
        for seed in range(args.seeds):
            for variant in args.variants:
                name = f"{variant}-{seed}"
                claim = args.out / f"{name}.claimed"
                try:
                    claim.touch(exist_ok=False)
                except FileExistsError:
                    continue  # done, or another copy of this script is at it
                folder = args.out / name
                try:
                    row = job(real, variant, seed, args, folder)
                except BaseException:
                    claim.unlink()
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                (args.out / f"{name}.json").write_text(json.dumps(row, indent=1))
                print(json.dumps({k: row[k] for k in ("variant", "seed", "cas", "frechet")}), flush=True)
    print(table(args.out))


if __name__ == "__main__":
    main()
