"""The denoiser of a dpsyngen release as one PyTorch module that loads itself: networks, DP moments, samplers.

It stands in a release as ``denoiser/denoiser.py``, which ``dpsyngen verify`` compares with this file, and needs no
dpsyngen, which in turn takes its network and Wiener filter from here.  Notation: EDM (Karras et al. 2022, arXiv
2206.00364), x = x₀ + σ·n with x₀ in [-1, 1] and D(x; σ, y) ≈ E[x₀ | x, y].

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
LARGEST_DIMENSION = 4096  # of an image whose covariance outside the basis is diagonalised; larger ones are stationary
# Width, channel multipliers, blocks a level, resolutions with attention (None: the lowest), embedding, patch, channels
# of the last layers.  In comments: parameters at one channel and ten classes, which tests hold the presets to.
SIZES: dict[str, tuple[Any, ...]] = {
    "nano": (16, (1, 2), 1, (), 64, 1, 0),  # 0.10 M
    "tiny": (16, (1, 2), 1, None, 64, 2, 0),  # 0.11 M
    "small": (24, (1, 2, 2), 1, None, 96, 1, 0),  # 0.38 M
    "base": (40, (1, 2, 2), 2, None, 160, 1, 0),  # 1.9 M
    "paper-32": (40, (1, 2, 2), 2, (16,), 160, 1, 0),  # 1.9 M, attention at 16x16 as published for CIFAR-10
    "large": (72, (1, 2, 2), 2, None, 288, 1, 0),  # 6 M
    "prior": (32, (1, 2), 1, None, 128, 2, 12),  # 0.47 M
    "huge": (96, (1, 2, 2, 2), 3, None, 384, 1, 0),  # 22 M
}


def require(ok: bool, name: str, given: object, allowed: str) -> None:
    """Raise ValueError unless `ok`."""
    if not ok:
        raise ValueError(f"{name} is {given!r}, but must be {allowed}.")


def _norm(channels: int) -> nn.GroupNorm:
    groups = max(g for g in range(1, min(32, channels // 4) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, 3, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, h, w)
        return (x + self.out(mixed)) * math.sqrt(0.5)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, attend: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * outputs)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = Attention(outputs) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), scale + 1)))
        return self.attention((self.skip(x) + h) * math.sqrt(0.5))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """F(input [N, C, H, W], c_noise [N], classes [N] in 0..num_classes or None); DDPM++ (Song et al. 2021), trimmed."""

    def __init__(self, size: tuple[Any, ...], resolution: int, channels: int, num_classes: int, inputs: int) -> None:
        super().__init__()
        width, multipliers, self.blocks, attention, emb, self.patch, self.refine = size
        widths, grid = [width * m for m in multipliers], resolution // self.patch
        lowest = grid // 2 ** (len(widths) - 1)
        attention = (lowest,) if attention is None else attention
        # c_noise = log(σ)/4 spans about [-1.6, 1.1]: from a fraction of a turn over the range to a dozen.
        self.register_buffer("frequencies", torch.logspace(-1, 4, width // 2, base=2.0) * math.pi / 2, persistent=False)
        self.embed_noise = nn.Linear(2 * (width // 2), emb)
        self.embed_class = nn.Embedding(num_classes + 1, emb) if num_classes else None
        self.embed_out = nn.Linear(emb, emb)
        self.first = nn.Conv2d(inputs * self.patch**2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        blocks = [(w, grid >> level in attention) for level, w in enumerate(widths) for _ in range(self.blocks)]
        now = width
        for w, attend in blocks:
            self.down.append(_Block(now, w, emb, attend))
            now = w
        self.middle = _Block(now, now, emb, lowest in attention)
        for w, attend in reversed(blocks):
            self.up.append(_Block(now + w, w, emb, attend))  # the skip of the same level has w channels
            now = w
        self.norm = _norm(now)
        self.last = nn.Conv2d(now, (self.refine or channels) * self.patch**2, 3, padding=1)
        if self.refine:
            self.mix = nn.Conv2d(self.refine + inputs, self.refine, 3, padding=1)
            self.out = nn.Conv2d(self.refine, channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, classes: Tensor | None = None) -> Tensor:
        angles = c_noise[:, None] * self.frequencies  # [N, width/2]
        embedding = self.embed_noise(torch.cat([angles.cos(), angles.sin()], 1))  # [N, E]
        if self.embed_class is not None:
            embedding = embedding + self.embed_class(classes)
        embedding = F.silu(self.embed_out(F.silu(embedding)))
        h = self.first(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)  # [N, width, H/p, W/p]
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            h = F.avg_pool2d(h, 2) if i and i % self.blocks == 0 else h  # [N, C_l, H/(p·2ˡ), W/(p·2ˡ)] at level l
            h = block(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for i, block in enumerate(self.up):
            if i and i % self.blocks == 0:
                # In the plain layout, PyTorch's kernel of linear interpolation uses few of a GPU's threads.
                h = h.contiguous(memory_format=torch.channels_last) if h.is_cuda and self.refine else h
                h = F.interpolate(h, scale_factor=2.0, mode="bilinear" if self.refine else "nearest")
            h = block(torch.cat([h, skips.pop()], 1), embedding)  # the skip of the same level
        out: Tensor = self.last(F.silu(self.norm(h)))
        out = F.pixel_shuffle(out, self.patch) if self.patch > 1 else out  # [N, C, H, W]
        return self.out(F.silu(self.mix(torch.cat([F.silu(out), x], 1)))) if self.refine else out


def network_input(x: Tensor, sigma: Tensor, base: Tensor, left: Tensor) -> Tensor:
    """What F sees on a Gaussian, [N, 4C, H, W]: c_in·x, G, s/σ, and 2 tanh((x - x̄)/2σ), x̄ the mean of 3x3 pixels."""
    s = sigma.view(-1, 1, 1, 1)  # x - x̄ in units of it: small noise, too, has to be told from the picture
    grain = 2 * torch.tanh((x - F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)) / (2 * s))
    return torch.cat([x * (s.square() + 1).rsqrt(), base, left / s, grain], 1)


class NetworkDenoiser(nn.Module):
    """c_skip·x + c_out·F(c_in·x, c_noise) (EDM eq. 7); on a Gaussian G: G + s ⊙ F([c_in·x, G, s/σ, …], c_noise)."""

    def __init__(self, network: Any, num_classes: int, sigma_data: float, gaussian: Gaussian | None) -> None:
        super().__init__()
        self.network, self.num_classes, self.sigma_data = network, num_classes, sigma_data
        self._gaussian = [gaussian]  # in a list: it is no part of this module's weights

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        unknown = torch.full((len(x),), self.num_classes, device=x.device)  # class `num_classes` means "no class"
        classes = (unknown if labels is None else labels) if self.num_classes else None
        sigma = sigma.to(x.dtype)
        s, gaussian = sigma.view(-1, 1, 1, 1), self._gaussian[0]
        if gaussian is None:
            total = s.square() + self.sigma_data**2
            c_skip, c_out, c_in = self.sigma_data**2 / total, s * self.sigma_data / total.sqrt(), total.rsqrt()
            return c_skip * x + c_out * self.network(c_in * x, sigma.log() / 4, classes)
        base, left = gaussian(x, sigma, labels), gaussian.left(sigma, labels).to(x.dtype)
        return base + left * self.network(network_input(x, sigma, base, left), sigma.log() / 4, classes)


def cosine_matrix(size: int) -> Tensor:
    """[size, size] fp64, the orthonormal DCT-II: row f is √(2/size)·cos(π f (2i + 1) / (2 size)), row 0 over √2."""
    f, i = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    return (math.pi * f * (2 * i + 1) / (2 * size)).cos() * (torch.where(f > 0, 2.0, 1.0).double() / size).sqrt()


def each_axis(flat: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a matrix to each axis of images [N, D] = [N, C, H, W]: with :func:`cosine_matrix` of each axis, F."""
    c, h, w = matrices
    images = h @ flat.view(-1, len(c), len(h), len(w)) @ w.mT
    return (torch.einsum("kc,nchw->nkhw", c, images) if len(c) > 1 else images).flatten(1)


