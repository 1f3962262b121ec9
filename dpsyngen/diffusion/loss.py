"""The EDM training loss of each row, with the copies of an example next to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.noise_levels import NoiseLevels


@dataclass(frozen=True)
class NoisyBatch:
    """Rows ready for the denoiser: ``examples * copies`` of them, the copies of an example adjacent.

    Attributes:
        clean: x₀, [rows, C, H, W] in [-1, 1].
        noisy: x = x₀ + σ·n.
        sigma: σ, [rows].
        labels: class of each row, ``num_classes`` where dropped, or None for an unconditional network.
    """

    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    labels: Tensor | None

    def rows(self, part: slice | Tensor) -> NoisyBatch:
        """Some of the rows."""
        labels = None if self.labels is None else self.labels[part]
        return NoisyBatch(self.clean[part], self.noisy[part], self.sigma[part], labels)

    @classmethod
    def joined(cls, parts: list[NoisyBatch]) -> NoisyBatch:
        """The rows of all parts, in order; all with labels or all without."""
        if len(parts) == 1:
            return parts[0]
        labels = [p.labels for p in parts if p.labels is not None]
        clean, noisy, sigma = (torch.cat([getattr(p, f) for p in parts]) for f in ("clean", "noisy", "sigma"))
        return cls(clean, noisy, sigma, torch.cat(labels) if labels else None)


def make_noisy(
    images: Tensor,
    labels: Tensor | None,
    levels: NoiseLevels,
    *,
    copies: int,
    num_classes: int,
    label_dropout: float,
    generator: torch.Generator,
) -> NoisyBatch:
    """Repeat images [examples, C, H, W] in [-1, 1] `copies` times, each at its own level, and drop labels at random.

    labels are [examples], or None: no class; one is dropped with probability `label_dropout`.  `num_classes` is 0 for
    an unconditional network, and `generator` the source of σ, n and the dropout.
    """
    examples, device = len(images), images.device
    sigma = levels.sample(examples, copies, generator).reshape(-1).to(device)  # [examples * copies]
    clean = images.repeat_interleave(copies, 0)  # [examples * copies, C, H, W]
    noise = torch.randn(clean.shape, generator=generator, device=generator.device).to(device)  # n ~ N(0, I)
    classes: Tensor | None = None
    if num_classes:
        no_class = torch.full((examples * copies,), num_classes, dtype=torch.long, device=device)
        if labels is None:
            classes = no_class
        else:
            kept = torch.rand(examples * copies, generator=generator, device=generator.device) >= label_dropout
            classes = torch.where(kept.to(device), labels.repeat_interleave(copies, 0), no_class)
    return NoisyBatch(clean, clean + sigma.view(-1, 1, 1, 1) * noise, sigma, classes)  # x = x₀ + σ·n


def denoising_loss(denoiser: NetworkDenoiser, batch: NoisyBatch) -> Tensor:
    """λ(σ)·‖D(x; σ) - x₀‖² of each row, averaged over its pixels, [rows] (EDM eq. 2 and table 1)."""
    denoised = denoiser(batch.noisy, batch.sigma, batch.labels)  # D(x₀ + σ·n; σ)
    squared = (denoised - batch.clean).square().flatten(1).mean(1)  # ‖D - x₀‖²/(C·H·W), [rows]
    return denoiser.weight(batch.sigma, batch.labels) * squared
