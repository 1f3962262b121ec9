"""Several programs in one: each image comes from one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import Program
from dpsyngen.programs.checks import as_number
from dpsyngen.programs.drawing.compiled import compiled
from dpsyngen.programs.drawing.counter_rng import pick, words32
from dpsyngen.programs.nested import inner_program, tier_of
from dpsyngen.programs.registry import register

MAX_PROGRAMS = 64

_STREAM = np.uint64(0x6D697874)  # "mixt"


@register("mixture")
@dataclass(frozen=True, kw_only=True)
class Mixture(Program):
    """Image i is image i of one of the inner programs, drawn at random with the given weights.

    Inner programs share resolution and channels and get seeds of their own.  The prior tier is the largest of theirs.
    `params` gives ``program`` (its place in the list), ``name`` and the ``params`` of the inner program.

    Attributes:
        programs: list of 1 to 64 programs, each a name or a mapping with name and parameters.
        weights: list of as many numbers, 0 or more, not all 0; None: evenly.

    Raises:
        ConfigError: a parameter is not allowed.
    """

    programs: Any
    weights: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.programs
        if not isinstance(given, list | tuple) or not 1 <= len(given) <= MAX_PROGRAMS:
            raise ConfigError(f"programs={given!r} is not a list of programs: give 1 to {MAX_PROGRAMS} of them.")
        inner = tuple(inner_program(self, f"programs[{k}]", value, position=k) for k, value in enumerate(given))
        object.__setattr__(self, "programs", inner)
        if self.weights is None:
            return
        if not isinstance(self.weights, list | tuple) or len(self.weights) != len(inner):
            raise ConfigError(f"weights={self.weights!r} does not fit {len(inner)} programs: give one number for each.")
        weights = tuple(as_number(f"weights[{k}]", w, 0.0, 1e9) for k, w in enumerate(self.weights))
        if sum(weights) <= 0.0:
            raise ConfigError("weights are all 0: give a positive one to at least one program.")
        object.__setattr__(self, "weights", weights)

    @property
    def prior_tier(self) -> int:  # type: ignore[override]
        """The largest of the inner programs'."""
        return tier_of(0, *self.programs)

    def _choices(self, indices: NDArray[np.uint64]) -> NDArray[np.int64]:
        weights = np.array(self.weights if self.weights is not None else [1.0] * len(self.programs))
        shares = np.cumsum(weights) / weights.sum()
        shares[np.flatnonzero(weights)[-1] :] = 1.0
        choices = np.empty(len(indices), dtype=np.int64)
        choose(indices, np.uint64(self.seed), shares, choices)
        return choices

    def _draw(self, indices: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
        choices = self._choices(indices)
        for k in np.unique(choices):
            mine = choices == k
            out[mine] = self.programs[k].batch(indices[mine])

    def _params(self, index: int) -> dict[str, Any]:
        k = int(self._choices(np.array([index], dtype=np.uint64))[0])
        return {"program": k, "name": self.programs[k].name, "params": self.programs[k].params(index)}


@compiled
def choose(
    indices: NDArray[np.uint64], seed: np.uint64, shares: NDArray[np.float64], choices: NDArray[np.int64]
) -> None:
    """Which program draws image ``indices[n]``, to ``choices[n]``; `shares` are cumulative and end in 1."""
    for n in range(indices.shape[0]):
        w, _, _, _ = words32(seed, _STREAM, indices[n], np.uint64(0))
        choices[n] = pick(w, shares)
