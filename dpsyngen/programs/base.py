"""What a program is, an endless and reproducible sequence of public images, and the checks of its parameters."""

from __future__ import annotations

import functools
import itertools
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from dpsyngen.errors import require
from dpsyngen.programs.drawing import Images, Words

MAX_RESOLUTION = 2048  # keeps the 32-bit block counter of one image (`counter_rng`) from wrapping
MAX_INDEX = 2**63 - 1
GIVEN = ("resolution", "channels", "seed")  # what every program has; the rest are parameters of its family
_LEAST_CHUNK = 32  # images


def as_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return `value` as an int in [low, high]; ConfigError, naming the option, if it is anything else."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    require(whole and low <= value <= high, name, value, f"an integer from {low} to {high}")
    return int(value)


def as_number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """Return `value` as a float in [low, high], or in (low, high] if `above`."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    allowed = f"a number above {low:g} and at most {high:g}" if above else f"a number from {low:g} to {high:g}"
    require(real and low <= value <= high and not (above and value == low), name, value, allowed)
    return float(value)


def as_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return `value`, which has to be one of `allowed`."""
    require(isinstance(value, str) and value in allowed, name, value, allowed)
    return str(value)


def as_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool; 0, 1 and "yes" are refused."""
    require(isinstance(value, bool | np.bool_), name, value, "true or false")
    return bool(value)


def as_range(name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """Return `value` as a pair (a, b) with low ≤ a ≤ b ≤ high; one number stands for both."""
    pair = (value, value) if isinstance(value, Real) else value
    two = isinstance(pair, list | tuple) and len(pair) == 2
    require(two, name, value, f"two numbers [a, b] with {low:g} ≤ a ≤ b ≤ {high:g}, or one")
    a, b = (as_number(name, v, low, high) for v in pair)
    require(a <= b, name, value, "[a, b] with a ≤ b")
    return a, b


def as_counts(name: str, value: Any, low: int, high: int) -> tuple[int, int]:
    """Return `value` as a pair of whole numbers, low ≤ a ≤ b ≤ high; one number stands for both."""
    a, b = as_range(name, value, low, high)
    require(a == int(a) and b == int(b), name, value, f"whole numbers from {low} to {high}")
    return int(a), int(b)


def param(default: Any, check: Callable[..., Any], *bounds: Any, **options: Any) -> Any:
    """Declare a parameter of a family: a dataclass field with a default and ``check(name, value, *bounds, **options)``.

    `Program` stores what the check returns, so that a configuration is plain and JSON-able whatever types were given.
    """
    return field(default=default, metadata={"check": lambda _, name, value: check(name, value, *bounds, **options)})


def colour_param(laws: Sequence[str], coloured: Sequence[str]) -> Any:
    """Declare the parameter `colour`, one of `laws`, of which those in `coloured` need 3 channels.

    None, the default, stands for "grey" with 1 channel and for ``coloured[0]`` with 3.
    """

    def check(program: Program, name: str, value: Any) -> str:
        if value is None:
            return "grey" if program.channels == 1 else coloured[0]
        is_possible = as_choice(name, value, laws) not in coloured or program.channels > 1
        others = ", ".join(law for law in laws if law not in coloured)
        require(is_possible, name, value, f"{others} with channels=1, as it needs 3 channels: or give channels=3")
        return str(value)

    return field(default=None, metadata={"check": check})


@dataclass(frozen=True, kw_only=True)
class Program(ABC):
    """A family of images with its parameters fixed: an infinite data set that needs no disk.

    Image i is a pure function of (family, parameters, `seed`, i): the same on every machine, in any order,
    and for any batch size or number of threads or processes.  Programs compare, hash and pickle by value.

    `seed` is **public**.  It goes into configurations and releases, and must be unrelated to the random state
    of the privacy mechanism: anyone may draw these images again, since they contain nobody's data.

    Attributes:
        name: registered name of the family (set by `register`).
        prior_tier: how much the family assumes about the private images.  0: nothing (agnostic); 1: a generic
            shape, such as strokes or blobs; 2: the domain (a simulator, such as one of X-rays).
        resolution: height and width of an image in pixels, 1 to 2048.
        channels: 1 (grey) or 3 (red, green, blue).
        seed: 0 to 2⁶⁴ − 1.

    Raises:
        ConfigError: a parameter, of the family's own too, is not allowed.
    """

    name: ClassVar[str]
    prior_tier: ClassVar[int]

    resolution: int = param(MISSING, as_integer, 1, MAX_RESOLUTION)
    channels: int = param(MISSING, as_integer, 1, 3)
    seed: int = param(0, as_integer, 0, 2**64 - 1)

    def __post_init__(self) -> None:
        for each in fields(self):
            if "check" in each.metadata:
                value = each.metadata["check"](self, each.name, getattr(self, each.name))
                object.__setattr__(self, each.name, value)
        require(self.channels != 2, "channels", self.channels, "1 (grey) or 3 (RGB)")

    @abstractmethod
    def _draw(self, indices: Words, out: Images) -> None:
        """Write image ``indices[n]`` to ``out[n]``, every pixel.  Several threads may call this."""

    def __call__(self, index: SupportsIndex) -> Images:
        """Draw image `index`, uint8 [C, H, W], values 0 to 255.  Errors as of `batch`."""
        return self.batch([operator.index(index)])[0]

    __getitem__ = __call__  # there is no ``len``, so iteration never ends; for slices use `batch`

    def batch(
        self, indices: ArrayLike | Iterable[int], *, threads: int = 1, dtype: DTypeLike = np.uint8
    ) -> NDArray[Any]:
        """Draw images `indices` in that order, [N, C, H, W]; repeats and N = 0 are allowed.

        Args:
            indices: integers from 0 to 2⁶³ − 1.
            threads: changes the speed, never the images.
            dtype: uint8 for values v from 0 to 255, or float32 for v/127.5 − 1, from −1 to 1.

        Raises:
            IndexError, TypeError: an index is not in that range, or no integer.
            ConfigError: another argument is not allowed.
        """
        require(np.dtype(dtype) in (np.uint8, np.float32), "dtype", dtype, "uint8 (0 to 255) or float32 (−1 to 1)")
        threads = as_integer("threads", threads, 1, 4096)
        chosen = as_indices(indices)
        out = np.empty((len(chosen), self.channels, self.resolution, self.resolution), dtype=np.uint8)
        if threads > 1 and len(chosen) > 1:
            # Threads help, as compiled loops release the interpreter lock.  A few chunks a thread, as images differ in
            # cost; but not so many that handing them out costs more.
            chunks = max(threads, min(4 * threads, len(chosen) // _LEAST_CHUNK))
            bounds = np.linspace(0, len(chosen), min(len(chosen), chunks) + 1).astype(int)
            pool = _pool(threads)
            jobs = [pool.submit(self._draw, chosen[a:b], out[a:b]) for a, b in itertools.pairwise(bounds)]
            for job in jobs:
                job.result()
        elif len(chosen):
            self._draw(chosen, out)
        return out if np.dtype(dtype) == np.uint8 else out.astype(np.float32) / np.float32(127.5) - np.float32(1.0)

    def config(self) -> dict[str, Any]:
        """Return the name and all parameters, JSON-able: ``make_program(**program.config()) == program``."""
        return {"name": self.name, **{field.name: plain(getattr(self, field.name)) for field in fields(self)}}


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that stay: starting them anew takes as long as drawing some twenty images."""
    return ThreadPoolExecutor(threads, f"dpsyngen-programs-{threads}")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads


