"""A small modern ResNet for the classification accuracy score, quick on one CPU core.

Pre-activation blocks (He et al., "Identity mappings in deep residual networks", arXiv 1603.05027), shortcuts that
average before they project (He et al., "Bag of tricks", arXiv 1812.01187), one cycle of the learning rate (Smith &
Topin, arXiv 1708.07120), shifts, mixup (Zhang et al., arXiv 1710.09412) and label smoothing.

Batch normalisation, not group normalisation: nothing here is trained privately, so examples may mix, and with a short
schedule it was several points better in what we measured (docs/cas.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation.classifiers import NetworkCandidate, scaled

WIDTHS = (24, 48, 96)
_SMALLEST = 4
_PEAK_RATE = 0.1
_WARM = 0.2
_DECAY = 5e-4
_SMOOTHING = 0.1
_MIXUP = 0.2


class Block(nn.Module):
    """Two 3×3 convolutions, each after normalisation and ReLU, beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.project = nn.Conv2d(channels, width, 1, bias=False) if channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, width, ⌈H/stride⌉, ⌈W/stride⌉]."""
        h = F.relu(self.norm1(x))
        if self.project is not None:
            x = self.project(F.avg_pool2d(h, 2, ceil_mode=True) if self.stride == 2 else h)
        out: Tensor = x + self.conv2(F.relu(self.norm2(self.conv1(h))))
        return out


def make_resnet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """One block each of 24, 48 and 96 channels (174,000 parameters) on images of `shape` [C, H, W].

    The first convolution brings images down to 9 to 16 pixels: its stride is 1 up to 16 pixels, 2 up to 32, and so on.

    Raises:
        ConfigError: images of fewer than 4 pixels a side.
    """
    channels, height, width = shape
    if min(height, width) < _SMALLEST:
        raise ConfigError(
            f"images are {height}×{width} pixels, but the classifier resnet needs {_SMALLEST} at least; leave it out."
        )
    stride = 1
    while -(-max(height, width) // stride) > 16:
        stride *= 2
    first = nn.Conv2d(channels, WIDTHS[0], max(3, stride + 1), stride, max(1, stride // 2), bias=False)
    blocks = [Block(WIDTHS[max(i - 1, 0)], w, 2 if i else 1) for i, w in enumerate(WIDTHS)]
    last = WIDTHS[-1]
    return nn.Sequential(
        first,
        *blocks,
        nn.BatchNorm2d(last),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, classes),
    )


def train_resnet(
    network: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    device: str,
) -> Iterator[NetworkCandidate]:
    """Train with SGD (Nesterov momentum 0.9) in one cycle of the learning rate, yielding a candidate after each epoch.

    Args:
        network: see :func:`make_resnet`; trained in place.
        images: uint8 [N, C, H, W], N >= 2.
        labels: their classes [N].
        epochs: passes over the images; the learning rate is back near zero after the last.
        batch_size: images in a step.
        generator: CPU generator of the order, the shifts and the mixing.
        device: where to compute.
    """
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x, y = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    # Batch statistics need two images at least: the parts of an epoch differ by one image at most.
    parts = max(1, min(-(-len(x) // batch_size), len(x) // 2))
    optimizer = torch.optim.SGD(
        network.parameters(), lr=_PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=_DECAY, foreach=True
    )
    step = 0
    shift = shift_for(images.shape[2:])
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(x), generator=generator).tensor_split(parts):
            rows = rows.to(device)
            batch, target = shifted(x[rows], shift, generator), y[rows]
            share, partner = _mixing(len(rows), generator)
            partner = partner.to(device)
            values = scaled(batch)
            logits = network(values.lerp(values[partner], 1 - share))
            loss = share * F.cross_entropy(logits, target, label_smoothing=_SMOOTHING)
            loss = loss + (1 - share) * F.cross_entropy(logits, target[partner], label_smoothing=_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = _PEAK_RATE * one_cycle(step, epochs * parts)
            optimizer.step()
        yield NetworkCandidate(epoch, network, device)


def one_cycle(step: int, steps: int) -> float:
    """Share of the peak learning rate at step 1 to `steps`: up in a straight line, then down along half a cosine."""
    warm = max(1, round(_WARM * steps))
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm + 1)))


def shift_for(size: tuple[int, ...]) -> int:
    """Pixels by which images [H, W] are shifted at most: one for every 28, none below 14."""
    return round(min(size) / 28)


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image [B, C, H, W] moved by up to `most` pixels either way, its border pixels repeated."""
    if most == 0:
        return images
    count, _, height, width = images.shape
    moves = torch.randint(-most, most + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + moves[0]).clamp_(0, height - 1).to(images.device)
    columns = (torch.arange(width) + moves[1]).clamp_(0, width - 1).to(images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    # Indexing puts the channels last in memory, which is where the network wants them.
    return images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _mixing(count: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """λ ~ Beta(0.2, 0.2) of a batch, and with which image each is mixed."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(_MIXUP, _MIXUP)), torch.randperm(count, generator=generator)
