"""Where each part of a sharded model is, and a tape that records a pass of one.

Between passes a module under FSDP2 holds shards (``DTensor``).  Just before a layer runs, whole parameters take their
places; they are freed after the layer and gathered again for its backward pass.  The layer's functions see these whole
parameters, so the tape follows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpsyngen.errors import ConfigError
from dpsyngen.privacy.contributions import Contribution, Dense
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.rules import Tape

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor


@dataclass(frozen=True)
class Place:
    """A process's part of one parameter: indices first .. first + length - 1 along one axis, or none."""

    start: int  # coordinate at which the whole parameter starts
    shape: tuple[int, ...]  # of the whole parameter
    dim: int  # the axis along which it is split
    first: int
    length: int

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
        """After a pass that failed: FSDP forgets it, and no parameter is left whole."""
        if not self._kept:
            return  # no layer has been run
        from torch.distributed.fsdp import FSDPModule

        inner: set[int] = set()
        for module in self._module.modules():  # parents first
            if not isinstance(module, FSDPModule) or id(module) in inner:
                continue
            inner |= {id(m) for m in module.modules() if m is not module}
            # In PyTorch 2.6 to 2.12 it is enough to give back what is whole.
            getattr(module, "reset_iter_state", module.reshard)()


class GatheredTape(Tape):
    """A tape of one pass of a module with gathered parameters.

    `places` are the parts of the parameters whose gradients are wanted; None: whole ones.
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
        # Shards are no plain parameters: what FSDP itself does with them is not part of the model and not recorded.
        if type(value) is not nn.Parameter or not self._gathered.look_for(value):
            return False
        self._position.update(self._gathered.known)
        return id(value) in self._position

    def is_constant(self, value: Tensor) -> bool:
        return super().is_constant(value) or id(value) in self._gathered.frozen

    def add(self, parameter: Tensor, contribution: Contribution) -> None:
        position = self._position[id(parameter)]
        if position < len(self._names) and self._places is not None:
            contribution = self._own_part(contribution, self._places[position])
        super().add(parameter, contribution)

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


def sharded_parameters(
    module: nn.Module, names: list[str], parameters: list[Tensor]
) -> tuple[list[DTensor], DeviceMesh]:
    """The parameters as shards, and the mesh that they are sharded over; ConfigError for other ways to split."""
    try:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor
    except ImportError:
        raise ConfigError(
            f"sharded models need PyTorch 2.6 or later, but this is {torch.__version__}: install a later one."
        ) from None

    if not any(isinstance(m, FSDPModule) for m in module.modules()):
        raise ConfigError(
            "the module was not sharded by torch.distributed.fsdp.fully_shard, the one way that the engine knows: it "
            "cannot follow layers that compute with DTensors.  For a model that is whole use PerExampleGradients."
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


def place_of(parameter: DTensor, start: int, name: str) -> Place:
    """Where this process's part of a parameter lies, whose first coordinate is `start`."""
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
