"""Clipping together: what all ways of splitting a model have in common, and splitting by hand.

The noise of a step is one vector, in the order of the parameters.  Where a model is split over processes, each has to
take its own coordinates of that vector: two that took the same ones would add the same noise to different
coordinates, and their difference would be free of it.  So a sum of clipped gradients carries its places with it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsyngen.errors import ConfigError
from dpsyngen.privacy.clipping import ClippedGradient, ClippingStyle, Draw, GridGradient
from dpsyngen.privacy.contributions import wide_dtype
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.per_example import PerExampleGradients, layer_numbers
from dpsyngen.privacy.recording import Tape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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

    def noisy(self, scale: float, divisor: float, draw: Draw) -> list[Tensor]:
        """Each process adds its own part of the noise of one process, so that every coordinate has noise once."""
        drawn = draw(self.coordinates, (place.span for place in self.places))
        return [
            place.like(total, (own + scale * place.cut(noise, own)) / divisor)
            for total, place, noise in zip(self.sums, self.places, drawn, strict=True)
            for own in (place.own(total),)
        ]


class ShardedGradients(PerExampleGradients, ABC):
    """The engine for one process's part of a model; made by :func:`dpsyngen.privacy.sharding.sharded`.

    It runs in one thread, since the collectives of the processes must come in one order.

    Attributes:
        places: where this process's part of each parameter lies.
        coordinates: how many numbers the whole model has.
        layer_count: how many layers the whole model has.
    """

    places: tuple[Place, ...]
    coordinates: int
    layer_count: int

    def __init__(
        self,
        module: nn.Module,
        clipping_norm: float,
        *,
        style: ClippingStyle = "flat",
        kernels: KernelChoices | None = None,
        shards: ProcessGroup | None = None,
    ) -> None:
        self._shards = shards
        super().__init__(module, clipping_norm, style=style, kernels=kernels, workers=1)

    @property
    def device(self) -> torch.device:
        return Place.own(self.parameters[0]).device

    @abstractmethod
    def _layers(self) -> list[int]:
        """Find out how the model is split: sets the attributes, and returns the layer of each own parameter."""

    @abstractmethod
    def _check_same(self, losses: Tensor) -> None:
        """Raise in all processes if they should see the same examples and do not."""

    @abstractmethod
    def _everyone(self) -> list[ProcessGroup]:
        """Groups that, one after the other, reach all processes that take part in a step."""

    @abstractmethod
    def _counting(self) -> list[ProcessGroup]:
        """Groups that, one after the other, reach all processes with other examples."""

    def zero(self) -> ShardedGradient:
        sums = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        norms = torch.zeros(0, dtype=self.parameters[0].dtype, device=self.device)
        return self._placed(ClippedGradient(sums, self.clipping_norm, 0, norms, 0))

    def __call__(
        self, loss: Callable[[], Tensor], examples: int, copies: int = 1, *, valid: int | Tensor | None = None
    ) -> ShardedGradient:
        if examples == 0:
            raise ConfigError(
                "examples is 0, but each process must run the same passes of a model that is split: give it one "
                "example of any kind, with valid=0."
            )
        own = super().__call__(loss, examples, copies, valid=valid)
        # Counts of all processes in place of this one's.
        counts = torch.tensor([own.examples, own.not_finite], device=self.device)
        total, not_finite = reduced(counts, self._counting(), "sum").tolist()
        return self._placed(ClippedGradient(own.sums, own.l2_sensitivity, total, own.norms, not_finite))

    def sum(
        self,
        loss: Callable[[slice], Tensor],
        examples: int,
        *,
        copies: int = 1,
        physical_batch: int = 32,
        valid: int | Tensor | None = None,
    ) -> ShardedGradient:
        """As of the base class.  All processes must give the same number of examples: those with fewer fill up."""
        self._check_agreement(examples=examples, copies=copies, physical_batch=physical_batch)
        total = super().sum(loss, examples, copies=copies, physical_batch=physical_batch, valid=valid)
        return self._placed(total)

    def sum_on_grid(
        self, loss: Callable[[slice], Tensor], examples: int, *, grid: float, copies: int = 1, physical_batch: int = 32
    ) -> GridGradient:
        raise ConfigError(
            "sums on a grid do not exist for a model that is split over processes: use `sum`, or keep it whole."
        )

    def _losses(self, tape: Tape, loss: Callable[[], Tensor]) -> Tensor:
        rows = super()._losses(tape, loss)
        self._check_same(rows.detach())
        return rows

    def _placed(self, own: ClippedGradient) -> ShardedGradient:
        return ShardedGradient(
            own.sums, own.l2_sensitivity, own.examples, own.norms, own.not_finite, self.places, self.coordinates
        )

    def _norms_of_whole(self, *norms: float) -> tuple[float, ...]:
        """All processes come to the same result, or some would wait for the others."""
        squares = torch.tensor(norms, dtype=wide_dtype(torch.empty(0, device=self.device)), device=self.device).square()
        return tuple(self.total(squares[:, None])[:, 0].sqrt().tolist())

    def _check_agreement(self, **values: int) -> None:
        """Raise ConfigError in all processes unless all were given the same values: else some would wait for ever."""
        mine = torch.tensor([s * v for v in values.values() for s in (1, -1)], device=self.device)
        bounds = reduced(mine, self._everyone(), "max").view(-1, 2).tolist()
        for name, (most, least) in zip(values, bounds, strict=True):
            if most != -least:
                raise ConfigError(
                    f"{name} is {values[name]} here and from {-least} to {most} in the processes that share the model, "
                    "but must be the same in all, since they gather parameters together.  Fill the smaller batches up "
                    "with any rows and say with `valid` how many are examples."
                )


class SplitByHand(ShardedGradients):
    """Each process has tensors of its own: pipeline stages, or tensor parallelism with collectives in the model.

    A parameter must be in one process only.  Layers of the same name in several processes count as one layer.
    """

    def _layers(self) -> list[int]:
        import torch.distributed as dist

        assert self._shards is not None
        self._group = self._shards
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        sizes = [p.numel() for p in self.parameters]
        dist.all_gather_object(everyone, (self.names, sum(sizes), str(self.parameters[0].dtype)), group=self._group)
        if len({dtype for _, _, dtype in everyone}) > 1:
            raise ConfigError(
                f"the processes have parameters of types {[d for _, _, d in everyone]}, but all must have the same, so "
                "that they come to the same decisions."
            )
        layers = layer_numbers([name for others, _, _ in everyone for name in others])
        self.layer_count = max(layers) + 1
        rank = dist.get_rank(self._group)
        before = sum(len(others) for others, _, _ in everyone[:rank])
        *starts, self.coordinates = accumulate((size for _, size, _ in everyone), initial=0)
        own = accumulate(sizes, initial=starts[rank])
        self.places = tuple(Place.whole(s, tuple(p.shape)) for s, p in zip(own, self.parameters, strict=False))
        return layers[before : before + len(self.names)]

    def _check_same(self, losses: Tensor) -> None:
        """Only how many there are can be compared: stages of a pipeline have no losses of their own."""
        self._check_agreement(rows=len(losses))

    def total(self, squares: Tensor) -> Tensor:
        return added_up(squares, self._group)

    def _everyone(self) -> list[ProcessGroup]:
        return [self._group]

    def _counting(self) -> list[ProcessGroup]:
        return []


def reduced(tensor: Tensor, groups: list[ProcessGroup], how: str) -> Tensor:
    """The tensor's sum or maximum over the processes of all the groups, in place."""
    import torch.distributed as dist

    for group in groups:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)
    return tensor


def added_up(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the group, in the order of its ranks: the same to the last bit in each, which an all-reduce need
    not be.
    """
    import torch.distributed as dist

    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
