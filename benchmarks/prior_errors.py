"""Where priors beat the Wiener filter, and on what: squared error over that of the filter by noise level.

    python benchmarks/prior_errors.py --prior shipped --prior mine.safetensors \\
        --images train.parquet test.parquet -4.6 --patches -4.4 A.png B.png

Each prior on families and scenes of a stream that no training sees; on images of a data set (`--images TRAIN TEST Z`,
with Z = log₁₀ z/n of its moments); and on patches of 32x32 pixels, at sizes from 1 to 1/4, of photographs, each of them
a class (`--patches Z FILE…`).  Both may be given again.  Below 1 the prior is better.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from dpsyngen.data import ImageDataset, load_images
from dpsyngen.diffusion.gaussian import GaussianDenoiser
from dpsyngen.diffusion.prior import PRIOR_SIZE, SEEN, read_prior
from dpsyngen.diffusion.unet import UNet
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.training import prior as training
from dpsyngen.training.moments import estimate_moments
from dpsyngen.training.plan import plan_moments

SIDE, PATCHES, FRESH = 32, 4000, 120  # pixels; of a photograph, for its moments and to measure on
SIZES = (1, 1.5, 2, 3, 4)


def task(known: ImageDataset, fresh: list[np.ndarray], noise: float) -> training.Task:
    """Moments of `known` with noise z/n = `noise`, and `fresh` images of each class."""
    classes, n = known.num_classes if known.num_classes > 1 else 0, len(known)
    plan, secret = plan_moments(noise * n, max(classes, 1)), Randomness.from_insecure_seed(1)
    moments = estimate_moments(known, classes, n, plan, secret, rank=200)
    shape = (known.channels, known.resolution, known.resolution)
    return training.Task(torch.from_numpy(np.stack(fresh)), GaussianDenoiser(moments, shape))


def of_images(train: str, test: str, noise: float) -> training.Task:
    known, other = load_images(train), load_images(test)
    images, labels = other.array(), np.asarray(other.labels)
    return task(known, [images[labels == c][:FRESH] for c in range(other.num_classes)], noise)


def patches(path: str, count: int, seed: int) -> np.ndarray:
    """uint8 [count, 3, 32, 32], anywhere in a photograph at a random size."""
    rng, whole = np.random.default_rng(seed), Image.open(path).convert("RGB")
    sides = [(int(whole.width / s), int(whole.height / s)) for s in SIZES]
    smaller = [np.asarray(whole.resize(s, Image.Resampling.LANCZOS)) for s in sides if min(s) > 2 * SIDE]
    out = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for n in range(count):
        picture = smaller[rng.integers(len(smaller))]
        i, j = (rng.integers(side - SIDE) for side in picture.shape[:2])
        out[n] = picture[i : i + SIDE, j : j + SIDE]
    return out.transpose(0, 3, 1, 2)


def of_photographs(noise: float, paths: list[str]) -> training.Task:
    known = np.concatenate([patches(path, PATCHES, 0) for path in paths])
    labels = np.repeat(np.arange(len(paths)), PATCHES)
    dataset = ImageDataset(known, labels, tuple(map(str, range(len(paths)))), "patches")
    return task(dataset, [patches(path, FRESH, 1) for path in paths], noise)


def tasks(args: argparse.Namespace) -> Iterator[tuple[str, training.Task]]:
    held_out = training.PriorSettings(args.channels, seed=1)
    for program in ("family", "scene"):
        with patch.dict(training.PROGRAMS, {args.channels: program}):
            for size in (8, 16, 24):
                for number in range(3):
                    yield f"{program} {number}, {size} pixels", training.family_task(held_out, size, number)
    for train, test, noise in args.images:
        yield f"{test}, {noise}", of_images(train, test, 10 ** float(noise))
    for noise, *paths in args.patches:
        yield f"patches of {' '.join(paths)}, {noise}", of_photographs(10 ** float(noise), paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", action="append", required=True, help="shipped, or a file; may be given again")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3))
    parser.add_argument("--images", action="append", nargs=3, default=[], metavar=("TRAIN", "TEST", "Z"))
    parser.add_argument("--patches", action="append", nargs="+", default=[], metavar="Z FILE")
    args = parser.parse_args()
    networks = {}
    for name in args.prior:
        networks[name] = UNet(PRIOR_SIZE, SIDE, args.channels, 0, inputs=SEEN * args.channels).eval()
        networks[name].load_state_dict(read_prior(name, args.channels).weights)
    print("log σ:", " ".join(f"{level:g}" for level in training.LEVELS))
    for what, one in tasks(args):
        for name, network in networks.items():
            ratios = " ".join(f"{ratio:.2f}" for ratio in training.error_ratios(network, one, 128))
            print(f"{what} | {name} | {ratios}", flush=True)


if __name__ == "__main__":
    main()
