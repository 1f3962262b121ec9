"""The Inception-v3 of FID: the network of the TensorFlow graph of 2015-12-05, as its PyTorch weights file names it.

It differs from the usual Inception-v3 in three places: average pools that leave out the padding, a max pool in the
last block, and no auxiliary head.  Images are resized as TensorFlow 1 did it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.errors import DataError
from dpsyngen.evaluation.features import NetworkFeatures, file_sha256, in_colour

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SIDE = 299
_WIDTHS = (32, 16, 8, 4, 2)  # channels of the first convolution: the real network's, and narrower for tests


class _Conv(nn.Module):
    """A convolution, then batch normalisation and ReLU; arguments as for ``nn.Conv2d``."""

    def __init__(self, inputs: int, outputs: int, kernel: Any = 1, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _A(nn.Module):
    def __init__(self, inputs: int, pool: int, w: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64 // w)
        self.branch5x5_1, self.branch5x5_2 = _Conv(inputs, 48 // w), _Conv(48 // w, 64 // w, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 64 // w), _Conv(64 // w, 96 // w, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96 // w, 96 // w, 3, padding=1)
        self.branch_pool = _Conv(inputs, pool // w)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_mean3(x))], 1
        )


class _B(nn.Module):
    def __init__(self, inputs: int, w: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384 // w, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 64 // w), _Conv(64 // w, 96 // w, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96 // w, 96 // w, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _C(nn.Module):
    def __init__(self, inputs: int, c7: int, w: int) -> None:
        super().__init__()
        c, o, across, down = c7 // w, 192 // w, (1, 7), (7, 1)
        pa, pd = (0, 3), (3, 0)
        self.branch1x1 = _Conv(inputs, o)
        self.branch7x7_1, self.branch7x7_2 = _Conv(inputs, c), _Conv(c, c, across, padding=pa)
        self.branch7x7_3 = _Conv(c, o, down, padding=pd)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(inputs, c), _Conv(c, c, down, padding=pd)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(c, c, across, padding=pa), _Conv(c, c, down, padding=pd)
        self.branch7x7dbl_5 = _Conv(c, o, across, padding=pa)
        self.branch_pool = _Conv(inputs, o)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_mean3(x))], 1)


class _D(nn.Module):
    def __init__(self, inputs: int, w: int) -> None:
        super().__init__()
        o = 192 // w
        self.branch3x3_1, self.branch3x3_2 = _Conv(inputs, o), _Conv(o, 320 // w, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(inputs, o), _Conv(o, o, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(o, o, (7, 1), padding=(3, 0)), _Conv(o, o, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, 2)], 1)


class _E(nn.Module):
    def __init__(self, inputs: int, w: int, max_pool: bool) -> None:
        super().__init__()
        o, self.max_pool = 384 // w, max_pool
        self.branch1x1 = _Conv(inputs, 320 // w)
        self.branch3x3_1 = _Conv(inputs, o)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(o, o, (1, 3), padding=(0, 1)), _Conv(o, o, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inputs, 448 // w), _Conv(448 // w, o, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(o, o, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(o, o, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(inputs, 192 // w)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.max_pool else _mean3(x)
        threes = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *threes, *doubles, self.branch_pool(pooled)], 1)


class FidInception(nn.Module):
    """uint8 RGB [N, 3, H, W] -> pooled features [N, 2048 // narrow].

    Args:
        narrow: divides all widths; 1 for the real network, 16 for tests (the weights file decides).
    """

    def __init__(self, narrow: int = 1) -> None:
        super().__init__()
        w = narrow
        self.dim = 2048 // w
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32 // w, 3, 2), _Conv(32 // w, 32 // w, 3)
        self.Conv2d_2b_3x3 = _Conv(32 // w, 64 // w, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64 // w, 80 // w), _Conv(80 // w, 192 // w, 3)
        self.Mixed_5b, self.Mixed_5c = _A(192 // w, 32, w), _A(256 // w, 64, w)
        self.Mixed_5d = _A(288 // w, 64, w)
        self.Mixed_6a = _B(288 // w, w)
        self.Mixed_6b, self.Mixed_6c = _C(768 // w, 128, w), _C(768 // w, 160, w)
        self.Mixed_6d, self.Mixed_6e = _C(768 // w, 160, w), _C(768 // w, 192, w)
        self.Mixed_7a = _D(768 // w, w)
        self.Mixed_7b, self.Mixed_7c = _E(1280 // w, w, False), _E(2048 // w, w, True)

    def forward(self, images: Tensor) -> Tensor:
        x = (tf1_resize(images.float(), _SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def tf1_resize(x: Tensor, side: int) -> Tensor:
    """Bilinear resizing of [N, C, H, W] to side x side with TensorFlow 1's corners (no half-pixel shift)."""
    for axis in (2, 3):
        length = x.shape[axis]
        position = torch.arange(side, dtype=x.dtype, device=x.device) * (length / side)
        low = position.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        weight = (position - low).view([-1 if a == axis else 1 for a in range(4)])
        x = torch.lerp(x.index_select(axis, low), x.index_select(axis, high), weight)
    return x


def load_inception(weights: Path) -> FidInception:
    """The network with the weights of a ``.pth`` (tensors only, no pickled code) or ``.safetensors`` file.

    Raises:
        DataError: the file cannot be read or is not an Inception of FID.
    """
    try:
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            # Tensors only: no pickled code is run.
            state = torch.load(weights, map_location="cpu", weights_only=True)
        stem = state["Conv2d_1a_3x3.conv.weight"]
        if stem.ndim != 4 or stem.shape[0] not in _WIDTHS:
            raise ValueError(f"Conv2d_1a_3x3.conv.weight is {tuple(stem.shape)}, not (32, 3, 3, 3)")
        network = FidInception(32 // stem.shape[0])
        # The published file has a classifier that FID does not use, and no counters of batches seen.
        missing, _ = network.load_state_dict(state, strict=False)
        missing = [k for k in missing if not k.endswith("num_batches_tracked")]
        if missing:
            raise KeyError(f"{len(missing)} tensors are missing, {missing[0]} among them")
    except Exception as error:  # torch.load raises many kinds
        raise DataError(
            f"{weights} does not hold the weights of FID's Inception: {error}.  Give the file "
            f"{WEIGHTS_URL.rsplit('/', 1)[-1]}."
        ) from None
    return network.eval().requires_grad_(False)


def fetch_weights() -> Path:
    """Download the published weights (92 MB) once, checked by SHA-256.

    Raises:
        DataError: no network; says how to get the file.
    """
    import pooch

    try:
        return Path(pooch.retrieve(WEIGHTS_URL, known_hash=f"sha256:{WEIGHTS_SHA256}", path=pooch.os_cache("dpsyngen")))
    except Exception as error:  # requests, urllib and pooch each have their own
        raise DataError(
            f"the weights of FID's Inception could not be downloaded ({type(error).__name__}).  Get {WEIGHTS_URL} on a "
            "machine with a network and pass it with --inception-weights, or use the features efficientnet-lite0, "
            "which work offline."
        ) from None


class Inception(NetworkFeatures):
    """2,048 pooled features of FID's Inception-v3.

    Args:
        weights: its weights file; None: the published one, downloaded once.
        device: where to compute.
        batch_size: images at a time.
    """

    name = "inception"

    def __init__(self, weights: Path | str | None = None, device: str = "cpu", batch_size: int = 32) -> None:
        super().__init__(device, batch_size)
        path = fetch_weights() if weights is None else Path(weights)
        self._network = load_inception(path).to(device)
        self._file, self._sha256 = path.name, file_sha256(path)

    @property
    def dim(self) -> int:
        return self._network.dim

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dimensions": self.dim,
            "resized_to": 299,
            "resizing": "bilinear, TensorFlow 1",
            "weights": self._file,
            "weights_sha256": self._sha256,
        }

    def _features(self, images: Any) -> Any:
        return self._network(in_colour(images))
