"""Clipping together: models whose parameters are split over processes.

Three ways to split:

- ``fsdp.OwnExamples``: FSDP2; each process has its own examples.  Their norms are complete where
  they are; clipped sums are reduced to the shards.
- ``fsdp.SameExamples``: FSDP2; all processes see the same examples, and each has the gradients of
  its shard alone.  The squared norms are added up over the shards; each process sums its part.
- :class:`SplitByHand`: like it, of tensors that each process has to itself.

In each the L2 sensitivity of the whole sum is C, if an example is in one process, or in all that share one set of
shards, and in no other.  FSDP's own reduction of gradients has no part in it: it would average gradients that are not
clipped, and gets none to see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpsyngen.errors import ConfigError
from dpsyngen.privacy.clipping import ClippedGradient
from dpsyngen.privacy.contributions import wide_dtype
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.recording import Tape
from dpsyngen.privacy.sharding.places import Place, ShardedGradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sharding(ABC):
    """How the processes that a model is split over clip together.  Fulfils :class:`dpsyngen.privacy.clipping.Shards`.

    Attributes:
        numbers: for each parameter of this process the number of its layer in the whole model.
        layers: how many layers the whole model has.
        places: where this process's part of each parameter lies.
        coordinates: how many numbers the whole model has.
    """

    numbers: list[int]
    layers: int
    places: tuple[Place, ...]
    coordinates: int

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @abstractmethod
    def tape(self, constants: set[int], kernels: KernelChoices, examples: int, copies: int) -> Tape:
        """For one pass."""

    def check_same(self, losses: Tensor) -> None:  # noqa: B027 - nothing to compare where examples differ
        """Raise in all processes if they should see the same examples and do not."""

    def abandon(self) -> None:  # noqa: B027 - nothing to tidy up in a module that is as it ever was
        """After a pass that failed: make the module fit for another."""

    def total(self, squares: Tensor) -> Tensor:
        """See :class:`dpsyngen.privacy.clipping.Shards`."""
        return squares

    @abstractmethod
    def collect(self, sums: Iterator[Tensor]) -> list[Tensor]:
        """See :class:`dpsyngen.privacy.clipping.Shards`."""

    @abstractmethod
    def _everyone(self) -> list[ProcessGroup]:
        """Groups that, one after the other, reach all processes that take part in a step."""

    @abstractmethod
    def _counting(self) -> list[ProcessGroup]:
        """Groups that, one after the other, reach all processes with other examples."""

    def finish(self, clipped: ClippedGradient) -> ShardedGradient:
        """The sum with its places, and counts of all processes in place of this one's."""
        counts = torch.tensor([clipped.examples, clipped.not_finite], device=self._device)
        examples, not_finite = reduced(counts, self._counting(), "sum").tolist()
        return self.placed(replace(clipped, examples=examples, not_finite=not_finite))

    def placed(self, clipped: ClippedGradient) -> ShardedGradient:
        """The sum with its places."""
        return ShardedGradient(**vars(clipped), places=self.places, coordinates=self.coordinates)

    def whole(self, *norms: float) -> list[float]:
        """L2 norms over the whole model, from those of this process's part."""
        squares = torch.tensor(
            norms, dtype=wide_dtype(torch.empty(0, device=self._device)), device=self._device
        ).square()
        out: list[float] = self.total(squares[:, None])[:, 0].sqrt().tolist()
        return out

    def check_agreement(self, **values: int) -> None:
        """Raise ConfigError in all processes unless all were given the same values: else some would wait for ever."""
        mine = torch.tensor([s * v for v in values.values() for s in (1, -1)], device=self._device)
        for name, (most, least) in zip(
            values, reduced(mine, self._everyone(), "max").view(-1, 2).tolist(), strict=True
        ):
            if most != -least:
                raise ConfigError(
                    f"{name} is {values[name]} here and from {-least} to {most} in the processes that share the model, "
                    "but must be the same in all, since they gather parameters together.  Fill the smaller batches up "
                    "with any rows and say with `valid` how many are examples."
                )


class SplitByHand(Sharding):
    """Each process has tensors of its own: pipeline stages, or tensor parallelism with collectives in the model.

    A parameter must be in one process only.  Layers of the same name in several processes count as one layer.
    """

    def __init__(self, names: list[str], parameters: list[Tensor], shards: ProcessGroup) -> None:
        import torch.distributed as dist

        super().__init__(parameters[0].device)
        self._group, self._names, self._parameters = shards, names, parameters
        everyone: list[Any] = [None] * dist.get_world_size(shards)
        mine = (names, sum(p.numel() for p in parameters), str(parameters[0].dtype))
        dist.all_gather_object(everyone, mine, group=shards)
        if len({dtype for _, _, dtype in everyone}) > 1:
            raise ConfigError(
                f"the processes have parameters of types {[d for _, _, d in everyone]}, but all must have the same, so "
                "that they come to the same decisions."
            )
        layers, self.layers = layer_numbers([name for others, _, _ in everyone for name in others])
        rank = dist.get_rank(shards)
        before = sum(len(others) for others, _, _ in everyone[:rank])
        self.numbers = layers[before : before + len(names)]
        starts = starts_of([size for _, size, _ in everyone])
        self.coordinates = starts.pop()
        own = starts_of([p.numel() for p in parameters])
        self.places = tuple(
            Place.whole(starts[rank] + s, tuple(p.shape)) for s, p in zip(own[:-1], parameters, strict=True)
        )

    def tape(self, constants: set[int], kernels: KernelChoices, examples: int, copies: int) -> Tape:
        """See :class:`Sharding`."""
        return Tape(dict(zip(self._names, self._parameters, strict=True)), constants, kernels, examples, copies)

    def check_same(self, losses: Tensor) -> None:
        """Only how many there are can be compared: stages of a pipeline have no losses of their own."""
        self.check_agreement(rows=len(losses))

    def total(self, squares: Tensor) -> Tensor:
        """See :class:`dpsyngen.privacy.clipping.Shards`."""
        return added_up(squares, self._group)

    def collect(self, sums: Iterator[Tensor]) -> list[Tensor]:
        """Each process has its part."""
        return list(sums)

    def _everyone(self) -> list[ProcessGroup]:
        return [self._group]

    def _counting(self) -> list[ProcessGroup]:
        return []


def sharding_of(
    module: nn.Module, names: list[str], parameters: list[Tensor], shards: ProcessGroup | None
) -> Sharding | None:
    """How the parameters are split; None if they are not.

    Raises:
        ConfigError: in a way that is not supported.
    """
    if any(hasattr(p, "to_local") for p in parameters):
        from dpsyngen.privacy.sharding.fsdp import OwnExamples, SameExamples

        if shards is None:
            return OwnExamples(module, names, parameters)
        return SameExamples(module, names, parameters, shards)
    return None if shards is None else SplitByHand(names, parameters, shards)


def layer_numbers(names: list[str]) -> tuple[list[int], int]:
    """For each parameter the number of its module, and how many modules there are."""
    modules = [name.rpartition(".")[0] for name in names]
    numbers = {module: i for i, module in enumerate(dict.fromkeys(modules))}
    return [numbers[module] for module in modules], len(numbers)


def starts_of(sizes: list[int]) -> list[int]:
    """Where each begins if they follow one another, and where the last one ends."""
    out = [0]
    for size in sizes:
        out.append(out[-1] + size)
    return out


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
