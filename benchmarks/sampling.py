"""What drawing costs: few steps of the house's sampler against 50 steps of DDIM, from one generator, in turns.

    python benchmarks/sampling.py RUN                            # times, and the Fréchet distance between the two
    python benchmarks/sampling.py RUN --train DATA --test DATA   # and accuracy scores and distances to real images

RUN is a run directory or its release half.  Both sides draw with the same labels and seeds on the same threads, batch
by batch in turns, so that a slow moment of the machine hits both.  Figures against real images are private ones: use
public data.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray

from dpsyngen import Generator
from dpsyngen.data import load_images
from dpsyngen.evaluation.cas import classification_accuracy
from dpsyngen.evaluation.distances import FeatureStatistics, frechet_distance

SLOW: dict[str, Any] = {"sampler": "ddim", "steps": 50}
BATCH = 250


def pixels(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Images averaged over 2x2 pixels, as rows: coarse enough for a Fréchet distance of some thousand images."""
    n, c, h, w = images.shape
    cut = images[:, :, : h // 2 * 2, : w // 2 * 2].astype(np.float64) / 127.5 - 1
    return cut.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5)).reshape(n, -1)


def draw(
    generator: Generator, count: int
) -> tuple[dict[str, NDArray[np.uint8]], NDArray[np.int64] | None, dict[str, float]]:
    """Both sides' images, their labels and the seconds that each took."""
    labels = generator.labels(count)
    sides = {"fast": generator.settings(seed=1), "slow": generator.settings(seed=1, **SLOW)}
    parts: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in sides}
    seconds = dict.fromkeys(sides, 0.0)
    for name in sides:
        next(generator.stream(2, sides[name], labels=None if labels is None else labels[:2]))  # warm up
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        for name in sides:
            own = generator.settings(seed=1 + start, **({} if name == "fast" else SLOW))
            part = None if labels is None else labels[start : start + size]
            begun = time.perf_counter()
            parts[name] += list(generator.stream(size, own, labels=part, batch_size=size))
            seconds[name] += time.perf_counter() - begun
    return {name: np.concatenate(p) for name, p in parts.items()}, labels, seconds


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--train", help="real training images, for the Fréchet distance")
    parser.add_argument("--test", help="real test images with labels, for the accuracy score")
    given = parser.parse_args()
    release = given.run / "release" if (given.run / "release").is_dir() else given.run
    generator = Generator(release)
    images, labels, seconds = draw(generator, given.count)
    fast = generator.settings()
    out: dict[str, Any] = {
        "images": given.count,
        "threads": torch.get_num_threads(),
        "fast": f"{fast.sampler}, {fast.steps} steps",
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "ratio": round(seconds["slow"] / seconds["fast"], 2),
        "frechet_between": round(frechet_distance(pixels(images["fast"]), pixels(images["slow"])), 4),
    }
    if given.train:
        real = load_images(given.train, resolution=generator.resolution)
        some = np.random.default_rng(0).choice(len(real), min(10_000, len(real)), replace=False)
        statistics = FeatureStatistics.of(pixels(real.batch(np.sort(some))))
        out["frechet"] = {k: round(frechet_distance(pixels(v), statistics), 4) for k, v in images.items()}
    if given.test and labels is not None:
        test = load_images(given.test, resolution=generator.resolution)
        assert test.labels is not None
        out["cnn"] = {
            k: round(
                classification_accuracy(
                    v,
                    labels,
                    test.batch(np.arange(len(test))),
                    test.labels,
                    num_classes=len(generator.class_names),
                    classifiers=("cnn",),
                )["cnn"].accuracy,
                4,
            )
            for k, v in images.items()
        }
    print(f"{out['fast']}: {seconds['fast']:.1f} s for {given.count:,} images on {out['threads']} threads")
    print(f"ddim, 50 steps: {seconds['slow']:.1f} s, {out['ratio']:.1f} times as long")
    print(json.dumps(out))


if __name__ == "__main__":
    main()
