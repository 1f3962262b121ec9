"""The engines of a process that holds a part of the parameters and clips together with the others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpsyngen.errors import ConfigError, RunError
from dpsyngen.privacy.clipping import ClippedGradient, Draw, GridGradient
from dpsyngen.privacy.contributions import Contribution
from dpsyngen.privacy.per_example import Loss, PerExampleGradients, RowsLoss, layer_numbers
from dpsyngen.privacy.rules import Tape
from dpsyngen.privacy.sharding.gathered import Gathered, GatheredTape, Place, place_of, sharded_parameters
from dpsyngen.workers import Workers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BUCKET = 1 << 22  # numbers that are reduced in one go: enough to be quick, few beside the gradients of the examples
_SAME = 1e-3  # relative difference that rounding may make between losses of the same examples


@dataclass(frozen=True)
class ShardedGradient(ClippedGradient):
    """This process's part of a sum of clipped gradients, with the L2 sensitivity of the *whole* sum.

    ``examples`` and ``not_finite`` count those of all processes; ``norms`` has those that went through this one.
    """

    places: tuple[Place, ...]  # where each of ``sums`` lies in the vector of all parameters
    coordinates: int  # length of that vector

    def noisy(self, scale: float, divisor: float, draw: Draw) -> list[Tensor]:
        """Each process adds its own coordinates of the one noise vector, so that every coordinate has noise once.

        Two processes that took the same coordinates would add the same noise to different parameters, whose difference
        would be free of it: that is why a sum carries its places with it.
        """
        drawn = draw(self.coordinates, (place.span for place in self.places))
        return [
            place.like(total, (own + scale * place.cut(noise, own)) / divisor)
            for total, place, noise in zip(self.sums, self.places, drawn, strict=True)
            for own in (place.own(total),)
        ]


class OwnExamples(PerExampleGradients):
    """The engine of a module sharded by FSDP2 whose processes each have their own examples.

    Layers are whole while they run, so norms are complete.  It runs in one thread, since the collectives of the
    processes must come in one order.  Every method but :meth:`zero` and :meth:`per_example` must be called in all
    processes alike, and gives each its own part of the sum, with the sensitivity of the whole.

    Raises:
        ConfigError: the parameters are not sharded, or in a way that is not supported.
    """

    _own_part_only = False

    def _layers(self) -> list[int]:
        self.workers = Workers(1)
        self._distributed, self._mesh = sharded_parameters(self.module, self.names, self.parameters)
        self.device = self._distributed[0].to_local().device
        self._gathered = Gathered(self.module, self.names)
        *starts, self.coordinates = accumulate((p.numel() for p in self._distributed), initial=0)
        parts = zip(self._distributed, starts, self.names, strict=True)
        self.places = tuple(place_of(p, start, name) for p, start, name in parts)
        layers = layer_numbers(self.names)
        self.layer_count = max(layers) + 1
        return layers

    def zero(self) -> ShardedGradient:
        sums = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        norms = torch.zeros(0, dtype=self.parameters[0].dtype, device=self.device)
        return self._placed(ClippedGradient(sums, self.clipping_norm, 0, norms, 0))

    def __call__(
        self, loss: RowsLoss, examples: int, copies: int = 1, *, valid: int | Tensor | None = None
    ) -> ShardedGradient:
        if examples == 0:
            raise ConfigError(
                "examples is 0, but each process must run the same passes of a model that is split: give it one "
                "example of any kind, with valid=0."
            )
        own = super().__call__(loss, examples, copies, valid=valid)
        # Counts of all processes in place of this one's.
        counts = torch.tensor([own.examples, own.not_finite], device=self.device)
        total, not_finite = _reduced(counts, self._other_examples(), "sum").tolist()
        return self._placed(replace(own, examples=total, not_finite=not_finite))

    def sum(
        self, loss: Loss, examples: int, *, copies: int = 1, physical_batch: int = 32, valid: int | Tensor | None = None
    ) -> ShardedGradient:
        """As of the base class.  All processes must give the same number of examples: those with fewer fill up."""
        given = {"examples": examples, "copies": copies, "physical_batch": physical_batch}
        mine = torch.tensor([s * v for v in given.values() for s in (1, -1)], device=self.device)
        bounds = _reduced(mine, self._everyone(), "max").view(-1, 2).tolist()
        for name, (most, least) in zip(given, bounds, strict=True):
            if most != -least:  # in all processes, or some would wait for the others for ever
                raise ConfigError(
                    f"{name} is {given[name]} here and from {-least} to {most} in the processes that share the model, "
                    "but must be the same in all, since they gather parameters together.  Fill the smaller batches up "
                    "with any rows and say with `valid` how many are examples."
                )
        return self._placed(super().sum(loss, examples, copies=copies, physical_batch=physical_batch, valid=valid))

    def sum_on_grid(
        self, loss: Loss, examples: int, *, grid: float, copies: int = 1, physical_batch: int = 32
    ) -> GridGradient:
        raise ConfigError("a sharded model has no sum on a grid: use Gaussian noise, or keep the model whole.")

    def contributions(self, loss: RowsLoss, examples: int, copies: int = 1) -> list[Contribution]:
        try:
            return super().contributions(loss, examples, copies)
        except Exception:
            self._gathered.abandon()
            raise

    def collect(self, sums: Iterator[Tensor]) -> list[Tensor]:
        """Sums over all processes, a few parameters at a time: the sums of the whole model never exist at once."""
        out: list[Tensor] = []
        bucket: list[Tensor] = []
        for value in sums:
            if bucket and (bucket[0].dtype != value.dtype or sum(b.numel() for b in bucket) >= _BUCKET):
                out += self._scatter(bucket, len(out))
                bucket = []
            bucket.append(value)
        return out + self._scatter(bucket, len(out))

    def _scatter(self, bucket: list[Tensor], first: int) -> list[Tensor]:
        """Reduce whole parameters, number `first` and on, to this process's shards of their sums over all processes."""
        import torch.distributed as dist

        *replicas, group = self._everyone()
        count = dist.get_world_size(group)
        chunks = []
        for value, place in zip(bucket, self.places[first : first + len(bucket)], strict=True):
            rows = value.movedim(place.dim, 0)
            each = -(-len(rows) // count)  # as FSDP cuts: equal pieces, the last ones short or empty
            padded = rows.new_zeros(count * each, *rows.shape[1:])
            padded[: len(rows)] = rows
            chunks.append(padded.view(count, -1))
        widths = [c.shape[1] for c in chunks]
        own = chunks[0].new_empty(sum(widths))
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # the newer name of the two
        scatter(own, torch.cat(chunks, 1).flatten(), group=group)
        _reduced(own, replicas, "sum")
        out = []
        for i, part in enumerate(own.split(widths), first):
            place = self.places[i]
            rest = [n for d, n in enumerate(place.shape) if d != place.dim]
            rows = part[: place.length * math.prod(rest)].view(place.length, *rest)
            out.append(self._as_shard(i, rows.movedim(0, place.dim).contiguous()))
        return out

    def _as_shard(self, i: int, own: Tensor) -> Tensor:
        return Place.like(self._distributed[i], own.to(self.device))

    def _placed(self, own: ClippedGradient) -> ShardedGradient:
        return ShardedGradient(**vars(own) | {"places": self.places, "coordinates": self.coordinates})

    def _tape(self, examples: int, copies: int) -> Tape:
        parts = self.places if self._own_part_only else None
        return GatheredTape(self._gathered, self.constants, self.kernels, examples, copies, parts)

    def _everyone(self) -> list[ProcessGroup]:
        """Groups that, one after the other, reach all processes that take part in a step; the shards' comes last."""
        return [self._mesh.get_group(i) for i in range(self._mesh.ndim)]

    def _other_examples(self) -> list[ProcessGroup]:
        """Groups that, one after the other, reach all processes with other examples."""
        return self._everyone()


class SameExamples(OwnExamples):
    """The engine of a module sharded by FSDP2 whose groups of shards see the same examples.

    Each process keeps its part of their gradients; squared norms are added up over the parts.  With a two-dimensional
    mesh (replicas by shards) each row of shards has its own examples.
    """

    _own_part_only = True

    def _losses(self, tape: Tape, loss: RowsLoss) -> Tensor:
        rows = super()._losses(tape, loss)
        self._check_same(rows.detach())
        return rows

    def _check_same(self, losses: Tensor) -> None:
        """Parts of different examples, clipped as one, would void the sensitivity."""
        finite = torch.isfinite(losses)
        weights = torch.linspace(1.0, 2.0, len(losses), dtype=torch.float64)  # so that order counts
        values = torch.where(finite, losses, 0.0).double().cpu() * weights
        mine = torch.stack([values.sum(), values.abs().sum(), finite.sum().cpu().double()]).to(self.device)
        bounds = _reduced(torch.stack([-mine, mine]), self._everyone()[-1:], "max").cpu()
        least, most = -bounds[0], bounds[1]
        if most[0] - least[0] > _SAME * most[1] or most[2] > least[2]:
            raise RunError(
                "the processes that share one set of shards computed different losses, so they do not see the same "
                "examples (or draw different random numbers): an example's gradient cannot be put together from their "
                "parts.  Give all of them the same rows and seeds, or use OwnExamples if each has its own."
            )

    def total(self, squares: Tensor) -> Tensor:
        """The sum over the shards in the order of their ranks: the same to the last bit in each, which an all-reduce
        need not be.
        """
        import torch.distributed as dist

        group = self._everyone()[-1]
        parts = [torch.empty_like(squares) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, squares.contiguous(), group=group)
        return reduce(torch.add, parts)

    def collect(self, sums: Iterator[Tensor]) -> list[Tensor]:
        """What each process has is its part already; copies of it are added up over replicas with other examples."""
        return [self._as_shard(i, _reduced(value, self._other_examples(), "sum")) for i, value in enumerate(sums)]

    def _other_examples(self) -> list[ProcessGroup]:
        return self._everyone()[:-1]


def _reduced(tensor: Tensor, groups: list[ProcessGroup], how: str) -> Tensor:
    """The tensor's sum or maximum over the processes of all the groups, in place."""
    import torch.distributed as dist

    for group in groups:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)
    return tensor
