"""The Inception-v3 of FID: the network of the TensorFlow graph of 2015-12-05, as its PyTorch weights file names it.

It differs from the usual Inception-v3 in three places: average pools that leave out the padding, a max pool in the
last block, and no auxiliary head.  Images are resized as TensorFlow 1 did it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsyngen.errors import DataError
from dpsyngen.evaluation.features import FeatureExtractor, in_colour
from dpsyngen.files import cache_home, file_sha256

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SIDE = 299


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _max3(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


class FidInception:
    """uint8 RGB [N, 3, H, W] -> pooled features [N, 2048], from the tensors of the published file, by their names.

    Their shapes say how wide each layer is; tests have narrower ones.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: str = "cpu") -> None:
        self._weights = {name: tensor.to(device) for name, tensor in weights.items()}

    def __call__(self, images: Tensor) -> Tensor:
        x = (tf1_resize(images.float(), _SIDE) - 128) / 128
        x = self._conv("Conv2d_2a_3x3", self._conv("Conv2d_1a_3x3", x, 2, padded=False), padded=False)
        x = F.max_pool2d(self._conv("Conv2d_2b_3x3", x), 3, 2)
        x = F.max_pool2d(self._conv("Conv2d_4a_3x3", self._conv("Conv2d_3b_1x1", x), padded=False), 3, 2)
        double = ["3x3dbl_1", "3x3dbl_2"]
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self._mixed(block, x, _mean3, ["1x1"], ["5x5_1", "5x5_2"], [*double, "3x3dbl_3"])
        x = self._halved("Mixed_6a", x, ["3x3"], [*double, "3x3dbl_3"])
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            sevens = [f"7x7dbl_{i}" for i in range(1, 6)]
            x = self._mixed(block, x, _mean3, ["1x1"], ["7x7_1", "7x7_2", "7x7_3"], sevens)
        x = self._halved("Mixed_7a", x, ["3x3_1", "3x3_2"], [f"7x7x3_{i}" for i in range(1, 5)])
        # The last block pools by maxima: so does the graph that FIDs are made with.
        for block, pool in (("Mixed_7b", _mean3), ("Mixed_7c", _max3)):
            threes = [["3x3_1", "3x3_2a"], ["3x3_1", "3x3_2b"], [*double, "3x3dbl_3a"], [*double, "3x3dbl_3b"]]
            x = self._mixed(block, x, pool, ["1x1"], *threes)
        return x.mean((2, 3))

    def _conv(self, name: str, x: Tensor, stride: int = 1, *, padded: bool = True) -> Tensor:
        """A convolution, batch normalisation and ReLU; `padded`: with as much padding as keeps the size."""
        kernel = self._weights[f"{name}.conv.weight"]
        x = F.conv2d(x, kernel, None, stride, (kernel.shape[2] // 2, kernel.shape[3] // 2) if padded else 0)
        mean, variance, weight, bias = (
            self._weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, variance, weight, bias, eps=0.001))

    def _branch(self, block: str, names: list[str], x: Tensor) -> Tensor:
        for name in names:
            x = self._conv(f"{block}.branch{name}", x)
        return x

    def _mixed(self, block: str, x: Tensor, pool: Callable[[Tensor], Tensor], *branches: list[str]) -> Tensor:
        """Branches of convolutions beside each other, and one that pools before it projects."""
        out = [self._branch(block, names, x) for names in branches]
        return torch.cat([*out, self._branch(block, ["_pool"], pool(x))], 1)

    def _halved(self, block: str, x: Tensor, *branches: list[str]) -> Tensor:
        """The same, where the last convolution of each branch and the pooling have stride 2 and no padding."""
        out = []
        for *first, last in branches:
            h = self._branch(block, first, x)
            out.append(self._conv(f"{block}.branch{last}", h, 2, padded=False))
        return torch.cat([*out, F.max_pool2d(x, 3, 2)], 1)


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


def load_inception(weights: Path, device: str = "cpu") -> tuple[FidInception, int]:
    """The network with the weights of a ``.pth`` file, and its number of features.

    DataError if that is not an Inception of FID.
    """
    try:
        # Tensors only: no pickled code is run.  A first pass shows what is missing, or of another shape.
        state = torch.load(weights, map_location="cpu", weights_only=True)
        network = FidInception(state, device)
        with torch.inference_mode():
            features = network(torch.zeros(1, 3, 8, 8, device=device)).shape[1]
        if features != 64 * len(state["Conv2d_1a_3x3.conv.weight"]):
            raise ValueError(f"it has {features} features")
    except Exception as error:  # torch.load raises many kinds
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{weights} does not hold the weights of FID's Inception ({why}).  Give the file "
            f"{WEIGHTS_URL.rsplit('/', 1)[-1]}."
        ) from None
    return network, features


def fetch_weights() -> Path:
    """Download the published weights (92 MB) once, checked by SHA-256; DataError says how to get them otherwise."""
    import pooch

    # The name that pooch gives by default: what earlier versions downloaded has it.
    target = cache_home() / pooch.utils.unique_file_name(WEIGHTS_URL)
    try:
        known = f"sha256:{WEIGHTS_SHA256}"
        return Path(pooch.retrieve(WEIGHTS_URL, known_hash=known, fname=target.name, path=target.parent))
    except Exception as error:  # requests, urllib and pooch each have their own
        raise DataError(
            f"the weights of FID's Inception could not be downloaded ({type(error).__name__}).  Get {WEIGHTS_URL} on a "
            f"machine with a network and save it as {target} (`dpsyngen evaluate` takes it from elsewhere, too: "
            "--inception-weights), or use the features efficientnet-lite0, which work offline."
        ) from None


class Inception(FeatureExtractor):
    """2,048 pooled features of FID's Inception-v3, from a weights file (None: the published one, downloaded once)."""

    name = "inception"

    def __init__(self, weights: Path | str | None = None, device: str = "cpu", batch_size: int = 32) -> None:
        super().__init__(device, batch_size)
        path = fetch_weights() if weights is None else Path(weights)
        self._network, dimensions = load_inception(path, device)
        self.facts = {"dimensions": dimensions, "resized_to": _SIDE, "resizing": "bilinear, TensorFlow 1"}
        self.facts |= {"weights": path.name, "weights_sha256": file_sha256(path)}

    def _features(self, images: Any) -> Any:
        return self._network(in_colour(images))
