"""Draws images from the ONNX files beside it: NumPy and onnxruntime, no PyTorch, no dpsyngen.

    python sample.py -n 16 --out images.npz
    python sample.py -n 16 --out folder --classes 3,7 --seed 5

This file stands in the folders that ``dpsyngen export --format onnx`` writes.  It takes the same steps as dpsyngen does
and starts from the same noise, so images agree up to rounding.  SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Denoise = Callable[[np.ndarray, float], np.ndarray]


class OnnxGenerator:
    """A generator in ONNX.

    Args:
        folder: with ``denoiser.json`` and the files that it names.
        providers: of onnxruntime, such as ``["CUDAExecutionProvider"]``; None: the CPU.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] | None = None) -> None:
        import onnxruntime  # type: ignore[import-untyped]

        folder = Path(folder)
        self.about: dict[str, Any] = json.loads((folder / "denoiser.json").read_text(encoding="utf-8"))
        if self.about["format"] != 1:
            raise ValueError(f"denoiser.json is of format {self.about['format']}, but this file reads 1.")
        self.class_names: list[str] = self.about["class_names"]
        chosen = list(providers or ["CPUExecutionProvider"])
        files = [d["file"] for d in self.about["denoisers"].values()]
        files += [self.about["start"]["file"]] if self.about["start"] else []
        self._sessions = {f: onnxruntime.InferenceSession(str(folder / f), providers=chosen) for f in files}

    def owner(self, sigma: float) -> dict[str, Any]:
        """The stage that answers at a noise level; a threshold itself belongs to the private stage."""
        level = math.log(sigma)
        bounds = [(s, _low(s), _high(s)) for s in self.about["stages"]]
        private = [s for s, low, high in bounds if s["trained_by"] == "private" and low <= level <= high]
        return (private or [s for s, low, high in bounds if low <= level < high])[0]

    def denoise(self, x: np.ndarray, sigma: float, labels: np.ndarray | None, guidance: float = 1.0) -> np.ndarray:
        """D(x; σ, label).

        Args:
            x: fp32 [N, C, H, W].
            sigma: noise level of all of them, > 0.
            labels: int64 [N] in 0..K-1, or None.
            guidance: weight of classifier-free guidance in the private stage.

        Returns:
            fp32 [N, C, H, W].
        """
        stage = self.owner(sigma)
        known = None if stage["trained_by"] == "public" else labels
        out = self._call(stage["denoiser"], x, sigma, known)
        private = stage["trained_by"] == "private" or len(self.about["stages"]) == 1
        if guidance == 1 or known is None or not private:
            return out
        without = self._call(stage["denoiser"], x, sigma, None)
        guided: np.ndarray = without + np.float32(guidance) * (out - without)
        return guided

    def _call(self, denoiser: str, x: np.ndarray, sigma: float, labels: np.ndarray | None) -> np.ndarray:
        about = self.about["denoisers"][denoiser]
        feed = {"x": x, "sigma": np.full(len(x), sigma, np.float32)}
        out: np.ndarray = self._sessions[about["file"]].run(None, feed | self._labels(about, labels, len(x)))[0]
        return out

    def _labels(self, about: dict[str, Any], labels: np.ndarray | None, count: int) -> dict[str, np.ndarray]:
        if not about["labels"]:
            return {}
        none = np.full(count, len(self.class_names), np.int64)  # the number of classes stands for "no class"
        return {"labels": none if labels is None else labels.astype(np.int64)}

    def labels(self, count: int, classes: Sequence[int | str] | None = None) -> np.ndarray | None:
        """Classes (all of them, or those given by name or number) in turn; None if there are none."""
        if not self.class_names:
            return None
        chosen = range(len(self.class_names)) if classes is None else [self._class(c) for c in classes]
        return np.array([chosen[i % len(chosen)] for i in range(count)], np.int64)

    def _class(self, given: int | str) -> int:
        number = self.class_names.index(str(given)) if str(given) in self.class_names else int(given)
        if not 0 <= number < len(self.class_names):
            raise ValueError(f"there is no class {given!r}.")
        return number

    def sample(
        self,
        count: int,
        labels: np.ndarray | None = None,
        *,
        seed: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 256,
    ) -> np.ndarray:
        """Draw images; what is None is as the training run would have it.

        Args:
            count: how many.
            labels: [count], from :meth:`labels`.
            seed: image i follows from (seed, i, its class).
            sampler: "ddim", "heun" or "dpmpp".
            steps: sampler steps.
            guidance: weight of classifier-free guidance.
            batch_size: images at a time.

        Returns:
            uint8 [count, C, H, W].
        """
        d = self.about["sampling"]
        name = sampler or d["sampler"]
        churn = d["churn"] if name == d["sampler"] else 0.0
        weight = d["guidance"] if guidance is None else guidance
        start = self.about["start"]
        number = 1 if len(self.about["stages"]) == 1 and start else steps or d["steps"]
        sigmas = karras_steps(number, d["sigma_min"], start["sigma"] if start else d["sigma_max"], d["rho"])
        shape = (self.about["channels"], self.about["resolution"], self.about["resolution"])
        out = []
        for first in range(0, count, batch_size):
            last = min(first + batch_size, count)
            y = None if labels is None else labels[first:last]
            sources = [noise_source(seed, i) for i in range(first, last)]

            def draw(sources: list[np.random.Generator] = sources) -> np.ndarray:
                return np.stack([s.standard_normal(shape, np.float32) for s in sources])

            def denoise(x: np.ndarray, sigma: float, y: np.ndarray | None = y) -> np.ndarray:
                return self.denoise(x, sigma, y, weight)

            noise = draw()
            if start:
                feed = {"noise": noise} | self._labels(start, y, len(noise))
                x = self._sessions[start["file"]].run(None, feed)[0]
            else:
                x = noise * np.float32(sigmas[0])
            if name == "heun":
                x = heun(denoise, x, sigmas, churn, draw)
            else:
                x = {"ddim": ddim, "dpmpp": dpmpp}[name](denoise, x, sigmas)
            out.append(np.clip(np.rint(np.nan_to_num((x + 1) * np.float32(127.5))), 0, 255).astype(np.uint8))
        return np.concatenate(out)


