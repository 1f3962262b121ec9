"""Programs as PyTorch data sets: one with a length, and one without end that is sharded and resumable.

>>> from torch.utils.data import DataLoader
>>> from dpsyngen.programs import make_program
>>> from dpsyngen.programs.torch_datasets import ProgramDataset, ProgramStream
>>> leaves = make_program("dead-leaves", resolution=32, channels=3)
>>> len(ProgramDataset(leaves, length=105_000))
105000
>>> batches = iter(DataLoader(ProgramStream(leaves, batch_size=64), batch_size=None))
>>> next(batches).shape
torch.Size([64, 3, 32, 32])
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from dpsyngen.distributed import numbers
from dpsyngen.errors import ConfigError
from dpsyngen.programs.base import MAX_INDEX, Program, as_choice, as_integer

Values = Literal["float", "uint8"]


def _tensor(program: Program, indices: Sequence[int], values: str, threads: int = 1) -> torch.Tensor:
    dtype = np.uint8 if values == "uint8" else np.float32
    return torch.from_numpy(program.batch(indices, threads=threads, dtype=dtype))


class ProgramDataset(Dataset[Any]):
    """Images `start` to start + length − 1 of a program, each [C, H, W]; works with any sampler and DataLoader.

    `values` are "float" for float32 from −1 to 1, or "uint8" for 0 to 255.
    """

    def __init__(self, program: Program, length: int, *, start: int = 0, values: Values = "float") -> None:
        self.program = program
        self.start = as_integer("start", start, 0, MAX_INDEX)
        self.length = as_integer("length", length, 1, MAX_INDEX - self.start + 1)
        as_choice("values", values, ("float", "uint8"))
        self.values = values

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return several at once, as a DataLoader asks for them; much faster than one by one."""
        places = []
        for index in indices:
            place = int(index) + (self.length if index < 0 else 0)
            if not 0 <= place < self.length:
                raise IndexError(f"Image {index} is out of range: there are {self.length}.")
            places.append(self.start + place)
        return list(_tensor(self.program, places, self.values))


class ProgramStream(IterableDataset[Any]):
    """Endless batches of consecutive images, [batch_size, C, H, W], shared out over ranks and workers.

    Global step t takes the next world_size · batch_size images, and rank r the r-th batch of these, so ranks never
    overlap.  With a ``DataLoader(stream, batch_size=None, num_workers=W)`` worker w draws steps w, w + W, …, and the
    loader delivers them in order: what a rank sees does not depend on W.  Each iteration begins at the first image, or
    where the state that was loaded says.

    To resume, keep ``stream.state_dict(batches)`` where `batches` counts those taken from a DataLoader by this rank
    in its last iteration (without workers it may be left out), and give it to ``load_state_dict`` of a new stream
    before iterating.  The number of workers may change in between; so may the ranks, when all had taken equally many.

    Args:
        program, batch_size: what draws the images, and how many a batch has.
        start: index of the first image.
        rank, world_size: this process among all; default: those of torch.distributed, else as torchrun set
            them, else 0 of 1.
        values: "float" for float32 from −1 to 1, or "uint8" for 0 to 255.
        threads: to draw a batch with.
    """

    def __init__(
        self,
        program: Program,
        batch_size: int,
        *,
        start: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        values: Values = "float",
        threads: int = 1,
    ) -> None:
        self.program = program
        self.batch_size = as_integer("batch_size", batch_size, 1, 2**31)
        self.first = as_integer("start", start, 0, MAX_INDEX)
        if (rank is None) != (world_size is None):
            raise ConfigError("rank and world_size belong together: give both or none.")
        if rank is None or world_size is None:
            joined = torch.distributed.is_available() and torch.distributed.is_initialized()
            group = torch.distributed
            rank, world_size = (group.get_rank(), group.get_world_size()) if joined else numbers()[:2]
        self.world_size = as_integer("world_size", world_size, 1, 2**20)
        self.rank = as_integer("rank", rank, 0, self.world_size - 1)
        as_choice("values", values, ("float", "uint8"))
        self.values = values
        self.threads = as_integer("threads", threads, 1, 4096)
        self._done = 0  # batches since `first`, by this copy of the stream in its last iteration

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self._done = 0
        for done in itertools.count():
            # Workers take the steps in turns, and within a step each rank has its own batch.
            step = worker + done * workers
            begin = self.first + (step * self.world_size + self.rank) * self.batch_size
            batch = _tensor(self.program, range(begin, begin + self.batch_size), self.values, self.threads)
            self._done = done + 1
            yield batch

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Say where the stream stands, after `batches` batches or, without a number, as many as this copy has given."""
        if batches is None and get_worker_info() is not None:
            raise ConfigError("A worker does not know what its rank has taken: ask outside, state_dict(batches).")
        done = self._done if batches is None else as_integer("batches", batches, 0, MAX_INDEX)
        return {"first": self.first + done * self.world_size * self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another stream stood; ConfigError if `state` is not one that `state_dict` made."""
        if not isinstance(state, dict) or state.keys() != {"first"}:
            raise ConfigError(f"{state!r} is not the state of a ProgramStream: give what state_dict() returned.")
        self.first = as_integer("first", state["first"], 0, MAX_INDEX)
        self._done = 0
