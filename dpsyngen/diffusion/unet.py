"""The network F of the denoiser: a class-conditional U-Net in the manner of DDPM++ (Song et al. 2021).

Residual blocks with GroupNorm whose second normalisation is scaled and shifted by the embedding of σ and class,
attention at chosen resolutions, skips scaled by 1/√2.  Trimmed for CPUs: resolutions change by plain averaging and
repetition instead of blocks of their own, and the way up has as many blocks as the way down.  Every layer has a
per-example rule, and nothing mixes images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.errors import ConfigError, require


@dataclass(frozen=True)
class UNetSize:
    """Widths and depths.

    Attributes:
        width: channels at the highest resolution; a multiple of 8.
        multipliers: channels of each level over `width`; each level halves the resolution of the one before.
        blocks: residual blocks for each level on the way down, and as many on the way up.
        attention: resolutions (in pixels of the network's own grid) with self-attention; () for none, None for the
            lowest level.
        embedding: width of the embedding of σ and class; 0 for four times `width`.
        patch: pixels of patch x patch are folded into channels first, which divides the work of the highest level
            by patch²; 1 for none.
        refine: channels of two last layers at full resolution, which see the pixels once more and take away the
            pattern that folding and repetition leave; 0 for none.
    """

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...] | None = None
    embedding: int = 0
    patch: int = 1
    refine: int = 0

    @property
    def divisor(self) -> int:
        """What the image resolution must be divisible by."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


# Parameters at one channel and ten classes are in the comments; tests hold the presets to them.
SIZES: dict[str, UNetSize] = {
    "nano": UNetSize(16, (1, 2), 1, (), 64),  # 0.10 M
    "tiny": UNetSize(16, (1, 2), 1, None, 64, patch=2),  # 0.11 M
    "small": UNetSize(24, (1, 2, 2), 1, None, 96),  # 0.38 M
    "base": UNetSize(40, (1, 2, 2), 2),  # 1.9 M
    "paper-32": UNetSize(40, (1, 2, 2), 2, (16,)),  # 1.9 M, attention at 16x16 as published for CIFAR-10
    "large": UNetSize(72, (1, 2, 2), 2),  # 6 M
    "prior": UNetSize(32, (1, 2), 1, None, 128, patch=2, refine=12),  # 0.47 M
    "huge": UNetSize(96, (1, 2, 2, 2), 3),  # 22 M
}


def _norm(channels: int) -> nn.GroupNorm:
    groups = max(g for g in range(1, min(32, channels // 4) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Start at (almost) zero, so that a block starts as the identity."""
    with torch.no_grad():
        layer.weight.mul_(1e-3)
        layer.bias.zero_()  # type: ignore[union-attr]  # there is one
    return layer


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, embedding: int, attend: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * outputs)
        self.norm2, self.conv2 = _norm(outputs), _zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = _Attention(outputs) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # [N, inputs, h, w] -> [N, outputs, h, w]
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)  # [N, outputs, 1, 1] each
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), scale + 1)))
        # The sum of two signals of unit variance: 1/√2 keeps it at that.
        out: Tensor = self.attention((self.skip(x) + h) * math.sqrt(0.5))
        return out


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(n, 3, self.heads, c // self.heads, h * w).transpose(3, 4)
        q, k, v = qkv.unbind(1)  # [N, heads, h·w, C/heads] each: a pixel is a token
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, h, w)
        return (x + self.out(mixed)) * math.sqrt(0.5)