class Gaussian(nn.Module):
    """The Wiener filter μ_c + Σ_c (Σ_c + σ²I)⁻¹ (x - μ_c) of each class, Σ_c = V A_c Vᵀ + P √ψ Fᵀ diag(q) F √ψ P.

    P = I - V Vᵀ, F the cosine transform; `m`: means μ, basis V, covariances A, rest ψ, spectrum q, and frequencies."""

    def __init__(self, m: dict[str, Tensor], shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        m = {name: tensor.double() for name, tensor in m.items()}
        self.shape, self.classes, (self.dimension, d) = shape, len(m["means"]), m["basis"].shape
        self.large = self.dimension > LARGEST_DIMENSION
        # V, orthonormal to the last digit, and a basis of its orthogonal complement (of [D, 0] for large images).
        complete, triangle = torch.linalg.qr(m["basis"], mode="reduced" if self.large else "complete")
        basis, outer = complete[:, :d] * triangle.diagonal().sign(), complete[:, d:]
        values, turns = torch.linalg.eigh((m["covariances"] + m["covariances"].mT) / 2)
        cosines = [cosine_matrix(n) for n in shape]
        if self.large:
            share = 1 - basis.square().sum(1)  # [D], diagonal of P
            rho = m["spectrum"] * (share @ m["rest"] / share.sum().clamp_min(1e-12))
        else:
            textures = each_axis((outer * m["rest"].sqrt()[:, None]).mT, cosines)  # F √ψ Q, transposed: [D - d, D]
            rho, inner_turns = torch.linalg.eigh((textures * m["spectrum"]) @ textures.mT)
            outer = outer @ inner_turns
        kept = {"means": m["means"], "means_in": m["means"] @ basis, "basis": basis, "outer": outer, "turns": turns}
        kept |= {"inner": values.clamp_min(0), "rho": rho.clamp_min(0), "log_frequencies": m["frequencies"].log()}
        kept |= dict(zip(("cosines_c", "cosines_h", "cosines_w"), cosines, strict=True))
        for name, tensor in kept.items():
            self.register_buffer(name, tensor.to(dtype).contiguous(), persistent=False)  # what is kept are those of `m`
        self.register_buffer("means_out", self._across(self.means), persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """E[x₀ | x, label], [N, C, H, W]; a label of K, or None for all: the posterior mean of the mixture."""
        flat = x.to(self.means.dtype).flatten(1)  # [N, D]
        square = sigma.to(flat.dtype).square().view(-1, 1)  # σ², [N, 1]
        along, across = flat @ self.basis, self._across(flat)  # coordinates in V, [N, d], and outside it
        inner, mean_out = torch.empty_like(along), torch.empty_like(across)
        for label, rows in self._groups(labels, x):
            if label < self.classes:
                inner[rows] = self._filtered(along[rows], square[rows], label)[0]
                mean_out[rows] = self.means_out[label]
            else:
                inner[rows], mean_out[rows] = self._mixture(along[rows], across[rows], square[rows])
        gain = self.rho / (self.rho + square)  # ρ/(ρ + σ²), the same for all classes
        return self._image(inner, mean_out + gain * (across - mean_out), x.dtype)

    def draw(self, labels: Tensor | None, sigma: Tensor | float, noise: Tensor) -> Tensor:
        """x ~ N(μ_c, Σ_c + σ²I), [N, C, H, W], from standard normal `noise`; a class of K or None by frequency."""
        flat = noise.to(self.means.dtype).flatten(1)
        square = torch.as_tensor(sigma, dtype=flat.dtype, device=flat.device).expand(len(flat)).square().view(-1, 1)
        # The class follows from the noise, not from its brightness: what is left of the sum over 2⁻¹⁰ is uniform.
        total = noise.flatten(1).double().sum(1) / math.sqrt(self.dimension)  # [N], standard normal
        edges = self.log_frequencies.double().exp().cumsum(0)
        drawn = torch.searchsorted(edges[:-1] / edges[-1], (total / 2.0**-10).remainder(1.0), right=True)
        labels = drawn if labels is None else torch.where(labels == self.classes, drawn, labels)
        along, across = flat @ self.basis, (self.rho + square).sqrt() * self._across(flat)
        for label, rows in self._groups(labels, noise):
            turned = (self.inner[label] + square[rows]).sqrt() * (along[rows] @ self.turns[label])
            along[rows] = self.means_in[label] + turned @ self.turns[label].mT
            across[rows] += self.means_out[label]
        return self._image(along, across, noise.dtype)

    def left(self, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """s, [N, C, H, W]: the standard deviation of each pixel of x₀ given x, if the images were this Gaussian."""
        square = sigma.to(self.means.dtype).square().view(-1, 1)  # σ², [N, 1]
        outside = self.rho * square / (self.rho + square)
        if self.large:  # the diagonals of Fᵀ diag(.) F and of P
            outside = each_axis(outside, [m.square().mT for m in self._cosines]) * (1 - self.basis.square().sum(1))
        else:
            outside = outside @ self.outer.square().mT
        inside = torch.zeros_like(outside)
        for label, rows in self._groups(labels, sigma):
            weights = [(label, 1.0)] if label < self.classes else list(enumerate(self.log_frequencies.exp().tolist()))
            for c, weight in weights:
                left = self.inner[c] * square[rows] / (self.inner[c] + square[rows])
                inside[rows] += weight * (left @ (self.basis @ self.turns[c]).square().mT)
        return (inside + outside).clamp_min(1e-8).sqrt().view(-1, *self.shape)

    def _groups(self, labels: Tensor | None, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        known = torch.full((len(rows),), self.classes, device=rows.device) if labels is None else labels
        for label in known.unique().tolist():
            require(0 <= label <= self.classes, "a label", label, f"in 0..{self.classes}")
            yield label, (known == label).nonzero()[:, 0]

    _cosines = property(lambda self: (self.cosines_c, self.cosines_h, self.cosines_w))

    def _across(self, flat: Tensor) -> Tensor:
        """The part of x outside the basis: its coordinates in Q, or in F of a large image."""
        return each_axis(flat - (flat @ self.basis) @ self.basis.mT, self._cosines) if self.large else flat @ self.outer

    def _image(self, along: Tensor, across: Tensor, dtype: torch.dtype) -> Tensor:
        outside = each_axis(across, [m.mT for m in self._cosines]) if self.large else across @ self.outer.mT
        along = along - outside @ self.basis if self.large else along
        return (along @ self.basis.mT + outside).to(dtype).view(-1, *self.shape)

    def _filtered(self, along: Tensor, square: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Coordinates in V of the filtered image, [N, d], and those of the noisy one in the eigenvectors of A_c."""
        turned = (along - self.means_in[label]) @ self.turns[label]
        gain = self.inner[label] / (self.inner[label] + square)  # λ/(λ + σ²) in each direction
        return self.means_in[label] + (gain * turned) @ self.turns[label].mT, turned

    def _mixture(self, along: Tensor, across: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """For an unknown class: filtered coordinates in V and mean outside it, averaged over p(class | x)."""
        log_chances, filtered = [], []
        for label, mean in enumerate(self.means_out):
            image, turned = self._filtered(along, square, label)
            total, outside = self.inner[label] + square, (across - mean).square() / (self.rho + square)
            # -2 log p(x | class) without the terms that all classes share (the determinant outside the basis is one).
            distance = (turned.square() / total + total.log()).sum(1) + outside.sum(1)
            log_chances.append(self.log_frequencies[label] - distance / 2)
            filtered.append(image)
        chances = torch.softmax(torch.stack(log_chances, 1), 1)
        return torch.einsum("nk,knd->nd", chances, torch.stack(filtered)), chances @ self.means_out


def karras_steps(steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """Noise levels of `steps` steps and the final 0 (EDM eq. 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [sigma_max, *((top + ramp * (bottom - top)) ** rho).tolist()[1:], 0.0]


def noise_of(keys: list[tuple[int, int]], shape: tuple[int, ...], device: Any) -> Any:
    """What draws standard normal [N, …] noise; Philox is keyed with (seed, index), so no two images share theirs."""
    generators = [np.random.Generator(np.random.Philox(key=np.array([s & 2**64 - 1, i], np.uint64))) for s, i in keys]
    return lambda: torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators])).to(device)


def solve(
    sampler: str, denoise: Any, x: Tensor, sigmas: list[float], churn: float, noise: Any, observe: Any = lambda *_: None
) -> Tensor:
    """Follow dx/dσ = (x - D(x; σ))/σ to 0: DDIM, Heun with churn (EDM algorithm 2) or DPM-Solver++(2M) (2211.01095)."""
    previous, h_previous = None, 0.0
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)  # 0 but with heun; at most as much noise as there is
        sigma_hat = sigma * (1 + gamma)  # the raised level: t̂ = t + γ·t
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * noise()
        denoised = denoise(x, sigma_hat)
        observe(i, sigma_hat, x, denoised)
        d = (x - denoised) / sigma_hat  # dx/dσ
        if sampler != "dpmpp":
            euler = x + (sigma_next - sigma_hat) * d  # Euler's step, which is all of DDIM
            if sampler == "heun" and sigma_next > 0:  # the mean of the slopes at both ends; at σ = 0 there is none
                d_next = (euler - denoise(euler, sigma_next)) / sigma_next
                euler = x + (sigma_next - sigma_hat) * (d + d_next) / 2
            x = euler
        elif sigma_next == 0:
            x = denoised  # λ = -log σ is infinite at σ = 0
        else:
            h, estimate = math.log(sigma / sigma_next), denoised  # h_i = λ_i+1 - λ_i; the first step is of order one
            if previous is not None:  # D in the middle of the step, from this level and the one before
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
            raise ValueError(f"{folder} lacks generator.json: get the whole release (snapshot_download).") from None
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
        gaussian = None if any(s[2:] == ("public", name) for s in self.stages) else self.gaussian  # others read moments
        channels, resolution, _ = self.shape
        unet = UNet(SIZES[about["network"]["size"]], resolution, channels, classes, channels * (4 if gaussian else 1))
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

        `labels` is [count] classes, or None.  None for how to draw: as the run does.  A list of seeds: image 0 of each.
        """
        require(self.dtype == torch.float32, "the type of the numbers", self.dtype, "torch.float32")
        d, knows = self.defaults, any(n.num_classes for n in self.networks.values())
        guided = self.label_dropout > 0 if knows else guidance == d["guidance"]
        require(guided or guidance in (None, 1), "guidance", guidance, "1: the network always or never sees a class")
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
            part = slice(begin, begin + batch_size)
            keys = [(seed, i) if isinstance(seed, int) else (seed[i], 0) for i in range(count)[part]]
            noise = noise_of(keys, self.shape, self.device)
            y = None if labels is None else labels[part].to(self.device)

            def denoise(x: Tensor, sigma: float, y: Tensor | None = y) -> Tensor:
                return self(x, torch.full((len(x),), sigma, dtype=torch.float64, device=x.device), y, guidance)

            x = self.gaussian.draw(y, first, noise()) if trainer == "moments" else noise() * sigmas[0]
            images = solve(sampler, denoise, x, sigmas, churn, noise)
            yield torch.nan_to_num((images + 1) * 127.5, nan=0.0).round().clamp(0, 255).to(torch.uint8).cpu()
