"""kill -9 at any moment: before every single file operation of a run, in the middle of every write, and at random.

The ordinary suite kills at some of the points; ``DPSYNGEN_LONG=1`` runs them all.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest

from tests.training.crash_lives import (
    Lives,
    content,
    long_test,
    recorded,
    require_charged,
    require_noise_is_used_once,
    require_sound,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("crashes")]  # one process that forks all lives

STEPS = 5
SEED = 7


@pytest.fixture(scope="module")
def whole(lives, tmp_path_factory) -> tuple[Path, list[str], list]:
    """An uninterrupted run, the names of its file operations, and its uses of noise."""
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "run"
    assert lives.live(out, seed=SEED, points=str(folder / "points"), record=str(folder / "record"))
    require_sound(out, STEPS)
    return out, (folder / "points").read_text().split("\n"), recorded(folder / "record")


def test_points_cover_what_a_run_writes(whole) -> None:
    """The counting would miss a file written in some other way: every file of the run must be among the points."""
    out, points, uses = whole
    assert [step for step, *_ in uses] == list(range(STEPS))
    targets = {p.split("-> ")[-1].split("/")[-1] for p in points} | {p.split("/")[-1] for p in points}
    assert {p.name for p in out.rglob("*")} <= targets
    for kind in ("open", "write", "write, second half", "written", "truncate", "fsync", "os.rename", "os.remove"):
        assert any(p.startswith(f"{kind} ") for p in points)


def killed_at(lives: Lives, out: Path, record: Path, point: int, second: int | None) -> int:
    """A run that is killed at `point`, and if asked for once more in its next life; returns its number of lives."""
    assert not lives.live(out, seed=SEED, kill_at=point, record=str(record))
    require_charged(out, recorded(record))
    count = 1
    if second is not None:
        count += 1
        if lives.live(out, seed=SEED, kill_at=second, record=str(record)):
            return count
        require_charged(out, recorded(record))
    assert lives.live(out, seed=SEED, record=str(record))
    return count + 1


def at_points(lives: Lives, whole: tuple, folder: Path, points: list[int], twice: bool) -> dict[str, int]:
    reference, _, expected_uses = whole
    expected = content(reference)
    counts = {"points": len(points), "kills": 0, "lives": 0}
    for point in points:
        out, record = folder / "run", folder / "record"
        second = 1 + (37 * point) % 150 if twice else None
        n = killed_at(lives, out, record, point, second)
        counts["kills"] += n - 1
        counts["lives"] += n
        assert content(out) == expected, f"killed before operation {point}"
        require_sound(out, STEPS)
        uses = recorded(record)
        require_noise_is_used_once(uses)
        assert {u[0]: u for u in uses} == {u[0]: u for u in expected_uses}
        shutil.rmtree(out)
        record.unlink(missing_ok=True)
    return counts


def test_killed_before_some_file_operations(lives, whole, tmp_path) -> None:
    at_points(lives, whole, tmp_path, list(range(5, len(whole[1]) + 1, 43)), twice=False)


@long_test
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_killed_before_every_file_operation(twice, lives, whole, tmp_path) -> None:
    """With `twice`, the resumed process is killed, too, somewhere in its life."""
    counts = at_points(lives, whole, tmp_path, list(range(1, len(whole[1]) + 1)), twice)
    print(f"\n{counts}")


def interrupted_at(lives: Lives, whole: tuple, folder: Path, points: range) -> None:
    """A second Ctrl-C before each of the points: the process cleans up behind itself, and the run goes on."""
    expected = content(whole[0])
    for point in points:
        out, record = folder / "run", folder / "record"
        answer = lives.ask(out, seed=SEED, interrupt_at=point, record=str(record))
        assert answer["error"].startswith("KeyboardInterrupt"), (point, answer)
        require_charged(out, recorded(record))
        assert (out / "run.json").exists() or not (out / "private" / "randomness.json").exists(), point
        assert lives.live(out, seed=SEED, record=str(record))
        assert content(out) == expected, f"interrupted before operation {point}"
        require_sound(out, STEPS)
        require_noise_is_used_once(recorded(record))
        shutil.rmtree(out)
        record.unlink()


def test_interrupted_before_some_file_operations(lives, whole, tmp_path) -> None:
    interrupted_at(lives, whole, tmp_path, range(3, len(whole[1]) + 1, 83))


@long_test
def test_interrupted_before_every_file_operation(lives, whole, tmp_path) -> None:
    interrupted_at(lives, whole, tmp_path, range(1, len(whole[1]) + 1))


def at_random_times(
    lives: Lives, folder: Path, runs: int, kills: int, seed: int | None, rng: random.Random
) -> dict[str, int]:
    """Runs that are killed after random times until they are through; so many runs and so many kills at least."""
    counts = {"runs": 0, "kills": 0, "lives": 0}
    while counts["runs"] < runs or counts["kills"] < kills:
        number = counts["runs"]
        counts["runs"] += 1
        out, record = folder / f"run-{number}", folder / f"record-{number}"
        longest = 0.9
        while True:
            counts["lives"] += 1
            if lives.live(out, seed=seed, kill_after=rng.uniform(0.0, longest), record=str(record)):
                break
            counts["kills"] += 1
            require_charged(out, recorded(record))
            longest *= 1.15  # so that it ends on a slow machine, too
        require_sound(out, STEPS)
        uses = recorded(record)
        assert {u[0] for u in uses} == set(range(STEPS))
        require_noise_is_used_once(uses)
    return counts


def test_killed_at_random_times(lives, whole, tmp_path) -> None:
    """With keys of the system: whatever was lost and repeated, no noise met two sums."""
    at_random_times(lives, tmp_path, runs=2, kills=3, seed=None, rng=random.Random(4))


@long_test
@pytest.mark.parametrize("seed", [None, SEED], ids=["entropy", "seeded"])
def test_killed_at_many_random_times(seed, lives, whole, tmp_path) -> None:
    rng = random.Random(time.time_ns())
    counts = at_random_times(lives, tmp_path, runs=40, kills=60, seed=seed, rng=rng)
    print(f"\n{counts}")
    if seed is not None:
        for number in range(counts["runs"]):
            assert content(tmp_path / f"run-{number}") == content(whole[0])
    else:
        # Different keys, so different noise: the check can see a difference.
        noises = {use[3] for n in range(counts["runs"]) for use in recorded(tmp_path / f"record-{n}")}
        assert len(noises) == counts["runs"] * STEPS


def test_the_checks_can_fail(whole) -> None:
    _, _, uses = whole
    step, indices, total, noise = uses[0]
    for wrong in ((step, indices, "other", noise), (step, "other", total, noise), (9, indices, "other", noise)):
        with pytest.raises(AssertionError, match="two"):
            require_noise_is_used_once([*uses, wrong])
    fresh_noise = (step, indices, total, "fresh")
    with pytest.raises(AssertionError, match="two ways"):
        require_noise_is_used_once([*uses, fresh_noise])
