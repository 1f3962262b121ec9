"""The engine for models whose parameters are split over processes by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Each process has its own examples.  Clipped sums are reduced to the shards, so the L2 sensitivity of the whole sum is C
if an example is in one process only.  FSDP's own reduction of gradients has no part in it: it would average gradients
that are not clipped, and gets none to see.

Between passes a module under FSDP2 holds shards (``DTensor``).  Just before a layer runs, whole parameters take their
places; they are freed after the layer and gathered again for its backward pass.  The layer's functions see these whole
parameters, so the tape follows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from dpsyngen.errors import ConfigError, listed
from dpsyngen.privacy.clipping import ClippedGradient, Draw, GridGradient
from dpsyngen.privacy.contributions import Contribution
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.per_example import Loss, PerExampleGradients, RowsLoss, layer_numbers
from dpsyngen.privacy.rules import Tape
from dpsyngen.workers import Workers

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor


@dataclass(frozen=True)
class Place:
    """A process's part of one parameter: indices first .. first + length - 1 along its first axis, or none."""

    start: int  # coordinate at which the whole parameter starts
    shape: tuple[int, ...]  # of the whole parameter
    first: int
    length: int

    @property
    def span(self) -> tuple[int, int]:
        """(start, length) of the part's coordinates."""
        row = math.prod(self.shape[1:])
        return self.start + self.first * row, self.length * row

    @staticmethod
    def like(value: Tensor, own: Tensor) -> Tensor:
        """`own` as the local part of a tensor that is distributed like `value`."""
        from torch.distributed.tensor import DTensor

        assert isinstance(value, DTensor)
        return DTensor.from_local(
            own, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )


class Gathered:
    """Which whole parameter stands for which of the module's shards; `names` are those of the trainable ones."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self._module, self._positions = module, {name: i for i, name in enumerate(names)}
        self.names = names
        # FSDP makes a whole parameter once and from then on fills and empties it, so what was found stays true.  The
        # tensors are kept with their numbers, which Python could else give to others.
        self.known: dict[int, int | None] = {}  # by id() its place among `names`; None for a frozen one
        self._kept: list[Tensor] = []

    def look_for(self, value: Tensor) -> bool:
        """Whether `value` stands in the module now, as a whole parameter.  It is known from then on."""
        if id(value) not in self.known:
            for name, parameter in self._module.named_parameters():
                if type(parameter) is nn.Parameter and id(parameter) not in self.known:
                    self._kept.append(parameter)
                    self.known[id(parameter)] = self._positions.get(name)
        return id(value) in self.known

    def trainable(self) -> dict[int, int]:
        """The places of those that are known and not frozen."""
        return {i: place for i, place in self.known.items() if place is not None}

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
        """After a pass that failed: FSDP forgets it, and no parameter is left whole."""
        if not self._kept:
            return  # no layer has been run
        from torch.distributed.fsdp import FSDPModule

        inner: set[int] = set()
        for module in self._module.modules():  # parents first
            if not isinstance(module, FSDPModule) or id(module) in inner:
                continue
            inner |= {id(m) for m in module.modules() if m is not module}
            # In PyTorch up to 2.12 it is enough to give back what is whole.
            getattr(module, "reset_iter_state", module.reshard)()


class GatheredTape(Tape):
    """A tape of one pass of a module with gathered parameters."""

    def __init__(
        self, gathered: Gathered, constants: set[int], kernels: KernelChoices, examples: int, copies: int
    ) -> None:
        super().__init__({}, constants, kernels, examples, copies)
        self._names, self._gathered = gathered.names, gathered
        self._position = gathered.trainable()

    def tracks(self, value: object) -> TypeGuard[Tensor]:
        if id(value) in self._position:
            return True
        # Shards are no plain parameters: what FSDP itself does with them is not part of the model and not recorded.
        if type(value) is not nn.Parameter or not self._gathered.look_for(value):
            return False
        self._position.update(self._gathered.trainable())
        return id(value) in self._position

    def is_constant(self, value: Tensor) -> bool:
        return super().is_constant(value) or id(value) in self._gathered.known

    def send_back(self) -> None:
        """What parameters were derived from is gathered once more."""
        count = len(self._names)
        origins = {self._position[id(o)] for _, _, sources, _ in self._derived for o in sources}
        with self._gathered.whole(p for p in origins if p < count):
            super().send_back()


def sharded_parameters(
    module: nn.Module, names: list[str], parameters: list[Tensor]
) -> tuple[list[DTensor], DeviceMesh]:
    """The parameters as shards, and the mesh that they are sharded over; ConfigError for other ways to split."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not any(isinstance(m, FSDPModule) for m in module.modules()):
        raise ConfigError(
            "the module was not sharded by torch.distributed.fsdp.fully_shard, the one way that the engine knows.  For "
            "a model that is whole use PerExampleGradients."
        )
    shards = [p for p in parameters if isinstance(p, DTensor)]
    whole = [n for n, p in zip(names, parameters, strict=True) if not isinstance(p, DTensor)]
    if whole:
        raise ConfigError(
            f"{listed(whole, 5)} are not sharded while other parameters are: apply fully_shard to the whole module, "
            "too, without ignored_params; if a pass without backward has left them whole, call reshard() of the module."
        )
    mesh = shards[0].device_mesh
    if any(p.device_mesh != mesh for p in shards):
        raise ConfigError("the parameters are sharded over different meshes: use one mesh for the whole module.")
    return shards, mesh