class UNet(nn.Module):
    """F(input, c_noise, classes); ConfigError for an unknown preset or a resolution that it cannot take.

    Args:
        size: widths and depths, or the name of a preset in ``SIZES``.
        resolution: height and width in pixels, divisible by ``size.divisor``.
        channels, inputs: 1 or 3, of the images that come out, and of what goes in; None: as many.
        num_classes: 0 for unconditional; class ``num_classes`` means "no class".
    """

    frequencies: Tensor

    def __init__(
        self, size: UNetSize | str, resolution: int, channels: int, num_classes: int = 0, inputs: int | None = None
    ) -> None:
        super().__init__()
        if isinstance(size, str):
            size = named_size(size)
        check_resolution(size, resolution)
        self.size, self.resolution, self.channels, self.num_classes = size, resolution, channels, num_classes
        width, patch = size.width, size.patch
        widths = [width * m for m in size.multipliers]
        grid = resolution // patch
        lowest = grid // 2 ** (len(widths) - 1)
        attention = (lowest,) if size.attention is None else size.attention
        emb = size.embedding or 4 * width
        # c_noise = log(σ)/4 spans about [-1.6, 1.1]: from a fraction of a turn over the range to a dozen.
        self.register_buffer("frequencies", torch.logspace(-1, 4, width // 2, base=2.0) * math.pi / 2, persistent=False)
        self.embed_noise = nn.Linear(2 * (width // 2), emb)
        self.embed_class = nn.Embedding(num_classes + 1, emb) if num_classes else None
        self.embed_out = nn.Linear(emb, emb)

        self.first = nn.Conv2d((channels if inputs is None else inputs) * patch**2, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips: list[int] = []
        now = width
        for level, w in enumerate(widths):
            for _ in range(size.blocks):
                self.down.append(_Block(now, w, emb, grid >> level in attention))
                now = w
                skips.append(now)
        self.middle = _Block(now, now, emb, lowest in attention)
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(size.blocks):
                self.up.append(_Block(now + skips.pop(), w, emb, grid >> level in attention))
                now = w
        self.norm = _norm(now)
        folded = size.refine or channels
        last = nn.Conv2d(now, folded * patch**2, 3, padding=1)
        self.last = last if size.refine else _zeroed(last)
        if size.refine:
            seen = folded + (channels if inputs is None else inputs)
            self.mix = nn.Conv2d(seen, size.refine, 3, padding=1)
            self.out = _zeroed(nn.Conv2d(size.refine, channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, classes: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; c_noise: [N]; classes: [N] in 0..num_classes, or None if unconditional."""
        angles = c_noise[:, None] * self.frequencies  # [N, width/2]
        embedding = self.embed_noise(torch.cat([angles.cos(), angles.sin()], 1))  # [N, E]
        if self.embed_class is not None:
            if classes is None:
                raise ConfigError("this network is class-conditional: pass classes (num_classes for 'no class').")
            embedding = embedding + self.embed_class(classes)
        embedding = F.silu(self.embed_out(F.silu(embedding)))

        blocks, patch, pixels = self.size.blocks, self.size.patch, x
        if patch > 1:
            x = F.pixel_unshuffle(x, patch)  # [N, C·p², H/p, W/p]
        h = self.first(x)  # [N, width, H/p, W/p]
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            if i and i % blocks == 0:
                h = F.avg_pool2d(h, 2)  # [N, C_l, H/(p·2ˡ), W/(p·2ˡ)] at level l
            h = block(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for i, block in enumerate(self.up):
            if i and i % blocks == 0:
                h = F.interpolate(h, scale_factor=2.0, mode="bilinear" if self.size.refine else "nearest")
            h = block(torch.cat([h, skips.pop()], 1), embedding)  # the skip of the same level
        out: Tensor = self.last(F.silu(self.norm(h)))  # [N, C·p², H/p, W/p]
        out = F.pixel_shuffle(out, patch) if patch > 1 else out  # [N, C, H, W]
        if self.size.refine:
            out = self.out(F.silu(self.mix(torch.cat([F.silu(out), pixels], 1))))
        return out


def named_size(name: str) -> UNetSize:
    """The preset `name`; ConfigError if there is none."""
    require(name in SIZES, "network size", name, tuple(SIZES))
    return SIZES[name]


def check_resolution(size: UNetSize, resolution: int) -> None:
    """Raise ConfigError unless a network of this size can take images of `resolution` pixels."""
    if resolution < size.divisor or resolution % size.divisor:
        below = max(resolution // size.divisor, 1) * size.divisor
        raise ConfigError(
            f"resolution is {resolution}, but this network needs a multiple of {size.divisor} (it halves the image "
            f"{len(size.multipliers) - 1} times and folds {size.patch}x{size.patch} patches).  Choose --resolution "
            f"{below} or {below + size.divisor}, or another --network."
        )


def count_parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
