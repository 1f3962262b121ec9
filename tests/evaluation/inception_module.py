"""FID's Inception-v3 as a module with layers of its own: an independent statement of the network, and random weights.

Layers of `narrow` times less width keep tests quick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.evaluation.inception import tf1_resize


class _Conv(nn.Module):
    """A convolution, then batch normalisation and ReLU; arguments as for ``nn.Conv2d``."""

    def __init__(self, inputs: int, outputs: int, kernel: Any = 1, stride: int = 1, padding: Any = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


_Path = Sequence[tuple[Any, ...]]


class _Mixed(nn.Module):
    """Branches beside each other, whose outputs are concatenated.

    Each of `paths` is a sequence of steps: convolutions (name in the weights file, channels, then kernel, stride and
    padding as for ``nn.Conv2d``) and ``_POOL``.  Branches that begin with the same steps share them.
    """

    def __init__(
        self, inputs: int, w: int, pool: Callable[[Tensor], Tensor], *paths: Sequence[tuple[Any, ...]]
    ) -> None:
        super().__init__()
        self.pool, self.paths = pool, [tuple(step[0] for step in path) for path in paths]
        for path in paths:
            width = inputs
            for name, *shape in path:
                if name != "pool":
                    if not hasattr(self, name):
                        self.add_module(name, _Conv(width // w, shape[0] // w, *shape[1:]))
                    width = shape[0]

    def forward(self, x: Tensor) -> Tensor:
        done: dict[tuple[str, ...], Tensor] = {(): x}
        for path in self.paths:
            for i, step in enumerate(path):
                if path[: i + 1] not in done:
                    h = done[path[:i]]
                    done[path[: i + 1]] = self.pool(h) if step == "pool" else self.get_submodule(step)(h)
        return torch.cat([done[path] for path in self.paths], 1)


def _mean3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _max3(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


_POOL = ("pool",)


def _a(inputs: int, pool: int, w: int) -> _Mixed:
    double = [("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 1, 1)]
    five = [("branch5x5_1", 48), ("branch5x5_2", 64, 5, 1, 2)]
    return _Mixed(inputs, w, _mean3, [("branch1x1", 64)], five, double, [_POOL, ("branch_pool", pool)])


def _b(inputs: int, w: int) -> _Mixed:
    double = [("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 2)]
    return _Mixed(inputs, w, _halve, [("branch3x3", 384, 3, 2)], double, [_POOL])


def _c(c: int, w: int) -> _Mixed:
    across, down = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    single = [("branch7x7_1", c), ("branch7x7_2", c, *across), ("branch7x7_3", 192, *down)]
    double = [("branch7x7dbl_1", c), ("branch7x7dbl_2", c, *down), ("branch7x7dbl_3", c, *across)]
    double += [("branch7x7dbl_4", c, *down), ("branch7x7dbl_5", 192, *across)]
    return _Mixed(768, w, _mean3, [("branch1x1", 192)], single, double, [_POOL, ("branch_pool", 192)])


def _d(inputs: int, w: int) -> _Mixed:
    seven = [("branch7x7x3_1", 192), ("branch7x7x3_2", 192, (1, 7), 1, (0, 3))]
    seven += [("branch7x7x3_3", 192, (7, 1), 1, (3, 0)), ("branch7x7x3_4", 192, 3, 2)]
    return _Mixed(inputs, w, _halve, [("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2)], seven, [_POOL])


def _e(inputs: int, pool: Callable[[Tensor], Tensor], w: int) -> _Mixed:
    across, down = (384, (1, 3), 1, (0, 1)), (384, (3, 1), 1, (1, 0))
    single = [("branch3x3_1", 384)]
    double = [("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3, 1, 1)]
    threes = [[*single, ("branch3x3_2a", *across)], [*single, ("branch3x3_2b", *down)]]
    doubles = [[*double, ("branch3x3dbl_3a", *across)], [*double, ("branch3x3dbl_3b", *down)]]
    return _Mixed(inputs, w, pool, [("branch1x1", 320)], *threes, *doubles, [_POOL, ("branch_pool", 192)])


class ModuleInception(nn.Module):
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
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32, w), _a(256, 64, w), _a(288, 64, w)
        self.Mixed_6a, self.Mixed_6b = _b(288, w), _c(128, w)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(160, w), _c(160, w), _c(192, w)
        # The last block pools by maxima: so does the graph that FIDs are made with.
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _d(768, w), _e(1280, _mean3, w), _e(2048, _max3, w)

    def forward(self, images: Tensor) -> Tensor:
        x = (tf1_resize(images.float(), 299) - 128) / 128
        for name, layer in self.named_children():  # in the order in which they are defined
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        return x.mean((2, 3))


def with_random_weights(module: ModuleInception) -> ModuleInception:
    """The same, with weights that keep the signal alive through all layers."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
            part.bias.data.uniform_(0.05, 0.2)
    return module
