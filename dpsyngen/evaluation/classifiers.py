"""Classifiers of the classification accuracy score: logistic regression, MLP, DPDM's CNN, a small ResNet, a WideResNet.

The ResNet is meant to be quick on one CPU core: pre-activation blocks (He et al., arXiv 1603.05027), shortcuts that
average before they project (He et al., arXiv 1812.01187), one cycle of the learning rate (Smith & Topin, arXiv
1708.07120), shifts, mixup (Zhang et al., arXiv 1710.09412) and label smoothing.  It has batch normalisation, not group
normalisation: nothing here is trained privately, so examples may mix, and with a short schedule it was several points
better in what we measured (docs/cas.md).  The WideResNet (Zagoruyko & Komodakis, arXiv 1605.07146) has the same blocks
and recipe, and an average of its weights is what classifies.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpsyngen.errors import require

_AT_ONCE = 1000  # images that a network classifies at once, which bounds the memory
_ADAM_RATE = 1e-3
"""DPDM's is 3e-4, for 50 epochs of 60,000 images; with fewer presentations more is needed."""
WIDTHS = (24, 48, 96)
"""Channels of the ResNet's blocks."""
_AVERAGE = 0.995
"""What a step leaves of the average of the WideResNet's weights: it is that of some 200 steps."""
_SMALLEST = 4  # pixels of an image's side, for CNN and ResNets
_PEAK_RATE, _WARM, _DECAY, _SMOOTHING, _MIXUP = 0.1, 0.2, 5e-4, 0.1, 0.2


@dataclass(frozen=True)
class Candidate:
    """A trained classifier that may be chosen: one strength of regularisation, or the network after an epoch.

    A network goes on training: `predict`, or `keep` the candidate, before the next one is asked for.
    """

    label: str
    epoch: int | None
    model: Any  # scikit-learn's logistic regression, or a network

    def keep(self) -> Candidate:
        """The candidate in a form that later training does not change."""
        return replace(self, model=copy.deepcopy(self.model))

    @torch.no_grad()
    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """uint8 [N, C, H, W] -> classes [N]."""
        if not isinstance(self.model, nn.Module):
            with threadpool_limits(torch.get_num_threads(), "blas"):
                predicted: NDArray[np.int64] = self.model.predict(_flat(images))
            return predicted
        device = next(self.model.parameters()).device
        self.model.eval()
        parts = [
            self.model(scaled(torch.from_numpy(images[i : i + _AT_ONCE].copy()).to(device))).argmax(1).cpu()
            for i in range(0, len(images), _AT_ONCE)
        ]
        self.model.train()
        return torch.cat(parts).numpy()


def candidates(
    name: str, x: NDArray[np.uint8], y: NDArray[np.int64], num_classes: int, seed: int, epochs: int, device: str
) -> Iterator[Candidate]:
    """What may be chosen: three strengths of regularisation, or the network after each epoch."""
    if name == "logreg":
        return linear_candidates(x, y)
    make = {"mlp": make_mlp, "cnn": make_cnn, "resnet": make_resnet, "wideresnet": make_wideresnet}[name]
    how = {"augmented": name.endswith("resnet"), "averaged": name == "wideresnet"}
    order = torch.Generator().manual_seed(seed)
    network = make(x.shape[1:], num_classes)
    return train_network(network, x, y, **how, epochs=epochs, generator=order, device=device)


