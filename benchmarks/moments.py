"""What DP moments know of images, and what they cost: squared error of the Wiener filter, time and memory.

    python benchmarks/moments.py fashion-mnist            # ε = ∞, 10, 1, 0.2; rank 200
    python benchmarks/moments.py fashion-mnist -n 3000 --epsilon 1
    python benchmarks/moments.py cifar10/train.parquet --test cifar10/test.parquet --resolution 64 -n 20000 --epsilon 10

"means": squared error of the class means over their spread around the mean of all.  "white": the same moments with a
texture of equal power at every frequency and of the same energy, over the former.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dpsyngen.data import ImageDataset, load_images
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.samplers import to_float
from dpsyngen.privacy.accounting import calibrate_noise, default_delta
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training.moments import estimate_moments
from dpsyngen.training.plan import plan_moments

SIGMAS = (0.05, 0.1, 0.3, 1.0, 3.0, 10.0)


def errors(denoiser: GaussianDenoiser, test: ImageDataset) -> np.ndarray:
    """Mean squared error, summed over pixels, at each σ."""
    clean, labels = to_float(torch.from_numpy(test.batch(np.arange(len(test))))), torch.from_numpy(test.labels)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    out = []
    for sigma in SIGMAS:
        got = denoiser(clean + sigma * noise, torch.full((len(clean),), sigma), labels)
        out.append(float((got - clean).square().flatten(1).sum(1).mean()))
    return np.array(out)


def error_of_means(means: Tensor, train: ImageDataset) -> float:
    """Squared error of class means [K, D] over the spread of the true ones around the mean of all."""
    rows, labels = to_float(torch.from_numpy(train.batch(np.arange(len(train))))).flatten(1), torch.tensor(train.labels)
    counts = torch.bincount(labels, minlength=len(means))
    truth = torch.zeros_like(means).index_add_(0, labels, rows) / counts[:, None]
    off, spread = ((x.square().sum(1) * counts).sum() for x in (means - truth, truth - rows.mean(0)))
    return float(off / spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a named set, or with --test whatever --data takes")
    parser.add_argument("--test")
    parser.add_argument("-n", type=int, help="use the first N of the shuffled images")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[math.inf, 10.0, 1.0, 0.2])
    parser.add_argument("--rank", type=int, default=200)
    args = parser.parse_args()
    sources = (args.data, args.test) if args.test else (f"{args.data}:train", f"{args.data}:test")
    train, test = (load_images(source, resolution=args.resolution) for source in sources)
    order = np.random.default_rng(0).permutation(len(train))[: args.n]
    train, test = train.subset(order), test.subset(np.random.default_rng(1).permutation(len(test))[:1000])
    shape, classes, n = (train.channels, train.resolution, train.resolution), train.num_classes, len(train)
    print(f"{n:,} images {'x'.join(map(str, shape))}; error at σ =", *SIGMAS)
    for target in args.epsilon:
        z = 0.0 if math.isinf(target) else calibrate_noise(target, default_delta(n), sampling_rate=1.0, steps=1)
        key = Randomness.from_insecure_seed(0)  # a benchmark: not private
        start = time.perf_counter()
        moments = estimate_moments(train, classes, n, plan_moments(z, classes), key, rank=args.rank)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        denoiser = GaussianDenoiser(moments, shape)
        ready = time.perf_counter() - start - seconds
        found = errors(denoiser, test)
        outside = 1 - moments.basis.square().sum(1)
        level = denoiser.rho.sum() / (outside @ moments.rest)
        white = GaussianDenoiser(replace(moments, spectrum=torch.full_like(moments.rest, float(level))), shape)
        cost = f"{seconds:.1f} s, denoiser {ready:.1f} s, peak {memory:.2f} GiB"
        print(
            f"ε = {target:g}: d = {moments.basis.shape[1]}, {cost};",
            *(f"{e:.1f}" for e in found),
            " white:",
            *(f"{r:.2f}" for r in errors(white, test) / found),
            f" means: {error_of_means(moments.means, train):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
