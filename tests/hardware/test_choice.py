"""What is chosen on machines that this one is not: facts are made up."""

from __future__ import annotations

import pytest
import torch

from dpsyngen.config import ComputeConfig, default_preset, load_config
from dpsyngen.errors import ConfigError
from dpsyngen.hardware import Facts, Gpu, choose, decide, kind_of

A100 = Gpu("NVIDIA A100", (8, 0), 80 * 2**30)
V100 = Gpu("NVIDIA V100", (7, 0), 16 * 2**30)
K80 = Gpu("NVIDIA K80", (3, 7), 12 * 2**30)
MI300 = Gpu("AMD MI300", (9, 4), 192 * 2**30)
AUTO = ComputeConfig()


def facts(*gpus: Gpu, built_for: str = "cuda") -> Facts:
    return Facts(gpus, built_for)


NOTHING = facts(built_for="cpu")


def test_a_cpu_computes_as_it_always_did() -> None:
    c = decide("auto", AUTO, NOTHING)
    assert (c.device, c.precision, c.channels_last, c.compile) == ("cpu", "fp32", False, False)
    assert c.for_dp_steps().pins() == {"device": "cpu", "precision": "fp32", "channels_last": False}
    assert "built for CPUs only" in c.reasons["device"]
    assert "no GPU that PyTorch can use" in decide("auto", AUTO, facts()).reasons["device"]


def test_a_gpu_with_tensor_cores_is_used_for_what_it_is_good_at() -> None:
    c = decide("auto", AUTO, facts(A100))
    assert (c.device, c.precision, c.channels_last, c.compile) == ("cuda:0", "tf32", False, False)
    assert c.for_dp_steps() == c
    assert "NVIDIA A100, compute capability 8.0, 80 GiB" in c.reasons["device"]


@pytest.mark.parametrize(("gpu", "built_for"), [(V100, "cuda"), (K80, "cuda"), (MI300, "rocm")])
def test_gpus_without_the_units_compute_in_fp32(gpu, built_for) -> None:
    c = decide("auto", AUTO, facts(gpu, built_for=built_for))
    assert (c.device, c.precision, c.channels_last) == ("cuda:0", "fp32", False)
    for precision in ("tf32", "bf16"):
        with pytest.raises(ConfigError, match=rf"precision is {precision}.*fp32 only.*Ampere"):
            decide("auto", ComputeConfig(precision=precision), facts(gpu, built_for=built_for))


def test_nothing_is_compiled_unless_asked_for() -> None:
    for device, asked, compiled in (("cpu", True, True), ("cuda", True, True), ("cuda", False, False)):
        c = decide(device, ComputeConfig(compile=asked), facts(A100))
        assert (c.compile, c.reasons["compile"]) == (compiled, "asked for")
        assert not c.for_dp_steps().compile


def test_what_is_asked_for_is_done_in_dp_steps_too_but_for_compiling() -> None:
    asked = ComputeConfig(precision="bf16", channels_last=True, compile=True)
    dp = decide("cpu", asked, NOTHING).for_dp_steps()
    assert (dp.precision, dp.channels_last, dp.compile) == ("bf16", True, False)
    assert decide("cuda", ComputeConfig(precision="fp32"), facts(A100)).for_dp_steps().precision == "fp32"
    assert not decide("cuda", ComputeConfig(channels_last=False), facts(A100)).channels_last
    with pytest.raises(ConfigError, match="precision is tf32, but the CPU has fp32, bf16 only"):
        decide("cpu", ComputeConfig(precision="tf32"), facts(A100))


def test_each_process_gets_the_gpu_of_its_number() -> None:
    two = facts(A100, V100)
    assert [decide("auto", AUTO, two, rank).device for rank in (None, 0, 1)] == ["cuda:0", "cuda:0", "cuda:1"]
    assert decide("cuda", AUTO, two, 1).precision == "fp32"  # the second one is a V100
    assert decide("cuda:1", AUTO, two, 1).device == "cuda:1"
    assert decide("cpu", AUTO, two, 7).device == "cpu"
    with pytest.raises(ConfigError, match=r"2 GPUs, but a process number 2 .* --nproc-per-node 2"):
        decide("auto", AUTO, two, 2)
    with pytest.raises(ConfigError, match="each takes the GPU of its own number: use --device cuda"):
        decide("cuda:0", AUTO, two, 1)


@pytest.mark.parametrize("device", ["gpu", "meta", "xpu", "", "cuda:x", "cpu:zero"])
def test_what_is_no_device_is_refused_with_those_there_are(device) -> None:
    with pytest.raises(ConfigError, match="must be auto or cpu or cuda or cuda:0"):
        decide(device, AUTO, facts(A100))


def test_missing_devices_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'cuda:3', but must be auto or cpu or cuda or cuda:0 or cuda:1"):
        decide("cuda:3", AUTO, facts(A100, A100))
    with pytest.raises(ConfigError, match=r"cannot use: this PyTorch is built for CPUs only.*Choose auto or cpu\."):
        decide("cuda", AUTO, NOTHING)
    with pytest.raises(ConfigError, match=r"mps.*must be auto or cpu"):
        decide("mps", AUTO, NOTHING)


def test_a_gpu_that_is_there_but_cannot_be_used_is_an_error_and_not_a_slow_cpu(monkeypatch) -> None:
    monkeypatch.setattr("dpsyngen.hardware.find", lambda: facts(A100))

    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore")

    monkeypatch.setattr(torch, "zeros", broken)
    with pytest.raises(ConfigError, match=r"cuda:0 cannot be used \(CUDA error: all .* busy\)"):
        choose()
    assert choose("cpu").device == "cpu"


@pytest.mark.parametrize("there", [False, True])
def test_the_preset_goes_with_the_device(monkeypatch, there) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert kind_of("auto") == ("cuda" if there else "cpu")
    assert default_preset() == load_config().preset == ("gpu" if there else "cpu-small")
    assert default_preset(kind_of("auto")) == default_preset()
    # Asking for the CPU on a machine with a GPU asks for settings that a CPU can take.
    assert load_config(device="cpu").preset == "cpu-small"
    assert load_config(device="cuda:1").preset == "gpu"
    assert load_config(device="cuda", preset="demo").preset == "demo"
    assert [kind_of(d) for d in ("cpu", "cuda", "cuda:1", "nonsense")] == ["cpu", "cuda", "cuda:1", "nonsense"]


def test_every_choice_has_its_reason() -> None:
    for machine, device in ((NOTHING, "auto"), (facts(A100), "auto"), (facts(V100), "cuda"), (facts(A100), "cpu")):
        rows = decide(device, AUTO, machine).to_dict()
        assert list(rows) == ["device", "precision", "channels_last", "compile"]
        assert all(row["value"] in (True, False) or row["value"] for row in rows.values())
        assert all(row["why"] for row in rows.values())


def test_settings_that_are_no_choice_are_refused() -> None:
    for bad in (
        {"compile": "yes"},
        {"compile": 2},
        {"channels_last": "true"},
        {"precision": "fp16"},
        {"device": "cpu"},
    ):
        with pytest.raises(ConfigError, match="compute"):
            load_config({"compute": bad})
    assert load_config({"compute": {"compile": False, "channels_last": True}}).compute == ComputeConfig(
        compile=False, channels_last=True
    )
