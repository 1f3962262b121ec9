"""Clipping together in a module sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpsyngen.errors import ConfigError, RunError
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.recording import Tape
from dpsyngen.privacy.sharding.gathered import Gathered, GatheredTape
from dpsyngen.privacy.sharding.places import Place
from dpsyngen.privacy.sharding.sharded import Sharding, added_up, layer_numbers, reduced, starts_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DeviceMesh, DTensor

_BUCKET = 1 << 22  # numbers that are reduced in one go: enough to be quick, few beside the gradients of the examples
_SAME = 1e-3  # relative difference that rounding may make between losses of the same examples


class OwnExamples(Sharding):
    """FSDP2; each process has its own examples.  Layers are whole while they run, so norms are complete."""

    def __init__(self, module: nn.Module, names: list[str], parameters: list[Tensor]) -> None:
        shards, self._mesh = _sharded_parameters(module, names, parameters)
        super().__init__(shards[0].to_local().device)
        self._shards, self._gathered = shards, Gathered(module, names)
        self.numbers, self.layers = layer_numbers(names)
        starts = starts_of([p.numel() for p in shards])
        self.coordinates = starts.pop()
        self.places = tuple(_place(p, start, n) for p, start, n in zip(shards, starts, names, strict=True))
        self._own_part_only: tuple[Place, ...] | None = None

    def tape(self, constants: set[int], kernels: KernelChoices, examples: int, copies: int) -> Tape:
        """See :class:`Sharding`."""
        return GatheredTape(self._gathered, constants, kernels, examples, copies, self._own_part_only)

    def abandon(self) -> None:
        """See :class:`Sharding`."""
        self._gathered.abandon()

    def _everyone(self) -> list[ProcessGroup]:
        return [self._mesh.get_group(i) for i in range(self._mesh.ndim)]

    def _counting(self) -> list[ProcessGroup]:
        return self._everyone()

    @property
    def _replicas(self) -> list[ProcessGroup]:
        return self._everyone()[:-1]

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
        import torch.distributed as dist

        group = self._everyone()[-1]
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
        reduced(own, self._replicas, "sum")
        out = []
        for i, part in enumerate(own.split(widths), first):
            place = self.places[i]
            rest = [n for d, n in enumerate(place.shape) if d != place.dim]
            rows = part[: place.length * math.prod(rest)].view(place.length, *rest)
            out.append(self._placed(i, rows.movedim(0, place.dim).contiguous()))
        return out

    def _placed(self, i: int, own: Tensor) -> Tensor:
        shard = self._shards[i]
        return Place.like(shard, own.to(shard.to_local().device))


class SameExamples(OwnExamples):
    """FSDP2; the processes of a group of shards see the same examples; each keeps its part of their gradients."""

    def __init__(self, module: nn.Module, names: list[str], parameters: list[Tensor], shards: ProcessGroup) -> None:
        import torch.distributed as dist

        super().__init__(module, names, parameters)
        self._group = self._everyone()[-1]
        given, own = dist.get_process_group_ranks(shards), dist.get_process_group_ranks(self._group)
        if given != own:
            raise ConfigError(
                f"`shards` is the group of processes {given}, but the parameters are sharded over {own}: give it the "
                "last dimension of the mesh that fully_shard got (mesh.get_group() if it has one)."
            )
        self._own_part_only = self.places

    def check_same(self, losses: Tensor) -> None:
        """See :class:`Sharding`.  Parts of different examples, clipped as one, would void the sensitivity."""
        finite = torch.isfinite(losses)
        weights = torch.linspace(1.0, 2.0, len(losses), dtype=torch.float64)  # so that order counts
        values = torch.where(finite, losses, 0.0).double().cpu() * weights
        mine = torch.stack([values.sum(), values.abs().sum(), finite.sum().cpu().double()]).to(self._device)
        least, most = reduced(torch.stack([-mine, mine]), [self._group], "max").cpu() * torch.tensor([[-1.0], [1.0]])
        if most[0] - least[0] > _SAME * most[1] or most[2] > least[2]:
            raise RunError(
                "the processes that share one set of shards computed different losses, so they do not see the same "
                "examples (or draw different random numbers): an example's gradient cannot be put together from their "
                "parts.  Give all of them the same rows and seeds, or leave `shards` out if each has its own examples."
            )

    def total(self, squares: Tensor) -> Tensor:
        """See :class:`dpsyngen.privacy.clipping.Shards`."""
        return added_up(squares, self._group)

    def collect(self, sums: Iterator[Tensor]) -> list[Tensor]:
        """What each process has is its part already; copies of it are added up over replicas with other examples."""
        return [self._placed(i, reduced(value, self._replicas, "sum")) for i, value in enumerate(sums)]

    def _counting(self) -> list[ProcessGroup]:
        return self._replicas


def _sharded_parameters(
    module: nn.Module, names: list[str], parameters: list[Tensor]
) -> tuple[list[DTensor], DeviceMesh]:
    try:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor
    except ImportError:
        raise ConfigError(
            f"sharded models need PyTorch 2.6 or later, but this is {torch.__version__}: install a later one."
        ) from None

    if not any(isinstance(m, FSDPModule) for m in module.modules()):
        raise ConfigError(
            "the module has DTensor parameters but was not sharded by torch.distributed.fsdp.fully_shard, which is the "
            "one way of making them that the engine knows: it cannot follow layers that compute with DTensors."
        )
    shards = [p for p in parameters if isinstance(p, DTensor)]
    whole = [n for n, p in zip(names, parameters, strict=True) if not isinstance(p, DTensor)]
    if whole:
        raise ConfigError(
            f"{', '.join(whole[:5])}{' …' if len(whole) > 5 else ''} are not sharded while other parameters are: "
            "apply fully_shard to the whole module, too, without ignored_params.  If it was, a pass without backward "
            "has left them whole: call reshard() of the module first."
        )
    mesh = shards[0].device_mesh
    if any(p.device_mesh != mesh for p in shards):
        raise ConfigError("the parameters are sharded over different meshes: use one mesh for the whole module.")
    return shards, mesh


def _place(parameter: DTensor, start: int, name: str) -> Place:
    from torch.distributed.tensor import Replicate, Shard

    *others, last = parameter.placements
    if not (isinstance(last, Shard) and all(isinstance(p, Replicate) for p in others)):
        raise ConfigError(
            f"parameter {name!r} is placed as {tuple(parameter.placements)}, but must be sharded over the last "
            "dimension of the mesh and replicated over the others; FSDP with tensor parallelism is not supported."
        )
    dim = last.dim % parameter.ndim
    mesh, size = parameter.device_mesh, parameter.shape[dim]
    each = -(-size // mesh.size(mesh.ndim - 1))
    first = min(each * mesh.get_local_rank(mesh.ndim - 1), size)
    length = min(each, size - first)
    place = Place(start, tuple(parameter.shape), dim, first, length)
    if parameter.to_local().shape[dim] != length:
        raise ConfigError(f"parameter {name!r} is cut into unequal pieces: leave the cutting to fully_shard.")
    return place
