"""Checkpoints: what is restored is what was saved, or it is refused; a good one is always left."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dpsyngen.diffusion.denoiser import Ema
from dpsyngen.errors import RunError
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training import checkpoint
from dpsyngen.training.checkpoint import Checkpoints, TrainState, _digest, save_file

STEPS = 100


def fresh(seed: int = 0, width: int = 3, optimizers: tuple[str, ...] = ("private",)) -> TrainState:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    adams: dict[str, torch.optim.Optimizer] = {n: torch.optim.Adam(module.parameters(), lr=0.01) for n in optimizers}
    return TrainState(module, Ema(module, 0.9), adams)


def step(state: TrainState, number: int = 1, optimizer: str = "private") -> TrainState:
    for _ in range(number):
        for i, p in enumerate(state.module.parameters()):
            p.grad = torch.full_like(p, 0.1 * (state.step + 1 + i))
        state.optimizers[optimizer].step()
        state.step += 1
        state.ema.update(state.module)
    return state


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    made = Ledger.create(tmp_path / "ledger.jsonl", target_epsilon=100, delta=1e-3, records=100)
    made.charge(Mechanism(0.1, 2.0, 10), "steps", query="dp-sgd", steps=10)
    return made


@pytest.fixture
def kept(tmp_path, ledger) -> Checkpoints:
    return Checkpoints(tmp_path, ledger)


def same(a: TrainState, b: TrainState) -> bool:
    x, y = a.tensors(), b.tensors()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) and a.step == b.step


def load(kept: Checkpoints, state: TrainState, charged: int | None = 10) -> bool:
    return kept.load("context", state, STEPS, charged)


@pytest.mark.parametrize("optimizers", [("private",), ("private", "public")])
def test_restored_state_goes_on_exactly(kept, optimizers) -> None:
    """Also where one optimizer of a shared network has taken no step yet."""
    a, b = step(fresh(0, optimizers=optimizers), 3), fresh(1, optimizers=optimizers)
    kept.save("context", a)
    assert load(kept, b)
    assert same(a, b)
    for name in optimizers:
        step(a, 2, name)
        step(b, 2, name)
    assert same(a, b)
    assert a.ema.steps == b.ema.steps
    assert kept.newest.stat().st_mode & 0o777 == 0o600


def test_restored_tensors_do_not_hang_on_the_file(kept) -> None:
    a, b = step(fresh(), 2), fresh(1)
    kept.save("context", a)
    load(kept, b)
    kept.newest.write_bytes(b"")
    assert same(a, b)


def test_no_checkpoint_of_the_phase(kept) -> None:
    assert not load(kept, fresh())
    kept.save("pretrain", step(fresh()))
    assert not load(kept, fresh())
    assert kept.damaged == []


# ------------------------------------------------------------------------------------------------ damage


def damages(data: bytes) -> dict[str, bytes]:
    middle = len(data) // 2
    return {
        "empty": b"",
        "a byte": data[:1],
        "half": data[:middle],
        "short": data[:-1],
        "longer": data + b"x",
        "flipped": data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
        "header": data[:30] + b"\xff" + data[31:],
        "step": data.replace(b'\\"step\\": 4', b'\\"step\\": 5'),
        "text": b"hello",
        "zeros": bytes(len(data)),
    }


@pytest.mark.parametrize("how", damages(bytes(100)))
def test_damaged_newest_falls_back_and_is_named(kept, how) -> None:
    a = step(fresh(), 2)
    kept.save("context", a)
    expected = step(fresh(), 2)
    kept.save("context", step(a, 2))
    data = kept.newest.read_bytes()
    damaged = damages(data)[how]
    assert damaged != data
    kept.newest.write_bytes(damaged)
    b = fresh(1)
    assert load(kept, b)
    assert same(b, expected)
    assert len(kept.damaged) == 1
    assert kept.damaged[0].startswith("checkpoint.safetensors: ")


def test_damaged_newest_never_takes_the_place_of_the_good_one(kept, monkeypatch) -> None:
    a = step(fresh(), 2)
    kept.save("context", a)
    kept.save("context", step(a, 1))
    kept.newest.write_bytes(b"damaged")
    good = kept.older.read_bytes()
    b = fresh(1)
    load(kept, b)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        kept.save("context", step(b))
    assert kept.older.read_bytes() == good
    monkeypatch.undo()
    kept.save("context", b)
    assert kept.older.read_bytes() == good
    c = fresh(2)
    assert load(Checkpoints(kept.newest.parent, kept.ledger), c)
    assert same(b, c)


def test_at_every_operation_of_a_save_one_good_checkpoint_is_there(kept, monkeypatch) -> None:
    a = step(fresh(), 2)
    kept.save("context", a)
    kept.save("context", step(a, 1))
    seen: list[int] = []

    def look(*_: object) -> None:
        b = fresh(1)
        assert load(Checkpoints(kept.newest.parent, kept.ledger), b)
        seen.append(b.step)

    for name in ("fsync", "replace", "chmod"):
        real = getattr(os, name)

        def spy(*arguments: Any, real: Any = real) -> Any:
            look()
            result = real(*arguments)
            look()
            return result

        monkeypatch.setattr(os, name, spy)
    real_replace = Path.replace

    def spy_rename(self: Path, target: Path) -> Path:
        look()
        result = real_replace(self, target)
        look()
        return result

    monkeypatch.setattr(Path, "replace", spy_rename)
    kept.save("context", step(a, 1))
    assert seen[0] == 3
    assert seen[-1] == 4
    assert set(seen) == {3, 4}


# ------------------------------------------------------------------------------------- what does not fit


def forge(kept: Checkpoints, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
    """Write the newest checkpoint anew, whole, with other content."""
    with safe_open(kept.newest, framework="pt") as f:
        info = json.loads(f.metadata()["dpsyngen"])
        before = {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
    text, now = json.dumps(info | changes), before if tensors is None else tensors
    save_file(now, kept.newest, {"dpsyngen": text, "digest": _digest(text, now)})


def tensors_of(kept: Checkpoints) -> dict[str, torch.Tensor]:
    with safe_open(kept.newest, framework="pt") as f:
        return {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118


@pytest.mark.parametrize("value", ["3", 3.5, None, True, [3]])
@pytest.mark.parametrize("key", ["step", "ema_steps"])
def test_step_that_is_no_number_is_passed_over(kept, key, value) -> None:
    kept.save("context", step(fresh(), 2))
    forge(kept, **{key: value})
    assert not load(kept, fresh())
    assert kept.damaged


@pytest.mark.parametrize(("key", "value"), [("step", -1), ("step", STEPS + 1), ("ema_steps", -1)])
def test_impossible_steps_are_refused(kept, key, value) -> None:
    kept.save("context", step(fresh(), 2))
    forge(kept, **{key: value})
    state = fresh(1)
    before = {k: v.clone() for k, v in state.tensors().items()}
    with pytest.raises(RunError, match="steps were done, but the phase"):
        load(kept, state, None)
    assert all(torch.equal(v, before[k]) for k, v in state.tensors().items())


def test_more_steps_than_the_ledger_charged_are_refused(kept) -> None:
    kept.save("context", step(fresh(), 10))
    assert load(kept, fresh(), 10)
    with pytest.raises(RunError, match=r"after step 10 .* knows of charges that are not in"):
        load(kept, fresh(), 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model/0.weight"), "lacks 'model/0.weight'"),
        (lambda t: t.pop("ema/0.bias"), "lacks 'ema/0.bias'"),
        (lambda t: t.pop("optimizer/private/2/exp_avg"), "lacks 'optimizer/private/2/exp_avg'"),
        (lambda t: t.update({"model/extra": torch.zeros(1)}), "has 'model/extra'"),
        (lambda t: t.update({"optimizer/other/0/step": torch.zeros(())}), "has 'optimizer/other/0/step'"),
        (lambda t: t.update({"optimizer/private/9/step": torch.zeros(())}), "has 'optimizer/private/9/step'"),
        (lambda t: t.update({"model/0.weight": torch.zeros(3, 5)}), r"\[3, 5\].* but must be \[3, 4\]"),
        (lambda t: t.update({"ema/0.weight": torch.zeros(4, 3)}), r"but must be \[3, 4\]"),
        (lambda t: t.update({"optimizer/private/0/exp_avg": torch.zeros(12)}), r"\[12\]"),
        (lambda t: t.update({"optimizer/private/0/step": torch.zeros(1)}), r"must be \[\]"),
        (lambda t: t.update({"model/0.weight": torch.zeros(3, 4, dtype=torch.float64)}), "float64"),
        (lambda t: t.update({"model/1.num_batches_tracked": torch.zeros(())}), "must be .* torch.int64"),
    ],
)
def test_tensors_of_another_network_are_refused(kept, change, message) -> None:
    kept.save("context", step(fresh(), 2))
    tensors = tensors_of(kept)
    change(tensors)
    forge(kept, tensors)
    with pytest.raises(RunError, match=message):
        load(kept, fresh())


def test_network_of_another_size_is_refused(kept) -> None:
    kept.save("context", step(fresh(width=3), 2))
    with pytest.raises(RunError, match=r"does not fit.*start a new run"):
        load(kept, fresh(width=5))


# ------------------------------------------------------------------------------------------- the ledger


def test_ledger_that_was_put_back_is_refused(kept, ledger, tmp_path) -> None:
    """The checkpoint knows a line that is gone, even where the number of charged steps would do."""
    for name in ("ledger.jsonl", "ledger.jsonl.head"):
        shutil.copy(tmp_path / name, tmp_path / f"old-{name}")
    ledger.charge(Mechanism(0.1, 2.0, 2), "steps", query="dp-sgd", steps=2)
    kept.save("context", step(fresh(), 2))
    for name in ("ledger.jsonl", "ledger.jsonl.head"):
        shutil.copy(tmp_path / f"old-{name}", tmp_path / name)
    with pytest.raises(RunError, match="put back to an earlier state"):
        load(Checkpoints(tmp_path, Ledger(tmp_path / "ledger.jsonl")), fresh())
    # Whatever phase it is of.
    with pytest.raises(RunError, match="put back to an earlier state"):
        Checkpoints(tmp_path, Ledger(tmp_path / "ledger.jsonl")).load("other", fresh(), STEPS)


def test_ledger_that_grew_is_fine(kept, ledger) -> None:
    kept.save("context", step(fresh(), 2))
    ledger.note_private_access("a look")
    assert load(kept, fresh())


def test_checkpoint_of_another_run_is_refused(kept, tmp_path) -> None:
    kept.save("context", step(fresh(), 2))
    (tmp_path / "other").mkdir()
    other = Ledger.create(tmp_path / "other" / "l", target_epsilon=100, delta=1e-3, records=100, run="another")
    other.charge(Mechanism(0.1, 2.0, 10), "steps", query="dp-sgd", steps=10)
    with pytest.raises(RunError, match="different runs"):
        load(Checkpoints(tmp_path, other), fresh())


def test_full_disk_is_an_os_error(tmp_path) -> None:
    """Not one of the library's, so that callers can tell it from a damaged file."""
    with pytest.raises(OSError, match="No space left"):
        save_file({"a": torch.zeros(10**6)}, Path("/dev/full"))
