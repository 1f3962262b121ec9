"""PyTorch data sets of programs: sharding without overlap, resuming, workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from dpsyngen.errors import ConfigError
from dpsyngen.programs import make_program
from dpsyngen.programs.torch_datasets import ProgramDataset, ProgramStream

# The tests want more workers than some machines have cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

PROGRAM = make_program("strokes", resolution=8, channels=1, seed=2)


def numbers(images: torch.Tensor, upto: int = 400) -> list[int]:
    """Which images of the program these are."""
    known = {image.tobytes(): i for i, image in reversed(list(enumerate(PROGRAM.batch(range(upto)))))}
    return [known[image.numpy().tobytes()] for image in images]


# Two images of this program may coincide; the first 400 must not, or `numbers` could not tell them apart.
def test_images_can_be_told_apart() -> None:
    assert len(set(numbers(torch.from_numpy(PROGRAM.batch(range(400)))))) == 400


def stream(**more: Any) -> ProgramStream:
    return ProgramStream(PROGRAM, 5, values="uint8", **more)


def take(batches: Any, count: int) -> list[int]:
    iterator = iter(batches)
    return [n for _ in range(count) for n in numbers(next(iterator))]


def test_map_style() -> None:
    data = ProgramDataset(PROGRAM, 20, start=7, values="uint8")
    assert len(data) == 20
    assert np.array_equal(data[3].numpy(), PROGRAM(10))
    assert torch.equal(data[-1], data[19])
    loader = DataLoader(data, batch_size=8, num_workers=2)
    assert [n for batch in loader for n in numbers(batch)] == list(range(7, 27))
    floats = ProgramDataset(PROGRAM, 3)[1]
    assert floats.dtype == torch.float32
    assert np.array_equal(floats.numpy(), PROGRAM.batch([1], dtype=np.float32)[0])
    for index in (20, -21):
        with pytest.raises(IndexError, match="there are 20"):
            data[index]
    with pytest.raises(ConfigError, match="length is 0"):
        ProgramDataset(PROGRAM, 0)
    with pytest.raises(ConfigError, match="values is 'int'"):
        ProgramDataset(PROGRAM, 1, values="int")  # type: ignore[arg-type]


def test_map_style_is_split_by_the_usual_sampler() -> None:
    data = ProgramDataset(PROGRAM, 20, values="uint8")
    seen = []
    for rank in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
        seen += [n for batch in DataLoader(data, batch_size=5, sampler=sampler) for n in numbers(batch)]
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_ranks_and_workers_share_the_images_without_overlap(workers: int) -> None:
    seen = []
    for rank in range(3):
        part = stream(rank=rank, world_size=3, start=10)
        mine = take(DataLoader(part, batch_size=None, num_workers=workers), 4)
        # What a rank sees, and in which order, does not depend on the workers.
        assert mine == [10 + (step * 3 + rank) * 5 + k for step in range(4) for k in range(5)]
        seen += mine
    assert sorted(seen) == list(range(10, 70))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 3), (0, 2), (3, 0)])
def test_resuming_goes_on_where_it_stopped(before: int, after: int) -> None:
    first = stream(rank=1, world_size=2)
    begun = take(DataLoader(first, batch_size=None, num_workers=before), 5)
    state = first.state_dict(5)
    if before == 0:
        assert state == first.state_dict()
    second = stream(rank=1, world_size=2)
    second.load_state_dict(state)
    rest = take(DataLoader(second, batch_size=None, num_workers=after), 4)
    assert begun + rest == take(stream(rank=1, world_size=2), 9)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_iteration_begins_where_the_first_did(workers: int) -> None:
    part = stream()
    part.load_state_dict({"first": 10})
    loader = DataLoader(part, batch_size=None, num_workers=workers)
    assert take(loader, 3) == take(loader, 3) == list(range(10, 25))
    assert part.state_dict(3) == {"first": 25}


def test_resuming_with_other_ranks() -> None:
    state = stream(rank=0, world_size=2).state_dict(6)
    seen = []
    for rank in range(4):
        part = stream(rank=rank, world_size=4)
        part.load_state_dict(state)
        seen += take(part, 2)
    assert sorted(seen) == list(range(60, 100))


def test_a_worker_does_not_know_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpsyngen.programs import torch_datasets

    monkeypatch.setattr(torch_datasets, "get_worker_info", lambda: object())
    assert stream().state_dict(2) == {"first": 10}
    with pytest.raises(ConfigError, match="ask outside"):
        stream().state_dict()


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (stream().rank, stream().world_size) == (2, 4)
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(ConfigError, match="RANK"):
        stream()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"rank": 0}, "belong together"),
        ({"start": -1}, "start is -1"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(**bad)


@pytest.mark.parametrize("state", [{}, {"next": 3}, {"first": -1}, [3], {"first": 0, "done": "many"}])
def test_bad_states(state: Any) -> None:
    with pytest.raises(ConfigError):
        stream().load_state_dict(state)
