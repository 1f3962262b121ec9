"""`dpsyngen doctor` of machines."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from dpsyngen.hardware import Facts, Gpu, Machine, advice, look

A100 = Gpu("NVIDIA A100", (8, 0), 80 * 2**30)


@pytest.fixture
def machine() -> Machine:
    """With eight cores and room."""
    nothing = Facts((), "cuda")
    return replace(look(), cores=8, threads=8, memory=2**36, available=2**35, facts=nothing)


def said(machine: Machine) -> str:
    return "\n".join(advice(machine))


@pytest.fixture(autouse=True)
def _no_driver(monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.hardware.Path.exists", lambda path: False)


def test_advice_is_for_what_is_the_matter(machine, monkeypatch) -> None:
    assert said(machine).startswith("No GPU")
    gpu = replace(machine, facts=Facts((A100,), "cuda"))
    assert said(gpu) == ""
    two = replace(gpu, facts=Facts((A100, A100), "cuda"))
    assert "torchrun --nproc-per-node 2 -m dpsyngen train" in said(two)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "2 of 8 cores: OMP_NUM_THREADS is 2" in said(replace(gpu, threads=2))
    assert "1.0 GiB of memory" in said(replace(gpu, available=2**30))


def test_a_gpu_that_pytorch_does_not_see_is_named(machine, monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.hardware.Path.exists", lambda path: True)
    assert "nvidia-smi" in said(machine)
    assert "built for CPUs only: install one for CUDA" in said(replace(machine, facts=Facts((), "cpu")))


def test_doctor_without_a_run_looks_at_the_machine(call) -> None:
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    for what in ("PyTorch:", "processor:", "memory:", "GPU", "chosen here", "precision:"):
        assert what in out


def test_doctor_of_the_machine_as_json(call) -> None:
    code, out, _ = call("doctor", "--json", "--device", "cpu")
    document = json.loads(out)
    assert code == 0
    assert set(document) == {"ok", "state", "findings", "machine", "compute", "advice"}
    assert document["ok"] is True
    assert document["machine"]["memory"] >= document["machine"]["available"] > 0
    assert document["compute"]["device"] == {"value": "cpu", "why": "asked for"}


def test_doctor_refuses_a_device_that_is_not_there(call) -> None:
    code, _, err = call("doctor", "--device", "nonsense")
    assert code == 2
    assert "must be auto or cpu" in err


def test_every_command_takes_a_gpu_where_there_is_one() -> None:
    import typer

    from dpsyngen.cli.app import app

    group = typer.main.get_command(app)
    devices = {n: p for n, c in group.commands.items() for p in c.params if p.name == "device"}  # type: ignore[attr-defined]
    assert set(devices) >= {"train", "sample", "evaluate", "audit", "compare", "stages", "memorisation", "doctor"}
    assert {n: p.default for n, p in devices.items() if p.default != "auto"} == {}
