"""The denoiser of a dpsyngen release as one PyTorch module that loads itself: networks, DP moments, samplers.

It stands in a release as ``denoiser/denoiser.py`` and needs no dpsyngen.  ``dpsyngen verify`` compares it with the file
of its own version; a test compares what it draws with ``dpsyngen.Generator``, in every pixel.  Notation: EDM (Karras et
al. 2022, arXiv 2206.00364), x = x₀ + σ·n with x₀ in [-1, 1] and D(x; σ, y) ≈ E[x₀ | x, y].

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

GAUSSIAN, SAMPLERS = "gaussian", ("ddim", "heun", "dpmpp")

# width, channel multipliers, blocks a level, resolutions with attention (None: the lowest), embedding, patch,
# channels of the last layers
SIZES = {
    "nano": (16, (1, 2), 1, (), 64, 1, 0),
    "tiny": (16, (1, 2), 1, None, 64, 2, 0),
    "small": (24, (1, 2, 2), 1, None, 96, 1, 0),
    "base": (40, (1, 2, 2), 2, None, 160, 1, 0),
    "paper-32": (40, (1, 2, 2), 2, (16,), 160, 1, 0),
    "large": (72, (1, 2, 2), 2, None, 288, 1, 0),
    "huge": (96, (1, 2, 2, 2), 3, None, 384, 1, 0),
    "prior": (32, (1, 2), 1, None, 128, 2, 12),
}


def require(ok: bool, name: str, given: object, allowed: str) -> None:
    """Raise ValueError unless `ok`."""
    if not ok:
        raise ValueError(f"{name} is {given!r}, but must be {allowed}.")


def _norm(channels: int) -> nn.GroupNorm:
    groups = max(g for g in range(1, min(32, channels // 4) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(n, 3, self.heads, c // self.heads, h * w).transpose(3, 4)
        q, k, v = qkv.unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, h, w)
        return (x + self.out(mixed)) * math.sqrt(0.5)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, attend: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * outputs)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = _Attention(outputs) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), scale + 1)))
        out: Tensor = self.attention((self.skip(x) + h) * math.sqrt(0.5))
        return out


class UNet(nn.Module):
    """F(input [N, C, H, W], c_noise [N], classes [N] in 0..num_classes or None); DDPM++, trimmed."""

    def __init__(self, size: str, resolution: int, channels: int, num_classes: int, inputs: int) -> None:
        super().__init__()
        width, multipliers, self.blocks, attention, emb, self.patch, self.refine = SIZES[size]
        widths = [width * m for m in multipliers]
        grid = resolution // self.patch
        lowest = grid // 2 ** (len(widths) - 1)
        attention = (lowest,) if attention is None else attention
        self.register_buffer("frequencies", torch.logspace(-1, 4, width // 2, base=2.0) * math.pi / 2, persistent=False)
        self.embed_noise = nn.Linear(2 * (width // 2), emb)
        self.embed_class = nn.Embedding(num_classes + 1, emb) if num_classes else None
        self.embed_out = nn.Linear(emb, emb)
        self.first = nn.Conv2d(inputs * self.patch**2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips: list[int] = []
        now = width
        for level, w in enumerate(widths):
            for _ in range(self.blocks):
                self.down.append(_Block(now, w, emb, grid >> level in attention))
                now = w
                skips.append(now)
        self.middle = _Block(now, now, emb, lowest in attention)
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(self.blocks):
                self.up.append(_Block(now + skips.pop(), w, emb, grid >> level in attention))
                now = w
        self.norm = _norm(now)
        self.last = nn.Conv2d(now, (self.refine or channels) * self.patch**2, 3, padding=1)
        if self.refine:
            self.mix = nn.Conv2d(self.refine + inputs, self.refine, 3, padding=1)
            self.out = nn.Conv2d(self.refine, channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, classes: Tensor | None = None) -> Tensor:
        angles = c_noise[:, None] * self.frequencies
        embedding = self.embed_noise(torch.cat([angles.cos(), angles.sin()], 1))
        if self.embed_class is not None:
            embedding = embedding + self.embed_class(classes)
        embedding = F.silu(self.embed_out(F.silu(embedding)))
        h = self.first(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if i and i % self.blocks == 0 else h
            h = block(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for i, block in enumerate(self.up):
            if i and i % self.blocks == 0:
                h = F.interpolate(h, scale_factor=2.0, mode="bilinear" if self.refine else "nearest")
            h = block(torch.cat([h, skips.pop()], 1), embedding)
        out: Tensor = self.last(F.silu(self.norm(h)))
        out = F.pixel_shuffle(out, self.patch) if self.patch > 1 else out
        return self.out(F.silu(self.mix(torch.cat([F.silu(out), x], 1)))) if self.refine else out


class NetworkDenoiser(nn.Module):
    """c_skip·x + c_out·F(c_in·x, c_noise) (EDM eq. 7); on a Gaussian G: G + s ⊙ F([c_in·x, G, s/σ, …], c_noise)."""

    def __init__(self, network: UNet, num_classes: int, sigma_data: float, gaussian: Gaussian | None) -> None:
        super().__init__()
        self.network, self.num_classes, self.sigma_data = network, num_classes, sigma_data
        self._gaussian = [gaussian]  # in a list: it is no part of this module's weights

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        classes = None
        if self.num_classes:  # class `num_classes` means "no class"
            none = torch.full((len(x),), self.num_classes, dtype=torch.long, device=x.device)
            classes = none if labels is None else labels
        sigma = sigma.to(x.dtype)
        s, gaussian = sigma.view(-1, 1, 1, 1), self._gaussian[0]
        if gaussian is None:
            total = s.square() + self.sigma_data**2
            c_skip, c_out, c_in = self.sigma_data**2 / total, s * self.sigma_data / total.sqrt(), total.rsqrt()
            return c_skip * x + c_out * self.network(c_in * x, sigma.log() / 4, classes)
        base, left = gaussian(x, sigma, labels), gaussian.left(sigma, labels)
        near = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        grain = 2 * torch.tanh((x - near) / (2 * s))
        seen = torch.cat([x * (s.square() + 1).rsqrt(), base, left / s, grain], 1)
        return base + left * self.network(seen, sigma.log() / 4, classes)


def cosine_matrix(size: int) -> Tensor:
    """[size, size] fp64, the orthonormal DCT-II."""
    i = torch.arange(size, dtype=torch.float64)
    matrix = (math.pi * i[:, None] * (2 * i + 1) / (2 * size)).cos() * math.sqrt(2 / size)
    return torch.cat([matrix[:1] / math.sqrt(2), matrix[1:]])


def each_axis(flat: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """A matrix for the channels and one for rows and columns of images [N, D] = [N, C, S, S]."""
    return torch.einsum("kc,nchw->nkhw", c, s @ flat.view(-1, len(c), len(s), len(s)) @ s.mT).flatten(1)


class Gaussian(nn.Module):
    """The Wiener filter μ_c + Σ_c (Σ_c + σ²I)⁻¹ (x - μ_c) of each class, Σ_c = V A_c Vᵀ + P √ψ Fᵀ diag(q) F √ψ P.

    P = I - V Vᵀ, F the cosine transform; `m`: means μ, basis V, covariances A, rest ψ, spectrum q, and frequencies."""

    def __init__(self, m: dict[str, Tensor], shape: tuple[int, int, int]) -> None:
        super().__init__()
        m = {name: tensor.double() for name, tensor in m.items()}
        self.shape, self.classes, (self.dimension, d) = shape, len(m["means"]), m["basis"].shape
        # V to the last digit, and Q: eigenvectors of what is outside V, with eigenvalues ρ; F instead for large images.
        self.large = self.dimension > 4096
        complete, triangle = torch.linalg.qr(m["basis"], mode="reduced" if self.large else "complete")
        basis, outer = complete[:, :d] * triangle.diagonal().sign(), complete[:, d:]
        values, turns = torch.linalg.eigh((m["covariances"] + m["covariances"].mT) / 2)
        cosines = cosine_matrix(shape[0]), cosine_matrix(shape[1])
        if self.large:
            share = 1 - basis.square().sum(1)
            rho = m["spectrum"] * (share @ m["rest"] / share.sum().clamp_min(1e-12))
        else:
            textures = each_axis((outer * m["rest"].sqrt()[:, None]).mT, *cosines)
            rho, inner_turns = torch.linalg.eigh((textures * m["spectrum"]) @ textures.mT)
            outer = outer @ inner_turns
        kept = {"means": m["means"], "means_in": m["means"] @ basis, "basis": basis, "outer": outer, "turns": turns}
        kept |= {"inner": values.clamp_min(0), "rho": rho.clamp_min(0), "log_frequencies": m["frequencies"].log()}
        for name, tensor in (kept | dict(zip(("colours", "cosines"), cosines, strict=True))).items():
            self.register_buffer(name, tensor.float().contiguous(), persistent=False)
        self.register_buffer("means_out", self._across(self.means), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x₀ | x, label], [N, C, H, W]; a label of K, or None for all: the posterior mean of the mixture."""
        flat, square = x.flatten(1), sigma.float().square().view(-1, 1)
        along, across = flat @ self.basis, self._across(flat)
        inner, mean_out = torch.empty_like(along), torch.empty_like(across)
        for label, rows in self._groups(labels, x):
            if label < self.classes:
                inner[rows] = self._filtered(along[rows], square[rows], label)[0]
                mean_out[rows] = self.means_out[label]
            else:
                inner[rows], mean_out[rows] = self._mixture(along[rows], across[rows], square[rows])
        gain = self.rho / (self.rho + square)
        return self._image(inner, mean_out + gain * (across - mean_out))

    def draw(self, labels: Tensor | None, sigma: float, noise: Tensor) -> Tensor:
        """x ~ N(μ_c, Σ_c + σ²I) from standard normal `noise` [N, C, H, W]; without labels, classes by frequency."""
        flat, square = noise.flatten(1), torch.full((len(noise), 1), sigma, device=noise.device).square()
        if labels is None and self.classes > 1:
            # What is left of the sum over pixels divided by a small number is uniform, and says nothing of the image.
            uniform = (flat.double().sum(1) / math.sqrt(self.dimension) / 2.0**-10).remainder(1.0)
            edges = self.log_frequencies.double().exp().cumsum(0)
            labels = torch.searchsorted(edges / edges[-1], uniform, right=True).clamp_max(self.classes - 1)
        along, across = flat @ self.basis, (self.rho + square).sqrt() * self._across(flat)
        for label, rows in self._groups(torch.zeros(len(flat)).long() if labels is None else labels, noise):
            turned = (self.inner[label] + square[rows]).sqrt() * (along[rows] @ self.turns[label])
            along[rows] = self.means_in[label] + turned @ self.turns[label].mT
            across[rows] += self.means_out[label]
        return self._image(along, across)

    def left(self, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """s, [N, C, H, W]: the standard deviation of each pixel of x₀ given x, if the images were this Gaussian."""
        square = sigma.float().square().view(-1, 1)

        def kept(variances: Tensor, squares: Tensor) -> Tensor:
            return variances * squares / (variances + squares)

        outside, squares = kept(self.rho, square), (self.colours.square().mT, self.cosines.square().mT)
        share = 1 - self.basis.square().sum(1)
        outside = each_axis(outside, *squares) * share if self.large else outside @ self.outer.square().mT
        inside = torch.zeros_like(outside)
        for label, rows in self._groups(labels, sigma):
            weights = [(label, 1.0)] if label < self.classes else list(enumerate(self.log_frequencies.exp().tolist()))
            for c, weight in weights:
                inside[rows] += weight * (kept(self.inner[c], square[rows]) @ (self.basis @ self.turns[c]).square().mT)
        return (inside + outside).clamp_min(1e-8).sqrt().view(-1, *self.shape)

    def _groups(self, labels: Tensor | None, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        known = torch.full((len(rows),), self.classes, device=rows.device) if labels is None else labels
        for label in known.unique().tolist():
            require(0 <= label <= self.classes, "a label", label, f"in 0..{self.classes}")
            yield label, (known == label).nonzero()[:, 0]

    def _outside(self, flat: Tensor) -> Tensor:
        return flat - (flat @ self.basis) @ self.basis.mT

    def _across(self, flat: Tensor) -> Tensor:
        return each_axis(self._outside(flat), self.colours, self.cosines) if self.large else flat @ self.outer

    def _image(self, along: Tensor, across: Tensor) -> Tensor:
        whole = across @ self.outer.mT if not self.large else each_axis(across, self.colours.mT, self.cosines.mT)
        outside = self._outside(whole) if self.large else whole
        return (along @ self.basis.mT + outside).view(-1, *self.shape)

    def _filtered(self, along: Tensor, square: Tensor, label: int) -> tuple[Tensor, Tensor]:
        turned = (along - self.means_in[label]) @ self.turns[label]
        gain = self.inner[label] / (self.inner[label] + square)
        return self.means_in[label] + (gain * turned) @ self.turns[label].mT, turned

    def _mixture(self, along: Tensor, across: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        log_chances, filtered = [], []
        for label, mean in enumerate(self.means_out):
            image, turned = self._filtered(along, square, label)
            total = self.inner[label] + square
            outside = ((across - mean).square() / (self.rho + square)).sum(1)
            distance = (turned.square() / total + total.log()).sum(1) + outside
            log_chances.append(self.log_frequencies[label] - distance / 2)
            filtered.append(image)
        chances = torch.softmax(torch.stack(log_chances, 1), 1)
        return torch.einsum("nk,knd->nd", chances, torch.stack(filtered)), chances @ self.means_out


def karras_steps(steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """Noise levels of `steps` steps and the final 0 (EDM eq. 5)."""
    if steps == 1:
        return [sigma_max, 0.0]
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [*((top + ramp * (bottom - top)) ** rho).tolist(), 0.0]


def solve(sampler: str, denoise: Any, x: Tensor, sigmas: list[float], churn: float, noise: Any) -> Tensor:
    """Follow dx/dσ = (x - D(x; σ))/σ to 0: DDIM, Heun with churn (EDM algorithm 2) or DPM-Solver++(2M)."""
    previous, h_previous = None, 0.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)  # 0 but with heun
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * noise()
        denoised = denoise(x, sigma_hat)
        d = (x - denoised) / sigma_hat
        if sampler == "ddim":
            x = x + (sigma_next - sigma) * d
        elif sampler == "heun":
            euler = x + (sigma_next - sigma_hat) * d
            if sigma_next > 0:
                d_next = (euler - denoise(euler, sigma_next)) / sigma_next
                x = x + (sigma_next - sigma_hat) * (d + d_next) / 2
            else:
                x = euler
        elif sigma_next == 0:
            x = denoised
        else:
            h, estimate = math.log(sigma / sigma_next), denoised
            if previous is not None:
                r = h_previous / h
                estimate = (1 + 1 / (2 * r)) * denoised - previous / (2 * r)
            x = (sigma_next / sigma) * x - math.expm1(-h) * estimate
            previous, h_previous = denoised, h
    return x


class ReleasedDenoiser(nn.Module):
    """D(x; σ, label) of the release in `folder`: each σ is answered by the network, or the Gaussian, that owns it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        try:
            about = json.loads((folder / "generator.json").read_text(encoding="utf-8"))
        except OSError:
            help = "download all its files first (huggingface_hub.snapshot_download), then load the folder"
            raise ValueError(f"{folder} holds no generator.json.  A release is loaded as a whole: {help}.") from None
        require(about.get("format") == 1, "format of generator.json", about.get("format"), "1")
        self.shape = (about["channels"], about["resolution"], about["resolution"])
        self.class_names, self.defaults = tuple(about["class_names"]), about["sampling"]
        self.label_dropout = about.get("label_dropout")
        # (lower and upper end in log σ, trained by, network), from the clean end to the noisy one
        ends = [(s["log_sigma_low"], s["log_sigma_high"], s["trained_by"], s["network"]) for s in about["stages"]]
        self.stages = [(-math.inf if a is None else a, math.inf if b is None else b, t, n) for a, b, t, n in ends]
        # The stage that DP-SGD trained; where DP moments are all that was used, that one stage.
        self.private_stage = next((s for s in self.stages if s[2] == "private"), self.stages[0])
        self.gaussian = Gaussian(self._weights(GAUSSIAN), self.shape) if about.get("moments") is not None else None
        names = dict.fromkeys(s[3] for s in self.stages if s[3] != GAUSSIAN)
        self.networks = nn.ModuleDict({name: self._network(about, name) for name in names})
        self.eval().requires_grad_(False)

    def _weights(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / "weights" / f"{name}.safetensors")

    def _network(self, about: dict[str, Any], name: str) -> NetworkDenoiser:
        classes = len(self.class_names) if about["conditional"][name] else 0
        gaussian = self.gaussian if name == self.private_stage[3] else None
        channels, resolution, _ = self.shape
        unet = UNet(about["network"]["size"], resolution, channels, classes, channels * (4 if gaussian else 1))
        denoiser = NetworkDenoiser(unet, classes, about["network"]["sigma_data"], gaussian)
        denoiser.load_state_dict(self._weights(name))
        return denoiser

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None, **_: Any) -> ReleasedDenoiser:
        """What diffusers calls, with the sub-folder that this code stands in."""
        require(torch_dtype in (None, torch.float32), "torch_dtype", torch_dtype, "torch.float32")
        return cls(Path(folder).parent)

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Refused: a release is copied as a folder, so that its certificate stays with it."""
        raise ValueError(f"save the pipeline, or copy {self.folder} as a whole: its certificate belongs to it.")

    device = property(lambda self: next(self.buffers()).device)
    dtype = property(lambda self: next(self.buffers()).dtype)

    @torch.no_grad()
    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, guidance: float = 1.0) -> Tensor:
        """Estimate clean images from noisy `x` [N, C, H, W] at σ [N] with classes [N], or None; all [N, C, H, W]."""
        # From the noisy end down; a threshold belongs to the private stage.
        stages, levels = (self.private_stage, *reversed(self.stages)), sigma.detach().double().log().tolist()
        owners = [next(s for s in stages if s[0] <= log_sigma <= s[1]) for log_sigma in levels]
        out = torch.empty_like(x)
        for stage in dict.fromkeys(owners):
            rows = torch.tensor([o == stage for o in owners], device=x.device)
            y = None if labels is None or stage[2] == "public" else labels[rows]  # images of programs have no classes
            denoiser = self.gaussian if stage[3] == GAUSSIAN else self.networks[stage[3]]
            with torch.autocast(x.device.type, enabled=False):
                answer = denoiser(x[rows], sigma[rows], y)
                if y is not None and guidance != 1 and stage == self.private_stage:
                    # Classifier-free guidance (Ho & Salimans 2022): D = D(∅) + w·(D(y) - D(∅)).
                    unconditional = denoiser(x[rows], sigma[rows], None)
                    answer = unconditional + guidance * (answer - unconditional)
            out[rows] = answer
        return out

    @torch.no_grad()
    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        seed: int | Sequence[int] = 0,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        churn: float | None = None,
        batch_size: int = 256,
    ) -> Iterator[Tensor]:
        """Draw `count` images in batches, uint8 [n, C, H, W] on the CPU; image i follows from (seed, i, its label).

        `labels` is [count] numbers of classes, or None.  None for how to draw means: as the run would.  With a list of
        seeds, one for each image, each is drawn as the first image of its seed.
        """
        require(self.dtype == torch.float32, "the type of the numbers", self.dtype, "torch.float32")
        d, always = self.defaults, bool(self.class_names and len(self.networks)) and self.label_dropout == 0
        require(not always or guidance in (None, 1), "guidance", guidance, "1: the network always saw a class")
        # A churn set for the run belongs to its sampler; asking for another sampler drops it.
        churn = (d["churn"] if sampler in (None, d["sampler"]) else 0.0) if churn is None else churn
        sampler, steps = sampler or d["sampler"], d["steps"] if steps is None else steps
        guidance = d["guidance"] if guidance is None else guidance
        require(sampler in SAMPLERS, "sampler", sampler, f"one of {', '.join(SAMPLERS)}")
        require(1 <= steps <= 10_000, "the number of sampler steps", steps, "at least 1 and at most 10,000")
        require(0 <= guidance < math.inf, "guidance", guidance, "0 or more (1 is none)")
        require(churn == 0 or (0 < churn < math.inf and sampler == "heun"), "churn", churn, "0, or more for 'heun'")
        require(min(count, batch_size) >= 1, "the number of images", (count, batch_size), "at least 1")
        # Where the noisy end is a Gaussian, x is drawn from N(μ, Σ + σ²I) at its lower end τ, where the networks begin.
        first, (low, _, trainer, _) = d["sigma_max"], self.stages[-1]
        if trainer == "moments":
            first = max(min(first, math.exp(low) * (1 - 1e-9)), d["sigma_min"] * 1.001)
            steps = steps if len(self.stages) > 1 else 1  # from σ_min, a single step takes the noise off
        sigmas = karras_steps(steps, d["sigma_min"], first, d["rho"])
        for begin in range(0, count, batch_size):
            # Philox is keyed with (seed, index), so no two images share their noise.
            numbers = range(begin, min(begin + batch_size, count))
            pairs = ((seed, i) if isinstance(seed, int) else (seed[i], 0) for i in numbers)
            keys = [[s & 2**64 - 1, i] for s, i in pairs]
            generators = [np.random.Generator(np.random.Philox(key=np.array(key, np.uint64))) for key in keys]
            y = None if labels is None else labels[begin : begin + batch_size].to(self.device)

            def noise(generators: list[np.random.Generator] = generators) -> Tensor:
                drawn = np.stack([g.standard_normal(self.shape, np.float32) for g in generators])
                return torch.from_numpy(drawn).to(self.device)

            def denoise(x: Tensor, sigma: float, y: Tensor | None = y) -> Tensor:
                return self(x, torch.full((len(x),), sigma, dtype=torch.float64, device=x.device), y, guidance)

            x = self.gaussian.draw(y, first, noise()) if trainer == "moments" else noise() * sigmas[0]
            images = solve(sampler, denoise, x, sigmas, churn, noise)
            yield torch.nan_to_num((images + 1) * 127.5, nan=0.0).round().clamp(0, 255).to(torch.uint8).cpu()
