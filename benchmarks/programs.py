"""How fast programs draw: dead leaves against the published loop, all families, threads, and the share of training.

    python benchmarks/programs.py            # everything, about six minutes
    python benchmarks/programs.py --quick    # four ratios in less than 50 seconds; the last line is JSON

The published loop (Baradad et al., arXiv 2106.05963, as used by Choi et al., arXiv 2412.09842) is written anew here
from its description, with the operations that set its cost: a table of 200 radii searched for each leaf, drawing by
OpenCV on a NumPy canvas, and a look over the whole canvas after each leaf for pixels still black, 5,000 leaves at most.
Both sides run on one thread in this process, in turns, so that a slow moment of the machine hits both.

Needs ``pip install 'dpsyngen[bench]'``.
"""

# ruff: noqa: NPY002 (the published loop uses NumPy's global generator, and its cost is what is compared)

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# As the command line does: threads that spin while they wait slow down those that draw.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from numpy.typing import NDArray

from dpsyngen.programs import Program, make_program, program_names

PUBLISHED_SHAPES = ("disc", "square", "oriented-square", "rectangle", "triangle", "quadrilateral")
MAX_LEAVES = 5000
CASES = {"disc_32": ("disc", 32), "mixed_32": ("mixed", 32), "disc_128": ("disc", 128), "mixed_128": ("mixed", 128)}

# What families are drawn with where their defaults do not do.
GIVEN: dict[str, dict[str, Any]] = {
    "mixture": {"programs": ["dead-leaves", "spectrum", "contours"]},
    **{name: {"source": "dead-leaves"} for name in ("affine", "blur", "invert")},
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "dead-leaves, reference": ("dead-leaves", {"mode": "reference"}),
    "dead-leaves, supersample 4": ("dead-leaves", {"supersample": 4}),
    "random-network, random": ("random-network", {"kind": "random"}),
    "random-network, high-frequency": ("random-network", {"kind": "high-frequency"}),
}


def radius_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """200 radii as fractions of the image, and their cumulative distribution ∝ r⁻³ − 1."""
    radii = np.linspace(0.03, 1.0, 200)
    weights = radii**-3.0 - 1.0
    return radii, np.cumsum(weights / weights.sum())


def published_image(resolution: int, shape: str, table: tuple[NDArray[np.float64], NDArray[np.float64]]) -> NDArray:
    """One image as the published loop draws it, uint8 [H, W, 3]; black pixels are left if the cap is reached."""
    import cv2

    radii, cumulative = table
    image = np.zeros((resolution, resolution, 3), dtype=np.uint8)
    for _ in range(MAX_LEAVES):
        kind = random.choice(PUBLISHED_SHAPES) if shape == "mixed" else shape
        chosen = radii[np.argmin(np.abs(cumulative - np.random.uniform()))]
        radius = max(int(chosen * resolution), 1)
        colour = tuple(int(level) for level in np.random.uniform(0, 1, 3) * 255)
        x, y = np.array(np.random.uniform(0, 1, 2) * resolution, dtype="int")
        if kind == "disc":
            cv2.circle(image, (int(x), int(y)), radius, colour, thickness=-1)
        else:
            cv2.fillPoly(image, [corners(kind, x, y, radius)], color=colour)
        if (image.sum(axis=-1) == 0).sum() == 0:
            break
    return image


def corners(kind: str, x: int, y: int, radius: int) -> NDArray[np.int32]:
    """Corners of a published leaf around (x, y)."""
    if kind in ("square", "oriented-square"):
        half = radius / np.sqrt(2.0)
        points = np.array([[-half, -half], [half, -half], [half, half], [-half, half]])
        if kind == "oriented-square":
            angle = np.random.uniform(0, 2 * np.pi)
            points = points @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    elif kind == "rectangle":
        angle = np.random.uniform(0, np.pi / 2)
        a, b = radius * np.cos(angle), radius * np.sin(angle)
        points = np.array([[-a, -b], [a, -b], [a, b], [-a, b]])
    else:
        angles = np.sort(np.random.uniform(0, 2 * np.pi, 3 if kind == "triangle" else 4))
        points = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.array(points + np.array([x, y]), dtype=np.int32)


def rate(draw: Callable[[int], Any], seconds: float, step: int) -> tuple[int, float]:
    """Call ``draw(first)`` for `step` images at a time until `seconds` have passed; returns (images, seconds)."""
    begun = time.perf_counter()
    count = 0
    while (elapsed := time.perf_counter() - begun) < seconds:
        draw(count)
        count += step
    return count, elapsed


def draw_range(program: Program, offset: int, step: int, first: int) -> None:
    program.batch(range(offset + first, offset + first + step))


def compare(shape: str, resolution: int, seconds: float, rounds: int) -> dict[str, float]:
    """Images a second of both sides, measured in turns, and the ratio."""
    program = make_program("dead-leaves", resolution=resolution, channels=3, shape=shape)
    program.batch(range(4))
    table = radius_table()
    step = 200 if resolution <= 32 else 50
    totals = np.zeros((2, 2))
    for number in range(rounds):
        share = seconds / rounds
        offset = number * 10**6
        totals[0] += rate(lambda _: published_image(resolution, shape, table), 0.9 * share, 1)
        totals[1] += rate(partial(draw_range, program, offset, step), 0.1 * share, step)
    theirs, ours = totals[:, 0] / totals[:, 1]
    return {"published": theirs, "ours": ours, "ratio": ours / theirs, "published_images": totals[0, 0]}