def place_of(parameter: DTensor, start: int, name: str) -> Place:
    """Where this process's part of a parameter lies, whose first coordinate is `start`."""
    from torch.distributed.tensor import Shard

    if tuple(parameter.placements) != (Shard(0),):
        raise ConfigError(
            f"parameter {name!r} is placed as {tuple(parameter.placements)}, but must be sharded along its first axis "
            "over a mesh of one dimension; other axes, replicas and tensor parallelism are not supported."
        )
    mesh, size = parameter.device_mesh, parameter.shape[0]
    each = -(-size // mesh.size())
    first = min(each * mesh.get_local_rank(), size)
    length = min(each, size - first)
    if len(parameter.to_local()) != length:
        raise ConfigError(f"parameter {name!r} is cut into unequal pieces: leave the cutting to fully_shard.")
    return Place(start, tuple(parameter.shape), first, length)


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
        sums: list[Any] = self.sums  # DTensors, as the parameters are
        return [
            place.like(total, (own + scale * torch.from_numpy(noise).view(own.shape).to(own)) / divisor)
            for total, place, noise in zip(sums, self.places, drawn, strict=True)
            for own in (total.to_local(),)
        ]


class OwnExamples(PerExampleGradients):
    """The engine of a module sharded by FSDP2 whose processes each have their own examples.

    Layers are whole while they run, so norms are complete.  It runs in one thread, since the collectives of the
    processes must come in one order.  Every method but :meth:`zero` and :meth:`per_example` must be called in all
    processes alike, and gives each its own part of the sum, with the sensitivity of the whole.

    Raises:
        ConfigError: the parameters are not sharded, or in a way that is not supported.
    """

    def _layers(self) -> list[int]:
        self.workers = Workers(1)
        self._distributed, self._mesh = sharded_parameters(self.module, self.names, self.parameters)
        self.device = self._distributed[0].to_local().device
        self._gathered = Gathered(self.module, self.names)
        *starts, self.coordinates = accumulate((p.numel() for p in self._distributed), initial=0)
        parts = zip(self._distributed, starts, self.names, strict=True)
        self.places = tuple(place_of(p, start, name) for p, start, name in parts)
        return layer_numbers(self.names)

    def zero(self) -> ShardedGradient:
        return self._placed(super().zero())

    def __call__(
        self, loss: RowsLoss, examples: int, copies: int = 1, *, valid: int | Tensor | None = None
    ) -> ShardedGradient:
        if examples == 0:
            raise ConfigError("examples is 0, but all processes must run the same passes: give any one, with valid=0.")
        own = super().__call__(loss, examples, copies, valid=valid)
        # Counts of all processes in place of this one's.
        counts = torch.tensor([own.examples, own.not_finite], device=self.device)
        total, not_finite = self._reduced(counts, "sum").tolist()
        return self._placed(replace(own, examples=total, not_finite=not_finite))

    def sum(
        self, loss: Loss, examples: int, *, copies: int = 1, physical_batch: int = 32, valid: int | Tensor | None = None
    ) -> ShardedGradient:
        """As of the base class.  All processes must give the same number of examples: those with fewer fill up."""
        given = {"examples": examples, "copies": copies, "physical_batch": physical_batch}
        mine = torch.tensor([s * v for v in given.values() for s in (1, -1)], device=self.device)
        bounds = self._reduced(mine, "max").view(-1, 2).tolist()
        for name, (most, least) in zip(given, bounds, strict=True):
            if most != -least:  # in all processes, or some would wait for the others for ever
                raise ConfigError(
                    f"{name} is {given[name]} here and from {-least} to {most} in all processes, but must be the same: "
                    "fill smaller batches up with any rows, and say with `valid` how many are examples."
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
        """Sums over all processes, one parameter at a time: the sums of the whole model never exist at once."""
        return [self._scattered(*each) for each in zip(sums, self._distributed, self.places, strict=True)]

    def _scattered(self, value: Tensor, parameter: DTensor, place: Place) -> Tensor:
        """Reduce a whole parameter to this process's shard of its sum over all processes."""
        import torch.distributed as dist

        count = self._mesh.size()
        each = -(-len(value) // count)  # as FSDP cuts: equal pieces, the last ones short or empty
        padded = value.new_zeros(count * each, *value.shape[1:])
        padded[: len(value)] = value
        own = value.new_empty(each, *value.shape[1:])
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # the newer name of the two
        scatter(own, padded, group=self._mesh.get_group())
        return Place.like(parameter, own[: place.length].to(self.device))

    def _placed(self, own: ClippedGradient) -> ShardedGradient:
        return ShardedGradient(**vars(own) | {"places": self.places, "coordinates": self.coordinates})

    def _tape(self, examples: int, copies: int) -> Tape:
        return GatheredTape(self._gathered, self.constants, self.kernels, examples, copies)

    def _reduced(self, tensor: Tensor, how: str) -> Tensor:
        """The tensor's sum or maximum over the processes, in place."""
        import torch.distributed as dist

        operation = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
        dist.all_reduce(tensor, operation, group=self._mesh.get_group())
        return tensor
