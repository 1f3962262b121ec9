"""The denoiser of a release as one PyTorch module that loads itself: the root of what `assemble` writes out.

It does what :class:`dpsyngen.Generator` does, image for image; a test compares the two.  In a release this file stands
as ``denoiser/denoiser.py``, with all that it needs of dpsyngen written into it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dpsyngen.diffusion.denoiser import Denoiser, GuidedDenoiser, PreconditionedDenoiser
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.diffusion.residual import ResidualDenoiser
from dpsyngen.diffusion.samplers import sample_batches
from dpsyngen.diffusion.sampling import SamplingSettings
from dpsyngen.diffusion.stages import GAUSSIAN, Stage, StagedDenoiser, StageMap
from dpsyngen.diffusion.start import sampling_start
from dpsyngen.diffusion.unet import UNet
from dpsyngen.errors import ConfigError

RELEASE_FORMAT = 1


class ReleasedDenoiser(nn.Module):
    """D(x; σ, label) of a release: each noise level is answered by the network, or the Gaussian, that owns it.

    Args:
        folder: the release: ``generator.json`` and ``weights/``.

    Raises:
        ConfigError: a file is missing or of another format.

    Attributes:
        folder: where it was loaded from.
        class_names: () if unconditional.
        defaults: how the run would sample.
        private: whether the release carries a guarantee.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        try:
            about = json.loads((folder / "generator.json").read_text(encoding="utf-8"))
        except OSError:
            raise ConfigError(
                f"{folder} holds no generator.json.  A release is loaded as a whole: download all its files first "
                "(huggingface_hub.snapshot_download), then load the folder."
            ) from None
        if about.get("format") != RELEASE_FORMAT:
            raise ConfigError(
                f"generator.json is of format {about.get('format')!r}, but this code reads {RELEASE_FORMAT}."
            )
        self.resolution: int = about["resolution"]
        self.channels: int = about["channels"]
        self.class_names: tuple[str, ...] = tuple(about["class_names"])
        self.defaults: dict[str, Any] = about["sampling"]
        self.private: bool = about["private"]
        self.label_dropout: float | None = about.get("label_dropout")
        self.stages = StageMap(tuple(_stage(s) for s in about["stages"]))
        self.gaussian: GaussianDenoiser | None = None
        if about.get("moments") is not None:
            moments = ClassGaussians.from_tensors(load_file(folder / "weights" / f"{GAUSSIAN}.safetensors"))
            self.gaussian = GaussianDenoiser(moments, (self.channels, self.resolution, self.resolution))
        self.networks = nn.ModuleDict({name: self._network(about, name) for name in self.stages.networks})
        # Nothing of it is trained here.
        self.eval().requires_grad_(False)

    def _network(self, about: dict[str, Any], name: str) -> nn.Module:
        classes = len(self.class_names) if about["conditional"][name] else 0
        gaussian = self.gaussian if name == self.stages.private.network else None
        inputs = None if gaussian is None else 2 * self.channels
        unet = UNet(about["network"]["size"], self.resolution, self.channels, classes, inputs)
        denoiser = (
            PreconditionedDenoiser(unet, classes, about["network"]["sigma_data"])
            if gaussian is None
            else ResidualDenoiser(unet, classes, gaussian)
        )
        denoiser.load_state_dict(load_file(self.folder / "weights" / f"{name}.safetensors"))
        return denoiser

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **_: Any) -> ReleasedDenoiser:
        """What diffusers calls, with the sub-folder that this code stands in.

        Raises:
            ConfigError: a file is missing, or `torch_dtype` is another than fp32.
        """
        _check_dtype(torch_dtype or torch.float32)
        return cls(Path(folder).parent)

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Refused: a release is copied as a folder, so that its certificate stays with it."""
        raise ConfigError(f"save the pipeline, or copy {self.folder} as a whole: its certificate belongs to it.")

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self._any().device

    @property
    def dtype(self) -> torch.dtype:
        """What its numbers are."""
        return self._any().dtype

    def _any(self) -> Tensor:
        return next(self.parameters(), next(self.buffers()))

    def staged(self, guidance: float = 1.0) -> StagedDenoiser:
        """The staged denoiser, with classifier-free guidance of the private stage if asked for."""
        denoisers: dict[str, Denoiser] = dict(self.networks.items())
        if self.gaussian is not None:
            denoisers[GAUSSIAN] = self.gaussian
        private = denoisers[self.stages.private.network]
        guided = GuidedDenoiser(private, guidance) if self.class_names and guidance != 1 else None
        return StagedDenoiser(self.stages, denoisers, private=guided)

    @torch.no_grad()
    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, guidance: float = 1.0) -> Tensor:
        """Estimate the clean image.

        Args:
            x: noisy images, [N, C, H, W], clean ones lie in [-1, 1].
            sigma: noise levels, [N], > 0.
            labels: [N] classes in 0..K-1, or None.
            guidance: weight of classifier-free guidance; 1 is none.

        Returns:
            [N, C, H, W].
        """
        return self.staged(guidance)(x, sigma, labels)

    def labels(self, count: int, classes: Sequence[int | str] | None = None) -> Tensor | None:
        """[count] classes: all of them (or those given, by name or number) in turn; None if unconditional.

        Raises:
            ConfigError: a class that there is not.
        """
        if not self.class_names:
            if classes is not None:
                raise ConfigError("this generator has no classes, so none can be chosen.")
            return None
        chosen = list(range(len(self.class_names))) if classes is None else [self._class(c) for c in classes]
        if not chosen:
            raise ConfigError("no class was given.")
        return torch.tensor([chosen[i % len(chosen)] for i in range(count)], dtype=torch.long)

    def _class(self, given: int | str) -> int:
        if isinstance(given, str) and given in self.class_names:
            return self.class_names.index(given)
        try:
            number = int(given)
        except (ValueError, TypeError, OverflowError):
            number = -1
        if not 0 <= number < len(self.class_names):
            raise ConfigError(f"there is no class {given!r}; the classes are {', '.join(self.class_names)}.")
        return number

    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        churn: float | None = None,
        batch_size: int = 256,
    ) -> Iterator[Tensor]:
        """Draw `count` images in batches; image i depends on (seed, i, its label) only.

        Args:
            count: how many, >= 1.
            labels: [count], from :meth:`labels`, or None.
            seed: public.
            sampler: "ddim", "heun" or "dpmpp"; None here and below: as the run would.
            steps: sampler steps.
            guidance: weight of classifier-free guidance.
            churn: S_churn of "heun".
            batch_size: images at a time.

        Yields:
            uint8 [n, C, H, W] on the CPU.

        Raises:
            ConfigError: a value that is not allowed.
        """
        _check_dtype(self.dtype)
        d = self.defaults
        if guidance not in (None, 1) and self.class_names and len(self.networks) and self.label_dropout == 0:
            raise ConfigError(
                f"guidance is {guidance}, but this generator's network always saw the class of an image, so there is "
                "nothing to compare with: use guidance 1."
            )
        name = sampler or d["sampler"]
        if churn is None:
            # A churn set for the run belongs to its sampler; asking for another sampler drops it.
            churn = d["churn"] if name == d["sampler"] else 0.0
        s = SamplingSettings(
            sampler=name,
            steps=d["steps"] if steps is None else steps,
            sigma_min=d["sigma_min"],
            sigma_max=d["sigma_max"],
            rho=d["rho"],
            guidance=d["guidance"] if guidance is None else guidance,
            churn=churn,
            seed=seed,
        )
        options: dict[str, Any] = {"churn": s.churn} if s.churn else {}
        sigma_max, start = sampling_start(self.stages, self.gaussian, s.sigma_min, s.sigma_max)
        return sample_batches(
            self.staged(s.guidance),
            labels,
            count,
            (self.channels, self.resolution, self.resolution),
            sampler=s.sampler,
            # Where all is Gaussian images are drawn at σ_min, and a single step takes that noise off.
            steps=1 if self.stages.gaussian else s.steps,
            sigma_min=s.sigma_min,
            sigma_max=sigma_max,
            rho=s.rho,
            seed=s.seed,
            batch_size=batch_size,
            device=self.device,
            start_from=start,
            **options,
        )


def _stage(about: dict[str, Any]) -> Stage:
    low, high = about["log_sigma_low"], about["log_sigma_high"]
    return Stage(
        about["name"],
        -math.inf if low is None else low,
        math.inf if high is None else high,
        about["trained_by"],
        about["network"],
    )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        raise ConfigError(f"the numbers were to be {dtype}, but a release computes in torch.float32.")
