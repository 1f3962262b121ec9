"""Recording a pass of a model whose parameters are sharded and gathered layer by layer (FSDP2).

Between passes such a module holds its shards (``DTensor``).  Just before a layer runs, other tensors take their places:
whole parameters, which are given back once the layer is done and gathered again for its backward pass.  Those are
the ones that the layer's functions see, so those are the ones to follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpsyngen.privacy.contributions import Contribution, Nothing
from dpsyngen.privacy.kernels import KernelChoices
from dpsyngen.privacy.recording import Tape
from dpsyngen.privacy.sharding.places import Place


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
        """See :class:`dpsyngen.privacy.recording.Tape`.  What parameters were derived from is gathered once more."""
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
        return Nothing(torch.zeros(self.examples, *shape, dtype=contribution.dtype, device=contribution.device))
