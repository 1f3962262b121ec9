"""The network F of the denoiser: a class-conditional U-Net in the manner of DDPM++ (Song et al. 2021).

Residual blocks with GroupNorm whose second normalisation is scaled and shifted by the embedding of σ and class,
attention at chosen resolutions, skips scaled by 1/√2.  Trimmed for CPUs: resolutions change by plain averaging and
repetition instead of blocks of their own, and the way up has as many blocks as the way down.  Every layer has a
per-example rule, and nothing mixes images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpsyngen.diffusion import standalone
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


SIZES = {name: UNetSize(*numbers) for name, numbers in standalone.SIZES.items()}


class UNet(standalone.UNet):
    """F(input, c_noise, classes); ConfigError for an unknown preset or a resolution that it cannot take.

    Args:
        size: widths and depths, or the name of a preset in ``SIZES``.
        resolution: height and width in pixels, divisible by ``size.divisor``.
        channels, inputs: 1 or 3, of the images that come out, and of what goes in; None: as many.
        num_classes: 0 for unconditional; class ``num_classes`` means "no class".
    """

    def __init__(
        self, size: UNetSize | str, resolution: int, channels: int, num_classes: int = 0, inputs: int | None = None
    ) -> None:
        if isinstance(size, str):
            size = named_size(size)
        check_resolution(size, resolution)
        numbers = astuple(replace(size, embedding=size.embedding or 4 * size.width))
        super().__init__(numbers, resolution, channels, num_classes, inputs or channels)
        self.size, self.resolution, self.channels, self.num_classes = size, resolution, channels, num_classes
        blocks = [*self.down, self.middle, *self.up]
        ends = [b.conv2 for b in blocks] + [b.attention.out for b in blocks if hasattr(b.attention, "out")]
        with torch.no_grad():  # at (almost) zero, so that a block starts as the identity
            for layer in (*ends, self.out if size.refine else self.last):
                layer.weight.mul_(1e-3)
                layer.bias.zero_()

    def forward(self, x: Tensor, c_noise: Tensor, classes: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; c_noise: [N]; classes: [N] in 0..num_classes, or None if unconditional."""
        if self.embed_class is not None and classes is None:
            raise ConfigError("this network is class-conditional: pass classes (num_classes for 'no class').")
        return super().forward(x, c_noise, classes)


class _WithoutNumbers(TorchFunctionMode):
    """Leaves out the numbers for which PyTorch, on the device "meta", imports its compiler: a second and a half."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.logspace:
            return torch.empty((), device="cpu")
        if func is nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Networks that are made within have shapes and no numbers, and take no memory."""
    with torch.device("meta"), _WithoutNumbers():
        yield


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
