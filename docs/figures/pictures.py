"""Figures made of images: an image at several noise levels, and class means as the Gaussian mechanism releases them.

Both are of images that are nobody's secret: dead leaves, and scikit-learn's digits.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from dpsyngen.data import load_images
from dpsyngen.diffusion.samplers import to_float, to_uint8
from dpsyngen.privacy.accounting import calibrate_noise, default_delta
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import image_grid, make_program
from dpsyngen.training.moments import estimate_moments
from dpsyngen.training.plan import plan_moments

SIGMAS = (0.0, 0.02, 0.05, 0.2, 0.7, 2.0, 7.0, 80.0)
EPSILONS = (float("inf"), 10.0, 1.0, 0.2)


def noise_levels() -> Image.Image:
    """x₀ + σ·n for growing σ; shown as min(max(·, −1), 1) up to σ = 1, and scaled to that range above."""
    clean = to_float(torch.from_numpy(make_program("dead-leaves", resolution=64, channels=3, seed=4).batch([3])))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    shown = [to_uint8((clean + sigma * noise) / max(1.0, sigma)) for sigma in SIGMAS]
    return image_grid(np.concatenate([np.asarray(x) for x in shown]), len(SIGMAS), scale=1, pad=2)


def class_means() -> Image.Image:
    """Means of the ten digits, a row for each ε of the moments alone."""
    digits = load_images("digits")
    n = len(digits)
    rows = []
    for number, epsilon in enumerate(EPSILONS):
        z = 0.0 if epsilon == float("inf") else calibrate_noise(epsilon, default_delta(n), sampling_rate=1.0, steps=1)
        fitted = estimate_moments(digits, 10, n, plan_moments(z, 10), Randomness.from_insecure_seed(number), rank=40)
        rows.append(to_uint8(fitted.means.float().view(10, 1, 8, 8)))
    return image_grid(np.concatenate([np.asarray(r) for r in rows]), 10, scale=6, pad=2)
