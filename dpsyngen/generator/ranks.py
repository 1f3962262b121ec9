"""Sampling by several processes: each draws every n-th batch, and the main one gets them in order.

A batch holds the same images as in one process, so they come out the same to the last bit.  What is in memory at a time
is a batch in each process and one of each in the main one, however many images there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.diffusion.sampling import SamplingSettings
from dpsyngen.distributed import END, Ranks
from dpsyngen.errors import DpsyngenError
from dpsyngen.generator.classes import check_in_memory
from dpsyngen.generator.generator import ReleasedGenerator
from dpsyngen.generator.samples import Samples
from dpsyngen.hardware import device_of

_OPEN, _IMAGES, _ROUND = "open a generator", "images", "a round of images"


def open_everywhere(ranks: Ranks, release: Path, device: str) -> ReleasedGenerator:
    """The generator in `release`, which all processes see and open; to be called by the main one.

    RunError if any process finds no finished release, or a damaged one; ConfigError if one cannot use its device.
    """
    with ranks.lead(_OPEN, release=release.absolute(), device=device):
        return ranks.agree(lambda: _open(ranks, release, device))


def _open(ranks: Ranks, release: Path, device: str) -> ReleasedGenerator:
    return ReleasedGenerator(release, device_of(device, ranks))


def stream(
    ranks: Ranks,
    generator: ReleasedGenerator,
    count: int,
    settings: SamplingSettings,
    *,
    labels: NDArray[np.int64] | None,
    batch_size: int = 256,
) -> Iterator[NDArray[np.uint8]]:
    """As :meth:`ReleasedGenerator.stream`, drawn by all processes with what :func:`open_everywhere` gave last.

    To be called by the main one; images come in order.
    """
    what: dict[str, Any] = {"count": count, "settings": settings, "labels": labels, "batch_size": batch_size}
    ranks.tell(_IMAGES, **what)
    for batch in _own(ranks, generator, **what):
        with ranks.lead(_ROUND):
            parts = ranks.gather_to_main(batch)
        yield from (part for part in parts or () if part is not None)


def sample(ranks: Ranks, generator: ReleasedGenerator, count: int, **settings: Any) -> Samples:
    """As :meth:`ReleasedGenerator.sample`, classes in turn, drawn by all processes; to be called by the main one."""
    if ranks.alone or count < 1:
        return generator.sample(count, **settings)
    check_in_memory(count, generator.channels * generator.resolution**2)
    chosen, labels = generator.settings(**settings), generator.labels(count)
    images = np.concatenate(list(stream(ranks, generator, count, chosen, labels=labels)))
    return Samples(images, labels, generator.class_names, chosen.model_dump(), generator.private)


def _own(
    ranks: Ranks, generator: ReleasedGenerator, *, count: int, batch_size: int, **what: Any
) -> Iterator[NDArray[np.uint8] | None]:
    """This process's batch of each round; None in a last round that has none for it."""
    mine = generator.stream(count, batch_size=batch_size, take=slice(ranks.rank, None, ranks.count), **what)
    for _ in range(-(-count // (batch_size * ranks.count))):
        yield next(mine, None)


def follow(ranks: Ranks, **more: Callable[..., None]) -> None:
    """In a follower: do what the main process asks, sampling or `more` by name, until it says that all is done."""
    opened: list[ReleasedGenerator] = []

    def open_(release: Path, device: str) -> None:
        opened[:] = [ranks.agree(lambda: _open(ranks, release, device))]

    def images(**what: Any) -> None:
        own = _own(ranks, opened[0], **what)
        while True:
            try:
                batch = next(own)
            except StopIteration:
                return
            except DpsyngenError:
                ranks.next_command()  # what went wrong in the main process, too, is said by it
                raise
            # The main process may still be writing the images of the round before; if it fails, it says so here.
            ranks.next_command()
            ranks.gather_to_main(batch)

    known: dict[str, Callable[..., None]] = {_OPEN: open_, _IMAGES: images, **more}
    while (command := ranks.next_command()).name != END:
        known[command.name](**command.values)
