"""The pipeline that diffusers loads a release with; this file itself stands in the release as ``pipeline.py``.

Imported nowhere in dpsyngen: it needs diffusers, and the code of the denoiser beside it (``denoiser/denoiser.py``).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

# What belongs to a release, and goes along when it is saved.
RELEASE_FILES = (
    *("README.md", "PRIVACY.md", "privacy.json", "config.yaml", "generator.json", "model_index.json", "pipeline.py"),
    *("denoiser/denoiser.py", "weights/*.safetensors", "public_training.jsonl", "report.html"),
)


class DPSynGenPipeline(DiffusionPipeline):
    """Draws images from a generator that was trained with differential privacy; README.md states ε and δ.

    Args:
        denoiser: D(x; σ, label), see ``denoiser/denoiser.py``.
    """

    model_cpu_offload_seq = "denoiser"

    def __init__(self, denoiser) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; () if there are none."""
        return self.denoiser.class_names

    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | str | Sequence[int | str] | np.ndarray | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        sampler: str | None = None,
        churn: float | None = None,
        output_type: str = "pil",
        **others: Any,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw images; free of privacy cost, however many.

        Args:
            batch_size: how many images; None: as many as there are generators or classes in a list, or 1.
            class_labels: a class by name or number, or several, taken in turn; None: all classes in turn.
            num_inference_steps: sampler steps; None here and below: as the run would.
            guidance_scale: weight of classifier-free guidance, 1 is none.
            generator: gives the seed, and moves on by that, so that a second call draws other images; or one generator
                for each image, which is then the one that a call with that generator alone draws.
            seed: image i follows from (seed, i, its class), whatever `batch_size`; None, and no generator: another seed
                every time, from PyTorch's own generator.
            sampler: "ddim", "heun" or "dpmpp".
            churn: S_churn of "heun".
            output_type: "pil"; "np" for [N, H, W, C] or "pt" for [N, C, H, W], both in [0, 1]; "uint8" for an array
                [N, C, H, W].
            others: `return_dict` (True): an ImagePipelineOutput, or else a tuple; `images_at_a_time` (256): how many
                are computed together.

        Raises:
            ValueError: a value that is not allowed.
        """
        return_dict, at_a_time = others.pop("return_dict", True), others.pop("images_at_a_time", 256)
        if others:
            raise TypeError(f"unknown options: {', '.join(others)}.")
        if output_type not in ("pil", "np", "pt", "uint8"):
            raise ValueError(f"output_type is {output_type!r}, but must be pil, np, pt or uint8.")
        classes: Any = class_labels.tolist() if isinstance(class_labels, np.ndarray | torch.Tensor) else class_labels
        several = isinstance(generator, list | tuple)
        if batch_size is None:
            batch_size = len(generator if several else classes if isinstance(classes, list | tuple) else [None])
        if several and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images: give one, or one for each image.")
        if generator is not None and seed is not None:
            raise ValueError("seed and generator were both given: one of them says which images are drawn.")
        seeds = [_seed(g) for g in generator] if several else _seed(generator) if seed is None else int(seed)
        labels = self._labels(batch_size, classes)
        drawn: list[torch.Tensor] = []
        with self.progress_bar(total=max(batch_size, 0)) as bar:
            for images in self.denoiser.sample(
                batch_size,
                labels,
                seed=seeds,
                sampler=sampler,
                steps=num_inference_steps,
                guidance=guidance_scale,
                churn=churn,
                batch_size=at_a_time,
            ):
                drawn.append(images)
                bar.update(len(images))
        out = _as(output_type, torch.cat(drawn))
        return ImagePipelineOutput(images=out) if return_dict else (out,)

    def _labels(self, count: int, classes: Any) -> torch.Tensor | None:
        """[count] numbers of all classes, or of those given, in turn; None without classes."""
        names = self.class_names
        if not names and classes is not None:
            raise ValueError(f"class_labels is {classes!r}, but this generator has no classes: leave it out.")
        if not names:
            return None
        one = classes is None or isinstance(classes, str) or not hasattr(classes, "__iter__")
        chosen = range(len(names)) if classes is None else [self._class(c) for c in ([classes] if one else classes)]
        if not chosen:
            raise ValueError("class_labels is empty: give at least one class, or leave it out for all.")
        return torch.tensor([chosen[i % len(chosen)] for i in range(count)], dtype=torch.long)

    def _class(self, given: Any) -> int:
        """The number of a class; one that is also the name of another class is refused."""
        names, text = self.class_names, str(given)
        number = int(text) if text.isdecimal() else -1
        if text in names and (isinstance(given, str) or names.index(text) == number):
            return names.index(text)
        if text in names:
            raise ValueError(f"class {given} could be the one called {text!r} or number {given}: give names.")
        if not 0 <= number < len(names):
            raise ValueError(f"there is no class {given!r}: give one of {', '.join(names)}, or 0 to {len(names) - 1}.")
        return number

    def save_pretrained(self, save_directory, *args: Any, **kwargs: Any) -> None:
        """Copy the release, its certificate included, to a folder that is empty or does not exist."""
        if args or any(kwargs.values()):
            raise ValueError("a release is saved as it is: no other argument is taken.")
        target, source = Path(save_directory), self.denoiser.folder
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"{target} is not empty, and nothing is overwritten.")
        for pattern in RELEASE_FILES:
            for file in sorted(source.glob(pattern)):
                copy = target / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def _seed(generator: torch.Generator | None) -> int:
    device = None if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=device))


def _as(output_type: str, images: torch.Tensor) -> Any:
    if output_type == "pt":
        return images.float() / 255
    pixels: np.ndarray = images.numpy()
    if output_type == "uint8":
        return pixels
    last = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
    if output_type == "np":
        return last.astype(np.float32) / 255
    return [Image.fromarray(p[:, :, 0] if p.shape[2] == 1 else p) for p in last]
