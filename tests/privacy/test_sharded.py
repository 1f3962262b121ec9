"""Models split over two processes clip, add noise and train as one process does (gloo; see ``sharded_worker``)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from dpsyngen.errors import ConfigError
from dpsyngen.privacy.noise import fine_normal, standard_normal_parts
from dpsyngen.privacy.per_example import PerExampleGradients
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.privacy.sharding import Place

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=240)[0])
        except subprocess.TimeoutExpired:  # the other one has failed, or they wait for each other
            for each in processes:
                each.kill()
            outputs.append(process.communicate()[0])
    assert all(p.returncode == 0 for p in processes), "\n\n".join(o[-3000:] for o in outputs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("model", ["varied", "unet", "two rows"])
def test_sums_and_norms_are_those_of_one_process(found, model) -> None:
    """Over all styles; with 4 and 2 examples, and with none in process 0; and with padding among the examples."""
    for rank in found:
        entry = rank[model]
        assert entry["error"] < 1e-5
        assert entry["facts"], "norms, counts or sensitivity differ"
        assert rank[f"no gradient is left behind, {model}"]


def test_what_is_not_finite_in_one_shard_is_dropped_in_all(found) -> None:
    """The NaN of one example is in process 1's row alone; another's squares leave fp32 in process 0 alone."""
    for rank in found:
        assert rank["two rows"]["not_finite"] == 1
        assert rank["two rows"]["error"] < 1e-5


@pytest.mark.parametrize(
    "case",
    [
        "left whole after the forward pass",
        "norms without gradients",
        "activation checkpointing",
    ],
)
def test_other_ways_to_shard(found, case) -> None:
    for rank in found:
        assert rank[case]["error"] < 1e-5
        assert rank[case]["facts"]


def test_an_example_changes_the_whole_sum_by_at_most_c(found) -> None:
    for rank in found:
        assert len(rank["changes"]) == 3 * 3
        assert max(rank["changes"].values()) <= 1 + 1e-5
        # The bound is met, so a sum that were averaged or counted twice would not pass.
        assert rank["changes"]["flat, 1000000.0"] > 0.999


def test_each_process_adds_its_own_part_of_the_noise_of_one_process(found) -> None:
    for rank in found:
        assert rank["noise is the same to the last bit"]


def test_three_steps_of_training_end_in_the_weights_of_one_process(found) -> None:
    for rank in found:
        weights = rank["weights after three steps"]
        assert weights["moved"] > 0.05
        assert weights["own"] < 1e-5


def test_between_steps_a_process_holds_its_shard_and_no_more(found) -> None:
    held = [rank["numbers held"] for rank in found]
    for kind, times in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
        assert sum(h[kind] for h in held) == pytest.approx(times)
        assert all(h[kind] < 0.6 * times for h in held)
    for h in held:
        assert h["of how many"] > 10
        assert h["gathered parameters"] == 0, "bytes of whole parameters that are still there"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("unequal", "examples is .* from 3 to 4"),
        ("other batches", "physical_batch"),
        ("none", "valid=0"),
        ("the engine of a whole model", "OwnExamples"),
        ("a whole model", "not sharded by"),
        ("grid", "grid"),
        ("partly sharded", "not sharded while"),
        ("second axis", "must be sharded along its first axis"),
        ("replicas", "over a mesh of one dimension"),
        ("wrong shape", "shape"),
        ("never run", "AttributeError: 'Module'|_forward_unimplemented|NotImplementedError"),
        ("mixing, own", "UnsupportedLayer"),
        ("too many valid", "valid is 7"),
        ("valid of another shape", "boolean"),
    ],
)
def test_what_would_hang_or_void_the_guarantee_is_refused_in_both(found, case, words) -> None:
    for rank in found:
        assert re.search(words, rank["refused"][case]), rank["refused"][case]


def test_after_a_refusal_passes_go_on_and_empty_batches_are_zero(found) -> None:
    for rank in found:
        for case in ("empty", "added"):
            assert rank[case]["error"] < 1e-5
            assert rank[case]["facts"]


# ------------------------------------------------------------------------------------------ in one process


@pytest.mark.parametrize("count", [10, 32768, 70_001])
def test_parts_of_the_noise_are_those_of_the_whole(count) -> None:
    randomness = Randomness.from_insecure_seed(0)
    whole = fine_normal(randomness, 3, count, "noise").astype(np.float32)
    spans = [(0, 5), (5, 0), (5, 5), (count // 3, count // 2), (count - 3, 3), (2, 7), (0, count)]
    for (start, length), part in zip(spans, standard_normal_parts(randomness, 3, count, spans), strict=True):
        assert np.array_equal(part, whole[start : start + length])
    for outside in ((-1, 2), (count - 1, 2)):
        with pytest.raises(ValueError, match="within"):
            list(standard_normal_parts(randomness, 3, count, [outside]))


def test_the_span_of_a_place_is_where_its_rows_lie() -> None:
    vector = np.arange(100, dtype=np.float32)
    whole = torch.from_numpy(vector[20:80]).view(3, 4, 5)
    for first, length in ((0, 2), (1, 2), (2, 1), (0, 0), (3, 0)):
        start, n = Place(20, (3, 4, 5), first, length).span
        assert np.array_equal(vector[start : start + n], whole[first : first + length].flatten().numpy())


def test_activation_checkpointing_gives_the_same_sum() -> None:
    torch.manual_seed(0)
    inner, last, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 2), torch.randn(5, 3)
    engine = PerExampleGradients(nn.ModuleList([inner, last]), 0.5)
    expected = engine.sum(lambda part: last(inner(x[part])).square().sum(1), 5)

    def loss(part: slice, **settings: Any) -> torch.Tensor:
        return last(checkpoint(inner, x[part], use_reentrant=False, **settings)).square().sum(1)

    got = engine.sum(lambda part: loss(part, context_fn=engine.checkpoint_contexts), 5)
    torch.testing.assert_close(got.norms, expected.norms)
    for a, b in zip(got.sums, expected.sums, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(CheckpointError):
        engine.sum(loss, 5)
    # Outside of the engine's passes they do nothing.
    loss(slice(0, 5), context_fn=engine.checkpoint_contexts).sum().backward()
    assert last.weight.grad is not None


@pytest.mark.parametrize("valid", [2, torch.tensor([True, True, False, False])])
def test_padding_adds_exactly_zero_in_one_process_too(valid) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    x[3] = float("nan")
    engine = PerExampleGradients(model, 0.5, workers=1)

    def loss(part: slice) -> torch.Tensor:
        return model(x[part]).square().sum(1)

    expected = engine(lambda: loss(slice(0, 2)), 2)
    for got in (engine(lambda: loss(slice(0, 4)), 4, valid=valid), engine.sum(loss, 4, physical_batch=3, valid=valid)):
        assert (got.examples, got.not_finite, len(got.norms)) == (2, 0, 2)
        for a, b in zip(got.sums, expected.sums, strict=True):
            torch.testing.assert_close(a, b)
    nothing = engine.sum(loss, 4, valid=0)
    assert nothing.examples == 0
    assert all(not s.any() for s in nothing.sums)
    with pytest.raises(ConfigError, match="valid is 5"):
        engine.sum(loss, 4, valid=5)
