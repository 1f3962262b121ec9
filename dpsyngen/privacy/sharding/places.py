"""Where one process's part of a model lies in the vector of all its parameters.

The noise of a step is one vector, in the order of the parameters.  Where a model is split over processes, each has to
take its own coordinates of that vector: two that took the same ones would add the same noise to different
coordinates, and their difference would be free of it.  So a sum of clipped gradients carries its places with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsyngen.privacy.clipping import ClippedGradient


@dataclass(frozen=True)
class Place:
    """A process's part of one parameter: indices first .. first + length - 1 along one axis.

    Attributes:
        start: coordinate at which the whole parameter starts.
        shape: of the whole parameter.
        dim: the axis along which it is split.
        first: first index along `dim` that this process has.
        length: how many; 0 for none.
    """

    start: int
    shape: tuple[int, ...]
    dim: int
    first: int
    length: int

    @classmethod
    def whole(cls, start: int, shape: tuple[int, ...]) -> Place:
        """All of a parameter."""
        return cls(start, shape, 0, 0, shape[0] if shape else 1)

    @property
    def span(self) -> tuple[int, int]:
        """(start, length) of the coordinates that cover the part; more than the part unless it is split by rows."""
        numbers = math.prod(self.shape)
        if self.length == 0 or numbers == 0:
            return self.start, 0
        if self.dim:
            return self.start, numbers
        row = math.prod(self.shape[1:])
        return self.start + self.first * row, self.length * row

    def cut(self, covering: NDArray[np.float32], own: Tensor) -> Tensor:
        """The part's own values, out of those of its span, in shape, dtype and on the device of `own`."""
        values = torch.from_numpy(covering)
        if self.dim and len(covering):
            values = values.view(self.shape).narrow(self.dim, self.first, self.length)
        return values.reshape(own.shape).to(own.device, own.dtype)

    @staticmethod
    def own(value: Tensor) -> Tensor:
        """The part of a distributed tensor that is here; any other tensor as it is."""
        local: Any = getattr(value, "to_local", None)
        return value if local is None else local()

    @staticmethod
    def like(value: Tensor, own: Tensor) -> Tensor:
        """`own` as the local part of a tensor that is distributed like `value`; or `own`, if that is not."""
        if not hasattr(value, "to_local"):
            return own
        from torch.distributed.tensor import DTensor

        assert isinstance(value, DTensor)
        return DTensor.from_local(
            own, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )


@dataclass(frozen=True)
class ShardedGradient(ClippedGradient):
    """This process's part of a sum of clipped gradients, with the L2 sensitivity of the *whole* sum.

    ``examples`` and ``not_finite`` count those of all processes; ``norms`` has those that went through this one.

    Attributes:
        places: where each of ``sums`` lies.
        coordinates: how many the whole has.
    """

    places: tuple[Place, ...]
    coordinates: int
