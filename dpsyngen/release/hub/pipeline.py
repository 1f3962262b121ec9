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

    # Set by the base class.
    denoiser: Any
    progress_bar: Any
    register_modules: Any

    def __init__(self, denoiser) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; () if there are none."""
        names: tuple[str, ...] = self.denoiser.class_names
        return names

    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Sequence[int | str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        sampler: str | None = None,
        churn: float | None = None,
        output_type: str = "pil",
        **others: Any,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw images; free of privacy cost, however many.

        Args:
            batch_size: how many images.
            class_labels: classes by name or number, taken in turn; None: all classes in turn.
            num_inference_steps: sampler steps; None here and below: as the run would.
            guidance_scale: weight of classifier-free guidance, 1 is none.
            generator: its seed is used instead of `seed`.
            seed: image i follows from (seed, i, its class), whatever `batch_size`.
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
        if generator is not None:
            # Images have random numbers of their own each, which follow from one seed.
            seed = generator.initial_seed()
        labels = self.denoiser.labels(batch_size, class_labels)
        drawn: list[torch.Tensor] = []
        with self.progress_bar(total=max(batch_size, 0)) as bar:
            for images in self.denoiser.sample(
                batch_size,
                labels,
                seed=seed,
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