def thread_scaling(program: Program, images: int, rounds: int = 5) -> float:
    """How many times faster two threads draw; the median of pairs measured one after the other."""
    ratios = []
    for number in range(rounds):
        chosen = range(number * images, (number + 1) * images)
        times = []
        for threads in (1, 2):
            begun = time.perf_counter()
            program.batch(chosen, threads=threads)
            times.append(time.perf_counter() - begun)
        ratios.append(times[0] / times[1])
    return float(np.median(ratios))


def family_rate(name: str, params: dict[str, Any], resolution: int, seconds: float) -> float:
    """Images a second on one thread."""
    program = make_program(name, resolution=resolution, channels=3, **params)
    program.batch(range(4))
    count, elapsed = rate(lambda n: program.batch(range(n, n + 50)), seconds, 50)
    return count / elapsed


def training_share(
    preset: str, name: str, resolution: int, channels: int, distinct: int | None = None
) -> tuple[float, float]:
    """Seconds of a step of training on a program, and of drawing within it: means over all public steps of the preset.

    `distinct` replaces the preset's ``public.distinct`` if given.
    """
    import torch

    from dpsyngen.config import load_config
    from dpsyngen.diffusion.loss import NoiseLevels
    from dpsyngen.privacy.randomness import Randomness
    from dpsyngen.training.networks import make_denoiser
    from dpsyngen.training.plan import Shape
    from dpsyngen.training.public import PublicImages, PublicStep
    from dpsyngen.workers import Workers

    drawing: list[float] = []

    class Timed(PublicImages):
        def __call__(self, step: int, device: torch.device) -> torch.Tensor:
            begun = time.perf_counter()
            images = super().__call__(step, device)
            drawing.append(time.perf_counter() - begun)
            return images

    config = load_config({} if distinct is None else {"public": {"distinct": distinct}}, preset=preset)
    denoiser = make_denoiser(config, Shape(resolution, channels, (), 1000), False, 0)
    program = make_program(name, resolution=resolution, channels=channels)
    levels = NoiseLevels(config.network.noise_mean, config.network.noise_std)
    randomness, workers = Randomness.from_insecure_seed(config.program.seed), Workers(None)
    take = PublicStep(program, levels, config.public, randomness, 0, workers)
    take.images = Timed(program, config.public.batch, 0, config.public.distinct, randomness, workers.count)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4)
    whole = []
    for step in range(config.public.steps):
        begun = time.perf_counter()
        take(denoiser, optimizer, step)
        whole.append(time.perf_counter() - begun)
    return float(np.mean(whole[1:])), float(np.mean(drawing[1:]))


TRAINING: tuple[tuple[str, str, int, int, int | None], ...] = (
    ("demo", "dead-leaves", 8, 1, None),
    ("paper-cpu", "dead-leaves", 28, 1, None),
    ("paper-cpu", "dead-leaves", 32, 3, None),
    ("paper-cpu", "random-network", 32, 3, None),
    ("paper-cpu", "random-network", 32, 3, 6400),
)


def measure_dead_leaves(quick: bool) -> dict[str, dict[str, float]]:
    print("dead leaves, RGB, one thread: images a second")
    out = {}
    for key, (shape, resolution) in CASES.items():
        found = out[key] = compare(shape, resolution, *((9.0, 3) if quick else (30.0, 6)))
        print(
            f"  {key:10} published {found['published']:8.2f} ({found['published_images']:.0f} images)   "
            f"ours {found['ours']:9.0f}   ratio {found['ratio']:7.0f}",
            flush=True,
        )
    return out


def measure_threads() -> dict[str, float]:
    print("two threads against one: times as fast")
    out = {}
    for key, (shape, resolution) in CASES.items():
        program = make_program("dead-leaves", resolution=resolution, channels=3, shape=shape)
        out[key] = thread_scaling(program, 6000 if resolution <= 32 else 1500)
        print(f"  {key:10} {out[key]:.2f}", flush=True)
    return out


def measure_families() -> dict[str, dict[str, float]]:
    print("all families, RGB, one thread: images a second at 32, 64 and 128 px")
    families = {**{name: (name, GIVEN.get(name, {})) for name in program_names()}, **MORE}
    out = {}
    for label, (name, params) in families.items():
        out[label] = {str(size): family_rate(name, params, size, 1.0) for size in (32, 64, 128)}
        print(f"  {label:34}" + "".join(f"{r:10.0f}" for r in out[label].values()), flush=True)
    return out


def measure_training() -> list[dict[str, Any]]:
    import torch

    print(f"public training, {torch.get_num_threads()} threads")
    out = []
    for preset, name, resolution, channels, distinct in TRAINING:
        step, drawing = training_share(preset, name, resolution, channels, distinct)
        out.append({"preset": preset, "program": name, "resolution": resolution, "distinct": distinct})
        out[-1] |= {"step_ms": 1e3 * step, "drawing_ms": 1e3 * drawing, "share": drawing / step}
        print(
            f"  {preset:10} {name:15} {resolution:3} px{'' if distinct is None else f', {distinct} distinct'}: "
            f"step {1e3 * step:7.1f} ms, drawing {1e3 * drawing:6.2f} ms of it: {100 * drawing / step:5.2f} %",
            flush=True,
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the four ratios, in less than 50 seconds")
    parser.add_argument("--json", type=Path, help="also write everything that was measured to this file")
    arguments = parser.parse_args()
    import cv2

    cv2.setNumThreads(1)
    random.seed(0)
    np.random.seed(0)
    found: dict[str, Any] = {"cores": os.cpu_count(), "date": datetime.date.today().isoformat()}
    found["dead_leaves"] = measure_dead_leaves(arguments.quick)
    if not arguments.quick:
        found["two_threads"] = measure_threads()
        found["families"] = measure_families()
        found["training"] = measure_training()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: round(case["ratio"], 1) for key, case in found["dead_leaves"].items()}))


if __name__ == "__main__":
    main()
