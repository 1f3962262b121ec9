"""Invariants of a transcript, on transcripts made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpsyngen.audit.invariants import Claim, Transcript, check_transcript
from dpsyngen.audit.report import decide
from dpsyngen.training.private import StepRecord

RECORDS, RATE, SCALE, EXPECTED = 60, 0.3, 2.0, 18.0
SHAPES = ((30, 20), (50,), (7, 3, 3))


def transcript(steps: int = 12, seed: int = 0, *, scale: float = SCALE, repeat: int | None = None, late: bool = False):
    """An honest transcript of Gaussian noise, with one step `repeat`-ed at the end."""
    rng = np.random.default_rng(seed)
    out = Transcript(RECORDS, SCALE, EXPECTED, lambda: len(out.traces) + (0 if late else 1))
    records = []
    for t in range(steps):
        sums = [torch.from_numpy(rng.standard_normal(s)).float() for s in SHAPES]
        noisy = [(s + torch.from_numpy(scale * rng.standard_normal(s.shape)).float()) / EXPECTED for s in sums]
        records.append(StepRecord(t, np.flatnonzero(rng.random(RECORDS) < RATE), sums, noisy))
    for record in [*records, *([] if repeat is None else [records[repeat]])]:
        out.add(record)
    return out, records


def failures(made: Transcript, claim: Claim, error: float = 1e-6) -> list[str]:
    return [f.name for f in decide(check_transcript(made, claim), error) if not f.passed]


def test_honest_transcript_passes() -> None:
    assert failures(transcript(repeat=8)[0], Claim(RATE, SCALE, 12, crashed=True)) == []
    assert failures(transcript()[0], Claim(RATE, SCALE, 12)) == []


def test_false_alarms_are_as_rare_as_stated() -> None:
    error = 0.05
    alarms = sum(bool(failures(transcript(seed=s)[0], Claim(RATE, SCALE, 12), error)) for s in range(200))
    assert alarms <= 200 * error + 4 * np.sqrt(200 * error)


@pytest.mark.parametrize("scale", [0.9 * SCALE, 1.1 * SCALE, 0.0])
def test_noise_of_another_scale(scale) -> None:
    assert "noise has the claimed scale, overall" in failures(transcript(scale=scale)[0], Claim(RATE, SCALE, 12))


def test_a_divisor_that_is_not_the_constant() -> None:
    made, records = transcript()
    made.traces.clear()
    for r in records:
        made.add(StepRecord(r.step, r.chosen, r.sums, [t * EXPECTED / max(len(r.chosen), 1) for t in r.released]))
    assert "the sum is divided by the constant expected batch" in failures(made, Claim(RATE, SCALE, 12))


def test_steps_and_charges() -> None:
    made, _ = transcript()
    assert "steps taken are the steps charged" in failures(made, Claim(RATE, SCALE, 11))
    assert "steps taken are the steps charged" in failures(made, Claim(RATE, SCALE, 13))
    late, _ = transcript(late=True)
    assert failures(late, Claim(RATE, SCALE, 12)) == ["each step is in the ledger before it is taken"]
    empty = Transcript(RECORDS, SCALE, EXPECTED, lambda: 0)
    assert failures(empty, Claim(RATE, SCALE, 12)) == ["steps were taken"]


@pytest.mark.parametrize("what", ["chosen", "noise", "sum"])
def test_a_repeated_step_must_be_the_same(what) -> None:
    made, records = transcript()
    r = records[5]
    fresh = [torch.randn_like(t) for t in r.sums]
    changed = {
        "chosen": StepRecord(5, r.chosen[1:], r.sums, r.released),
        "noise": StepRecord(5, r.chosen, r.sums, [t + f / EXPECTED for t, f in zip(r.released, fresh, strict=True)]),
        # The same noise on another sum: the difference of the two is the difference of the sums, without noise.
        "sum": StepRecord(
            5,
            r.chosen,
            [s * 1.2 for s in r.sums],
            [t + 0.2 * s / EXPECTED for t, s in zip(r.released, r.sums, strict=True)],
        ),
    }[what]
    made.add(changed)
    assert "a step that is repeated after a crash is the same step" in failures(
        made, Claim(RATE, SCALE, 12, crashed=True)
    )


def test_another_noise_in_the_ledger_than_in_the_training() -> None:
    assert failures(transcript()[0], Claim(RATE, 1.1 * SCALE, 12)) == ["the ledger charges the noise that is added"]


def test_a_crash_without_a_repeated_step_is_no_evidence() -> None:
    assert failures(transcript()[0], Claim(RATE, SCALE, 12, crashed=True)) == [
        "a step that is repeated after a crash is the same step"
    ]


def test_noise_that_is_used_twice() -> None:
    made, records = transcript()
    made.traces.clear()
    noise = [r * EXPECTED - s for r, s in zip(records[2].released, records[2].sums, strict=True)]
    for r in records:
        again = r.step == 9
        released = [(s + n) / EXPECTED for s, n in zip(r.sums, noise, strict=True)] if again else r.released
        made.add(StepRecord(r.step, r.chosen, r.sums, released))
    assert "noise of different steps is uncorrelated" in failures(made, Claim(RATE, SCALE, 12))


def test_large_networks_keep_a_selection_of_coordinates(monkeypatch) -> None:
    import dpsyngen.audit.invariants as module

    monkeypatch.setattr(module, "KEPT", 100)
    made, _ = transcript()
    assert {len(t.noise) for t in made.traces} == {100}
    assert {int(t.sizes.sum()) for t in made.traces} == {713}
    assert failures(made, Claim(RATE, SCALE, 12)) == []