def linear_candidates(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterator[Candidate]:
    """Multinomial logistic regression on pixels in [0, 1] (scikit-learn), with three strengths of regularisation.

    Each is fitted when it is asked for.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    pixels = _flat(images)
    for c in (0.01, 0.1, 1.0):
        # 100 iterations of L-BFGS do not always converge; the candidates are compared as they are.
        model = LogisticRegression(C=c, max_iter=100)
        # NumPy's matrix products would take every core, however many processes an experiment runs beside each other.
        with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads(), "blas"):
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(pixels, labels)
        yield Candidate(f"C = {c:g}", None, model)


def _flat(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.divide(images.reshape(len(images), -1), 255, dtype=np.float32)


def make_mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """One hidden layer of 100 on images of `shape` [C, H, W], as in DPDM's evaluation."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 100), nn.ReLU(), nn.Linear(100, classes))


def _require_size(shape: tuple[int, ...], name: str) -> None:
    smallest = f"{_SMALLEST} pixels at least for the classifier {name}, or leave it out"
    require(min(shape[1:]) >= _SMALLEST, "the side of images", min(shape[1:]), smallest)


def make_cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """DPDM's CNN: convolutions of 32, 64 and 128 channels, two max pools, a hidden layer of 128, dropout ½.

    Two deviations from DPDM (arXiv 2210.09929), whose CNN takes 1×28×28 only.  The width of the hidden layer's input is
    computed from `shape` [C, H, W] (1,152 for 1×28×28, as there).  The convolutions are unpadded there; below 22 pixels
    that would leave one position or none, so such images are padded by a pixel (4 pixels is the smallest size).
    """
    _require_size(shape, "cnn")
    p = 1 if min(shape[1:]) < 22 else 0
    convolutions = nn.Sequential(
        *(nn.Conv2d(shape[0], 32, 3, padding=p), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(32, 64, 3, padding=p), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(64, 128, 3, padding=p), nn.ReLU(), nn.Flatten()),
    )
    with torch.no_grad():
        flat = convolutions(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(convolutions, nn.Linear(flat, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes))


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
    """One block each of 24, 48 and 96 channels (174,000 parameters) on images of `shape` [C, H, W] from 4 pixels.

    The first convolution brings images down to 9 to 16 pixels: its stride is 1 up to 16 pixels, 2 up to 32, and so on.
    """
    _require_size(shape, "resnet")
    stride = 1
    while -(-max(shape[1:]) // stride) > 16:
        stride *= 2
    first = nn.Conv2d(shape[0], WIDTHS[0], max(3, stride + 1), stride, max(1, stride // 2), bias=False)
    return _residual(first, WIDTHS, 1, classes)


def make_wideresnet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """WRN-40-4, as published tables use it: six blocks each of 64, 128 and 256 channels (8.9 million parameters).

    It computes 170 times as much for an image of 28×28 as the ResNet: for a GPU.
    """
    _require_size(shape, "wideresnet")
    return _residual(nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False), (64, 128, 256), 6, classes)


def _residual(first: nn.Conv2d, widths: tuple[int, ...], each: int, classes: int) -> nn.Module:
    blocks, channels = [], first.out_channels
    for i, width in enumerate(widths):
        for j in range(each):
            blocks.append(Block(channels, width, 2 if i and not j else 1))
            channels = width
    head = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(first, *blocks, *head, nn.Linear(channels, classes))


def scaled(images: Tensor) -> Tensor:
    """uint8 -> numbers in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def train_network(
    network: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    augmented: bool,
    averaged: bool = False,
    epochs: int,
    generator: torch.Generator,
    device: str,
    batch_size: int = 128,
) -> Iterator[Candidate]:
    """Train on images [N, C, H, W], yielding a candidate after each epoch.

    With Adam on cross-entropy, as DPDM does; `augmented` (the ResNets), with SGD (Nesterov momentum 0.9) in one cycle
    of the learning rate on shifted and mixed images, N >= 2.  `averaged`: candidates have the average of the weights.
    `generator` (CPU) is that of order, shifts and mixing; dropout draws from PyTorch's own.
    """
    # Channels last: 1.4 times as fast on a CPU.
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    # On a GPU the images lie there once, in bytes, and no batch has to travel.
    x, y = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    # Batch statistics need two images at least: the parts of an augmented epoch differ by one image at most.
    parts = max(1, min(-(-len(x) // batch_size), len(x) // 2))
    shift = shift_for(images.shape[2:])
    optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), lr=_ADAM_RATE)
    if augmented:
        options: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": _DECAY, "foreach": True}
        optimizer = torch.optim.SGD(network.parameters(), lr=_PEAK_RATE, **options)
    average = None
    if averaged:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGE), use_buffers=True)
    step = 0
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(x), generator=generator).to(device)
        for rows in order.tensor_split(parts) if augmented else order.split(batch_size):
            if augmented:
                step += 1
                optimizer.param_groups[0]["lr"] = _PEAK_RATE * one_cycle(step, epochs * parts)
                loss = _augmented_loss(network, shifted(x[rows], shift, generator), y[rows], generator)
            else:
                loss = F.cross_entropy(network(scaled(x[rows])), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if average is not None:
                average.update_parameters(network)
        yield Candidate(f"epoch {epoch}", epoch, network if average is None else average.module)


def _augmented_loss(network: nn.Module, images: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy with smoothed labels on mixed images (mixup)."""
    # λ ~ Beta(0.2, 0.2) of the batch, and with which image each is mixed.
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    share = float(rng.beta(_MIXUP, _MIXUP))
    partner = torch.randperm(len(images), generator=generator).to(images.device)
    values = scaled(images)
    logits = network(values.lerp(values[partner], 1 - share))
    loss = share * F.cross_entropy(logits, target, label_smoothing=_SMOOTHING)
    return loss + (1 - share) * F.cross_entropy(logits, target[partner], label_smoothing=_SMOOTHING)


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
    """Move each image [B, C, H, W] by up to `most` pixels either way, repeating its border pixels."""
    if most == 0:
        return images
    count, _, height, width = images.shape
    moves = torch.randint(-most, most + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + moves[0]).clamp_(0, height - 1).to(images.device)
    columns = (torch.arange(width) + moves[1]).clamp_(0, width - 1).to(images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    # Indexing puts the channels last in memory, which is where the network wants them.
    return images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