def plain(value: Any) -> Any:
    """Return a parameter as JSON has it; a program inside another loses what the outer one gives it."""
    if isinstance(value, Program):
        return {k: v for k, v in value.config().items() if k not in GIVEN}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def as_indices(indices: ArrayLike | Iterable[int]) -> Words:
    """Return indices as uint64 [N]; the errors are those of `Program.batch`."""
    if not hasattr(indices, "__array__") and isinstance(indices, set | frozenset | Iterator):
        indices = list(indices)  # numpy would take these for one object
    array = np.asarray(indices)
    require(array.ndim == 1, "the shape of indices", array.shape, "that of a one-dimensional list of integers")
    if array.size == 0:
        return np.empty(0, dtype=np.uint64)
    if array.dtype.kind not in "iu":
        if array.dtype.kind == "O" and all(isinstance(i, int) for i in array):  # Python ints beyond 64 bits
            raise IndexError("An image index is out of range: give integers from 0 to 2⁶³ − 1.")
        raise TypeError(f"Image indices have type {array.dtype}: give integers.")
    if int(array.min()) < 0 or int(array.max()) > MAX_INDEX:
        raise IndexError(f"Image indices run from {array.min()} to {array.max()}: give integers from 0 to 2⁶³ − 1.")
    return array.astype(np.uint64)