def _low(stage: dict[str, Any]) -> float:
    return -math.inf if stage["log_sigma_low"] is None else float(stage["log_sigma_low"])


def _high(stage: dict[str, Any]) -> float:
    return math.inf if stage["log_sigma_high"] is None else float(stage["log_sigma_high"])


def noise_source(seed: int, index: int) -> np.random.Generator:
    """The random numbers of image `index`."""
    mask = 2**64 - 1
    return np.random.Generator(np.random.Philox(key=np.array([seed & mask, index & mask], dtype=np.uint64)))


def karras_steps(steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """Noise levels, descending, and a final 0 (Karras et al. 2022, eq. 5)."""
    if steps == 1:
        return [sigma_max, 0.0]
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [*((top + np.linspace(0, 1, steps) * (bottom - top)) ** rho).tolist(), 0.0]


def ddim(denoise: Denoise, x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """Deterministic DDIM: Euler's method on dx/dσ = (x - D(x; σ))/σ."""
    for now, after in itertools.pairwise(sigmas):
        x = x + np.float32(after - now) * ((x - denoise(x, now)) / np.float32(now))
    return x


def heun(
    denoise: Denoise, x: np.ndarray, sigmas: list[float], churn: float, draw: Callable[[], np.ndarray]
) -> np.ndarray:
    """The second-order sampler of Karras et al. (2022), stochastic with `churn`."""
    for now, after in itertools.pairwise(sigmas):
        raised = now * (1 + min(churn / (len(sigmas) - 1), math.sqrt(2) - 1))
        if raised > now:
            x = x + np.float32(math.sqrt(raised**2 - now**2)) * draw()
        slope = (x - denoise(x, raised)) / np.float32(raised)
        euler = x + np.float32(after - raised) * slope
        if after > 0:
            slope_after = (euler - denoise(euler, after)) / np.float32(after)
            euler = x + np.float32(after - raised) * (slope + slope_after) / 2
        x = euler
    return x


def dpmpp(denoise: Denoise, x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """DPM-Solver++(2M) (Lu et al. 2022)."""
    previous, h_previous = None, 0.0
    for now, after in itertools.pairwise(sigmas):
        denoised = denoise(x, now)
        if after == 0:
            return denoised
        h = math.log(now / after)
        estimate = denoised
        if previous is not None:
            r = h_previous / h
            estimate = np.float32(1 + 1 / (2 * r)) * denoised - previous / np.float32(2 * r)
        x = np.float32(after / now) * x - np.float32(math.expm1(-h)) * estimate
        previous, h_previous = denoised, h
    return x


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw images from the ONNX files beside this program.")
    parser.add_argument("-n", type=int, default=16, help="number of images")
    parser.add_argument("--out", required=True, help="a .npz file, or a new folder for PNGs (needs Pillow)")
    parser.add_argument("--classes", help="comma-separated names or numbers; default: all in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=["ddim", "heun", "dpmpp"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    given = parser.parse_args()
    out = Path(given.out)
    if out.exists():
        raise SystemExit(f"{out} exists already.")
    generator = OnnxGenerator(Path(__file__).parent)
    if not generator.about["certificate"]["private"]:
        print("This generator is NOT PRIVATE.")
    labels = generator.labels(given.n, given.classes.split(",") if given.classes else None)
    options: dict[str, Any] = {"sampler": given.sampler, "steps": given.steps, "guidance": given.guidance}
    images = generator.sample(given.n, labels, seed=given.seed, **options)
    if out.suffix == ".npz":
        arrays: dict[str, Any] = (
            {} if labels is None else {"labels": labels, "class_names": np.array(generator.class_names)}
        )
        np.savez_compressed(out, images=images, **arrays)
        return
    from PIL import Image

    out.mkdir(parents=True)
    for number, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        Image.fromarray(pixels).save(out / f"{number:07d}.png")


if __name__ == "__main__":
    main()
