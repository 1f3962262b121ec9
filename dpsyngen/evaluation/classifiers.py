"""Classifiers of the classification accuracy score: logistic regression, MLP and DPDM's CNN (and see ``resnet``)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.errors import ConfigError

_AT_ONCE = 1000
"""Images that a network classifies at once, which bounds the memory."""


class Candidate(Protocol):
    """A trained classifier that may be chosen, such as the state after an epoch."""

    label: str
    epoch: int | None

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """uint8 [N, C, H, W] -> classes [N]."""
        ...

    def keep(self) -> Candidate:
        """The candidate in a form that later training does not change."""
        ...


class LinearCandidate:
    """Multinomial logistic regression on pixels in [0, 1] with inverse regularisation `c` (scikit-learn).

    Args:
        c: inverse regularisation.
        pixels: the images as :func:`flat` gives them, [N, C·H·W].
        labels: their classes [N].
    """

    def __init__(self, c: float, pixels: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
        from sklearn.linear_model import LogisticRegression

        self.label, self.epoch = f"C = {c:g}", None
        # 100 iterations of L-BFGS do not always converge; the candidates are compared as they are.
        self._model = LogisticRegression(C=c, max_iter=100)
        import warnings

        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings(), _blas_threads():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self._model.fit(pixels, labels)

    def keep(self) -> LinearCandidate:
        """Itself: it does not change."""
        return self

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        with _blas_threads():
            predicted: NDArray[np.int64] = self._model.predict(flat(images))
        return predicted


def _blas_threads() -> AbstractContextManager[object]:
    """As many threads for NumPy's matrix products as PyTorch has.

    Otherwise they take every core, however many processes an experiment runs beside each other, and wait for one
    another in loops.
    """
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(torch.get_num_threads(), "blas")
    return limits


def linear_candidates(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterator[LinearCandidate]:
    """Three strengths of regularisation, each fitted when it is asked for; the pixels are converted once."""
    pixels = flat(images)
    for c in (0.01, 0.1, 1.0):
        yield LinearCandidate(c, pixels, labels)


def flat(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pixels [N, C, H, W] as rows of numbers in [0, 1]."""
    return np.divide(images.reshape(len(images), -1), 255, dtype=np.float32)


def make_mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """One hidden layer of 100 on images of `shape` [C, H, W], as in DPDM's evaluation."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 100), nn.ReLU(), nn.Linear(100, classes))


class HalfDropout(nn.Module):
    """Dropout with probability ½, from whole random words: one byte decides on a number.

    The same law as ``nn.Dropout(0.5)``, which takes a quarter of the CNN's time on a CPU for its Bernoulli draws.
    """

    def forward(self, x: Tensor) -> Tensor:
        """While training: each number times 0 or 2; otherwise `x`."""
        if not self.training:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].bitwise_and_(1)
        # In the memory order of x: the draws are independent, so any order will do.
        mask = torch.empty_like(x)
        mask.as_strided((x.numel(),), (1,)).copy_(kept)
        return x * mask.mul_(2)


def make_cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """DPDM's CNN: convolutions of 32, 64 and 128 channels, two max pools, a hidden layer of 128, dropout ½.

    Two deviations from DPDM (arXiv 2210.09929), whose CNN takes 1×28×28 only.  The width of the hidden layer's input is
    computed from `shape` [C, H, W] (1,152 for 1×28×28, as there).  The convolutions are unpadded there; below 22 pixels
    that would leave one position or none, so such images are padded by a pixel (4 pixels is the smallest size).
    """
    channels, height, width = shape
    if min(height, width) < 4:
        raise ConfigError(f"images are {height}×{width} pixels, but the classifier cnn needs 4 at least; leave it out.")
    p = 1 if min(height, width) < 22 else 0
    convolutions = nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=p),
        nn.MaxPool2d(2),
        nn.ReLU(),
        HalfDropout(),
        nn.Conv2d(32, 64, 3, padding=p),
        nn.MaxPool2d(2),
        nn.ReLU(),
        HalfDropout(),
        nn.Conv2d(64, 128, 3, padding=p),
        nn.ReLU(),
        nn.Flatten(),
    )
    with torch.no_grad():
        flat = convolutions(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(convolutions, nn.Linear(flat, 128), nn.ReLU(), HalfDropout(), nn.Linear(128, classes))


class NetworkCandidate:
    """The state of a network after an epoch."""

    def __init__(self, epoch: int, network: nn.Module, device: str) -> None:
        self.label, self.epoch = f"epoch {epoch}", epoch
        self._network, self._device = network, device

    def keep(self) -> NetworkCandidate:
        """A copy that stays as it is while the live network trains on."""
        return NetworkCandidate(self.epoch, copy.deepcopy(self._network), self._device)

    @torch.no_grad()
    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        self._network.eval()
        parts = [
            self._network(scaled(torch.from_numpy(images[i : i + _AT_ONCE].copy()).to(self._device))).argmax(1).cpu()
            for i in range(0, len(images), _AT_ONCE)
        ]
        self._network.train()
        return torch.cat(parts).numpy()


def scaled(images: Tensor) -> Tensor:
    """uint8 -> numbers in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def train_network(
    network: nn.Module,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    device: str,
) -> Iterator[NetworkCandidate]:
    """Train with Adam on cross-entropy, yielding a candidate after each epoch.

    DPDM's learning rate is 3e-4, for 50 epochs of 60,000 images; with fewer presentations the caller passes more.

    A candidate is the live network: judge it, or `keep` it, before asking for the next one.
    """
    # Channels last: 1.4 times as fast on a CPU.
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    # On a GPU the images lie there once, in bytes, and no batch has to travel.
    x, y = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(x), generator=generator).to(device)
        for rows in order.split(batch_size):
            loss = F.cross_entropy(network(scaled(x[rows])), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        yield NetworkCandidate(epoch, network, device)
