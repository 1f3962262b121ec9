"""Clipping together in a module sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Between passes such a module holds its shards (``DTensor``).  Just before a layer runs, other tensors take their places:
whole parameters, which are given back once the layer is done and gathered again for its backward pass.  Those are
the ones that the layer's functions see, so those are the ones to follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpsyngen.errors import ConfigError, RunError
from dpsyngen.privacy.contributions import Contribution, Dense
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.per_example import layer_numbers
from dpsyngen.privacy.recording import Tape
from dpsyngen.privacy.sharding.engine import Place, ShardedGradients, added_up, reduced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DeviceMesh, DTensor

_BUCKET = 1 << 22  # numbers that are reduced in one go: enough to be quick, few beside the gradients of the examples
_SAME = 1e-3  # relative difference that rounding may make between losses of the same examples


class OwnExamples(ShardedGradients):
    """FSDP2; each process has its own examples.  Layers are whole while they run, so norms are complete."""

    _own_part_only: tuple[Place, ...] | None = None

    def _layers(self) -> list[int]:
        self._distributed, self._mesh = _sharded_parameters(self.module, self.names, self.parameters)
        self._gathered = Gathered(self.module, self.names)
        *starts, self.coordinates = accumulate((p.numel() for p in self._distributed), initial=0)
        parts = zip(self._distributed, starts, self.names, strict=True)
        self.places = tuple(_place(p, start, name) for p, start, name in parts)
        layers = layer_numbers(self.names)
        self.layer_count = max(layers) + 1
        return layers

    def contributions(self, loss: Callable[[], Tensor], examples: int, copies: int = 1) -> list[Contribution]:
        try:
            return super().contributions(loss, examples, copies)
        except Exception:
            self._gathered.abandon()
            raise

    def _tape(self, examples: int, copies: int) -> Tape:
        return GatheredTape(self._gathered, self.constants, self.kernels, examples, copies, self._own_part_only)

    def _check_same(self, losses: Tensor) -> None:
        """Examples differ, so there is nothing to compare."""

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
            out.append(self._as_shard(i, rows.movedim(0, place.dim).contiguous()))
        return out

    def _as_shard(self, i: int, own: Tensor) -> Tensor:
        shard = self._distributed[i]
        return Place.like(shard, own.to(shard.to_local().device))


class SameExamples(OwnExamples):
    """FSDP2; the processes of a group of shards see the same examples; each keeps its part of their gradients."""

    def _layers(self) -> list[int]:
        import torch.distributed as dist

        layers = super()._layers()
        assert self._shards is not None
        self._group = self._everyone()[-1]
        given, own = dist.get_process_group_ranks(self._shards), dist.get_process_group_ranks(self._group)
        if given != own:
            raise ConfigError(
                f"`shards` is the group of processes {given}, but the parameters are sharded over {own}: give it the "
                "last dimension of the mesh that fully_shard got (mesh.get_group() if it has one)."
            )
        self._own_part_only = self.places
        return layers

    def _check_same(self, losses: Tensor) -> None:
        """Parts of different examples, clipped as one, would void the sensitivity."""
        finite = torch.isfinite(losses)
        weights = torch.linspace(1.0, 2.0, len(losses), dtype=torch.float64)  # so that order counts
        values = torch.where(finite, losses, 0.0).double().cpu() * weights
        mine = torch.stack([values.sum(), values.abs().sum(), finite.sum().cpu().double()]).to(self.device)
        least, most = reduced(torch.stack([-mine, mine]), [self._group], "max").cpu() * torch.tensor([[-1.0], [1.0]])
        if most[0] - least[0] > _SAME * most[1] or most[2] > least[2]:
            raise RunError(
                "the processes that share one set of shards computed different losses, so they do not see the same "
                "examples (or draw different random numbers): an example's gradient cannot be put together from their "
                "parts.  Give all of them the same rows and seeds, or leave `shards` out if each has its own examples."
            )

    def total(self, squares: Tensor) -> Tensor:
        return added_up(squares, self._group)

    def collect(self, sums: Iterator[Tensor]) -> list[Tensor]:
        """What each process has is its part already; copies of it are added up over replicas with other examples."""
        return [self._as_shard(i, reduced(value, self._replicas, "sum")) for i, value in enumerate(sums)]

    def _counting(self) -> list[ProcessGroup]:
        return self._replicas


class Gathered:
    """Which whole parameter stands for which of the module's shards.

    Args:
        module: with the sharded parameters.
        names: of the trainable ones, in order.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self._module, self._positions = module, {name: i for i, name in enumerate(names)}
        self.names = names
        # FSDP makes a whole parameter once and from then on fills and empties it, so what was found stays true.  The
        # tensors are kept with their numbers, which Python could else give to others.
        self.known: dict[int, int] = {}
        self.frozen: set[int] = set()
        self._kept: list[Tensor] = []

    def look_for(self, value: Tensor) -> bool:
        """Whether `value` stands in the module now, as a whole parameter.  It is known from then on."""
        if id(value) in self.known or id(value) in self.frozen:
            return True
        found = False
        for name, parameter in self._module.named_parameters():
            if type(parameter) is not nn.Parameter or id(parameter) in self.known or id(parameter) in self.frozen:
                continue
            self._kept.append(parameter)
            if name in self._positions:
                self.known[id(parameter)] = self._positions[name]
            else:
                self.frozen.add(id(parameter))
            found = found or parameter is value
        return found

    @contextmanager
    def whole(self, positions: Iterable[int]) -> Iterator[None]:
        """Within it, these parameters have their values.  All processes must come here with the same ones."""
        from torch.distributed.fsdp import FSDPModule

        owners: dict[int, FSDPModule] = {}
        for position in sorted(set(positions)):
            path, _, own = self.names[position].rpartition(".")
            if not hasattr(getattr(self._module.get_submodule(path), own), "to_local"):
                continue  # it has been left whole, as FSDP does where it is told not to reshard
            while not isinstance(self._module.get_submodule(path), FSDPModule):
                path = path.rpartition(".")[0]
            owner: Any = self._module.get_submodule(path)
            owners[id(owner)] = owner
        with ExitStack() as stack:
            for owner in owners.values():
                owner.unshard()
                stack.callback(owner.reshard)
            yield

    def abandon(self) -> None:
        """After a pass that failed on its way: FSDP forgets it, and no parameter is left whole."""
        if not self._kept:
            return  # none has ever been run
        from torch.distributed.fsdp import FSDPModule

        inner: set[int] = set()
        for module in self._module.modules():  # parents first
            if not isinstance(module, FSDPModule) or id(module) in inner:
                continue
            inner |= {id(m) for m in module.modules() if m is not module}
            # In PyTorch 2.6 to 2.12 there is no more to be done than to give back what is whole.
            getattr(module, "reset_iter_state", module.reshard)()


