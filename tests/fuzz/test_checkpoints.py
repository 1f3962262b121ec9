"""A damaged or foreign checkpoint: a resumed run goes on as it was saved, or starts the phase anew, or refuses."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dpsyngen.diffusion.denoiser import Ema
from dpsyngen.errors import DpsyngenError
from dpsyngen.privacy.accounting import Mechanism
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.checkpoint import Checkpoints, TrainState, _digest
from tests.fuzz.mutations import spoil_bytes, spoil_value
from tests.fuzz.properties import accepted, examples, nothing_else_happens, tried

pytestmark = pytest.mark.slow

numbers = st.integers(0, 2**64 - 1)
STEPS, DONE = 10, 4


def fresh() -> TrainState:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    return TrainState(module, Ema(module, 0.9), {"private": torch.optim.Adam(module.parameters(), lr=0.1)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ledger, Path, dict[str, Tensor]]:
    """A ledger, a checkpoint file of step 4, and the tensors in it."""
    folder = tmp_path_factory.mktemp("private")
    ledger = Ledger.create(folder / "ledger.jsonl", target_epsilon=100, delta=1e-3, records=100)
    ledger.charge(Mechanism(0.1, 2.0, STEPS), "steps", query="dp-sgd", steps=STEPS)
    state = fresh()
    for i in range(DONE):
        for p in state.module.parameters():
            p.grad = torch.full_like(p, float(i + 1))
        state.optimizers["private"].step()
        state.ema.update(state.module)
    state.step = DONE
    kept = Checkpoints(folder, ledger)
    kept.save("context", state)
    return ledger, kept.newest, state.tensors()


def goes_on_or_refuses(ledger: Ledger, file: Path, tensors: dict[str, Tensor], *, exactly: bool) -> None:
    tried["checkpoint"] += 1
    state = fresh()
    with nothing_else_happens(file.parent):
        try:
            found = Checkpoints(file.parent, ledger).load("context", state, STEPS, STEPS)
        except DpsyngenError:
            return
    if not found:
        assert state.step == 0
        return
    accepted["checkpoint"] += 1
    restored = state.tensors()
    assert 0 <= state.step <= STEPS
    assert {k: (v.shape, v.dtype) for k, v in restored.items()} == {k: (v.shape, v.dtype) for k, v in tensors.items()}
    if exactly:
        assert state.step == DONE
        assert all(torch.equal(restored[k], v) for k, v in tensors.items())


def test_accidents(saved: tuple[Ledger, Path, dict[str, Tensor]]) -> None:
    """Bits that changed on the disk: what loads is what was saved."""
    ledger, file, tensors = saved
    good = file.read_bytes()

    @examples(250)
    @given(numbers)
    def check(number: int) -> None:
        file.write_bytes(spoil_bytes(good, good, Random(number)))
        goes_on_or_refuses(ledger, file, tensors, exactly=True)

    try:
        check()
    finally:
        file.write_bytes(good)


def test_foreign_content(saved: tuple[Ledger, Path, dict[str, Tensor]]) -> None:
    """Whole files, digest and all, that say something else: shapes and steps still fit."""
    ledger, file, tensors = saved
    good = file.read_bytes()
    with safe_open(file, framework="pt") as f:
        info = json.loads(f.metadata()["dpsyngen"])

    @examples(250)
    @given(numbers)
    def check(number: int) -> None:
        random = Random(number)
        changed = dict(tensors)
        if random.random() < 0.5:
            name = random.choice(list(changed))
            tensor = changed.pop(name)
            other = random.choice(
                (None, tensor.double(), tensor.flatten()[:1], torch.zeros(0), tensor[None], tensor + 1)
            )
            if other is not None:
                changed[
                    random.choice((name, name + "x", "optimizer/private/9/step", "optimizer/private/x/y/z", ""))
                ] = other
        try:
            text = json.dumps(spoil_value(info, random) if random.random() < 0.7 else info)
        except ValueError:
            text = "[" * 100_000
        save_file(changed, file, {"dpsyngen": text, "digest": _digest(text, changed)})
        goes_on_or_refuses(ledger, file, tensors, exactly=False)

    try:
        check()
    finally:
        file.write_bytes(good)