class GatheredTape(Tape):
    """A tape of one pass of a module with gathered parameters.

    Args:
        gathered: which tensor is which parameter.
        constants, kernels, examples, copies: as of :class:`dpsyngen.privacy.recording.Tape`.
        places: the parts of the parameters whose gradients are wanted; None: whole ones.
    """

    def __init__(
        self,
        gathered: Gathered,
        constants: set[int],
        kernels: KernelChoices,
        examples: int,
        copies: int,
        places: tuple[Place, ...] | None,
    ) -> None:
        super().__init__({}, constants, kernels, examples, copies)
        self._names, self._gathered, self._places = gathered.names, gathered, places
        self._position = dict(gathered.known)

    def tracks(self, value: object) -> bool:
        if id(value) in self._position:
            return True
        # Shards are no plain parameters: what FSDP itself does with them on the way is none of our business.
        if type(value) is not nn.Parameter or not self._gathered.look_for(value):
            return False
        self._position.update(self._gathered.known)
        return id(value) in self._position

    def any_tracked(self, values: Iterable[Any]) -> bool:
        for value in values:
            if self.tracks(value):
                return True
            if isinstance(value, (list, tuple)) and self.any_tracked(value):
                return True
        return False

    def is_constant(self, value: Tensor) -> bool:
        return super().is_constant(value) or id(value) in self._gathered.frozen

    def add(self, parameter: Tensor, contribution: Contribution) -> None:
        position = self._position[id(parameter)]
        if position < len(self._names) and self._places is not None:
            contribution = self._own_part(contribution, self._places[position])
        without_weight = getattr(contribution, "without_weight", None)
        super().add(parameter, contribution if without_weight is None else without_weight())

    def send_back(self) -> None:
        """What parameters were derived from is gathered once more."""
        count = len(self._names)
        origins = {self._position[id(o)] for _, _, sources, _ in self._derived for o in sources}
        with self._gathered.whole(p for p in origins if p < count):
            super().send_back()

    def _own_part(self, contribution: Contribution, place: Place) -> Contribution:
        if place.length == place.shape[place.dim]:
            return contribution
        if place.length:
            return contribution.part(place.dim, place.first, place.length)
        shape = [0 if d == place.dim else n for d, n in enumerate(place.shape)]
        return Dense(torch.zeros(self.examples, *shape, dtype=contribution.dtype, device=contribution.device))


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
