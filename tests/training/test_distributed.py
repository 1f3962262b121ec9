"""Training by several processes, as those that torchrun starts: 3 of them on gloo, against one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dpsyngen.distributed import ALONE
from dpsyngen.privacy.ledger import Ledger
from tests.conftest import TINY_SETTINGS, tiny_arrays
from tests.forked import ended, ranks
from tests.training.distributed_worker import RUNS, main, train

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("forked")]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    for name in RUNS:
        train(name, out, ALONE)
    return out


@pytest.fixture(scope="module", params=[3])
def together(request, tmp_path_factory) -> tuple[int, Path]:
    out = tmp_path_factory.mktemp(f"processes-{request.param}")
    with ranks(request.param, out / "said", "tests.training.distributed_worker", out) as started:
        assert not any(ended(started)), [each.err[-3000:] for each in started]
    return request.param, out


def weights(run: Path) -> dict[str, np.ndarray]:
    return {f"{p.stem}/{k}": v for p in (run / "release" / "weights").iterdir() for k, v in load_file(p).items()}


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_those_of_one_process_up_to_the_order_of_sums(alone, together, name) -> None:
    expected, got = weights(alone / name), weights(together[1] / name)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        # Adam divides by the root of what may be almost nothing, so a last digit can become a few.
        np.testing.assert_allclose(got[key], value, rtol=1e-3, atol=2e-4, err_msg=key)


@pytest.mark.parametrize("name", ["exact", "moments"])
def test_sums_of_whole_numbers_give_the_same_bits_for_any_number_of_processes(alone, together, name) -> None:
    private = "context" if name == "exact" else "gaussian"
    expected, got = weights(alone / name), weights(together[1] / name)
    assert any(k.startswith(private) for k in expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_one_ledger_has_what_one_process_would_have_charged(alone, together, name) -> None:
    expected, got = (Ledger(out / name / "private" / "ledger.jsonl") for out in (alone, together[1]))
    assert [e.mechanism for e in got.entries] == [e.mechanism for e in expected.entries]
    assert got.epsilon() == expected.epsilon()


@pytest.mark.parametrize("name", [n for n in RUNS if n != "moments"])
def test_all_draw_one_set_of_records_and_each_is_used_by_one_process_once(together, name) -> None:
    count, out = together
    ranks = [json.loads((out / f"rank-{r}.json").read_text())[name] for r in range(count)]
    assert len({len(steps) for steps in ranks}) == 1
    assert ranks[0]
    sizes = set()
    for same_step in zip(*ranks, strict=True):
        assert len({s["step"] for s in same_step}) == 1
        chosen = same_step[0]["chosen"]
        assert all(s["chosen"] == chosen for s in same_step)
        # In the order of the ranks, so that sums and noise do not depend on how many there are.
        assert [record for s in same_step for record in s["mine"]] == chosen
        sizes.add(len(chosen))
    assert len(sizes) > 1  # Poisson sampling: batches differ in size


def test_steps_without_any_record_are_taken_and_charged_like_others(alone, together) -> None:
    steps = json.loads((together[1] / "rank-0.json").read_text())["sparse"]
    assert any(not s["chosen"] for s in steps)
    assert len(steps) == 12
    ledger = Ledger(together[1] / "sparse" / "private" / "ledger.jsonl")
    assert sum(int(e.details["steps"]) for e in ledger.entries if "steps" in e.details) == 12


def test_inclusions_of_different_ranks_are_independent(together) -> None:
    """Ranks that draw from streams of equal seeds include the same places of their shards: a correlation of 1."""
    out = together[1]
    half = 60 // 2
    steps = [s for r in RUNS if r != "moments" for s in json.loads((out / "rank-0.json").read_text())[r]]
    included = np.zeros((len(steps), 60))
    for row, s in zip(included, steps, strict=True):
        row[s["chosen"]] = 1
    # The runs share a seed, so equal steps of equal rates repeat; different rows are what is random.
    included = np.unique(included, axis=0)
    first, second = included[:, :half], included[:, half:]
    together_in = ((first - first.mean()) * (second - second.mean())).mean() / included.var()
    assert abs(together_in) < 5 / np.sqrt(first.size)


@pytest.mark.parametrize("name", ["experts", "residual", "sparse"])
def test_noise_is_drawn_once_however_many_processes_there_are(alone, together, name) -> None:
    """Noise of each process on its own sum would have √n times the standard deviation, and parts of it less."""
    expected, got = (np.load(out / name / "noise.npz") for out in (alone, together[1]))
    std = float(got["std"])
    assert std > 0
    for step in range(len(expected["noise"])):
        noise = got["noise"][step] / std
        slack = 5 / np.sqrt(2 * noise.size)
        assert abs(noise.std() - 1) < slack
        assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
        np.testing.assert_allclose(got["noise"][step], expected["noise"][step], atol=1e-3 * std)


# ------------------------------------------------------------------------------------------- the command


@pytest.fixture
def settings(tmp_path) -> Path:
    """A run long enough to be stopped in the middle."""
    import yaml

    values = {k: dict(v) for k, v in TINY_SETTINGS.items()}
    values["private"] |= {"steps": 40, "checkpoint_every": 3}
    values["stages"] = {"variant": "dpdm"}
    values["privacy"] = {"epsilon": 8.0, "insecure_seed": 3}
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    images, labels = tiny_arrays()
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    return path


def words(settings: Path, data: str = "images.npz") -> list[object]:
    out = settings.with_name("run")
    return ["train", "--config", settings, "--data", settings.with_name(data), "--out", out]


def wait_for_steps(settings: Path, going: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not (settings.with_name("run") / "private" / "checkpoint.safetensors").exists():
        assert going()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def require_resumable_by_one(settings: Path, call: Any) -> None:
    """The run was not finished, and one process finishes it, at no more than what was planned."""
    out = settings.with_name("run")
    assert not (out / "release" / "generator.json").exists()
    code, _, err = call("train", "--resume", "--out", out, "--quiet")
    assert code == 0, err
    ledger = Ledger(out / "private" / "ledger.jsonl")
    assert sum(int(e.details["steps"]) for e in ledger.entries if "steps" in e.details) == 40
    assert ledger.epsilon() <= 8


@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_that_lost_a_process_goes_on_with_another_number(settings, lost, call) -> None:
    with ranks(2, settings.parent, "dpsyngen", *words(settings)) as started:
        wait_for_steps(settings, lambda: all(each.process.is_alive() for each in started))
        started[lost].send(signal.SIGKILL)
        assert started[lost].code() == -signal.SIGKILL
        left = started[1 - lost]
        assert left.code() > 0
        assert "is gone" in left.err
        assert "--resume" in left.err
    require_resumable_by_one(settings, call)


@pytest.mark.parametrize("lost", [1, None])
def test_torchrun_ends_a_run_that_lost_a_process_or_was_interrupted(settings, lost, call) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dpsyngen"]
    process = subprocess.Popen(
        [*command, *map(str, words(settings))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_steps(settings, lambda: process.poll() is None)
    if lost is None:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        os.kill(workers(process.pid)[lost], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    if lost is None:
        assert "continue with: dpsyngen train --resume" in err
    else:
        assert "is gone" in err
        assert "--resume" in err
    require_resumable_by_one(settings, call)


def workers(parent: int) -> dict[int, int]:
    """Rank -> process number, of the processes that a torchrun has started."""
    out = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                variables = dict(v.partition(b"=")[::2] for v in (entry / "environ").read_bytes().split(b"\0"))
                out[int(variables[b"RANK"])] = int(entry.name)
        except (OSError, KeyError):
            continue
    return out


def test_a_process_with_other_images_is_refused_before_there_is_a_run(settings, tmp_path) -> None:
    """Each machine of a cluster has its own disk; here a rank stands for a machine."""
    for rank in range(2):
        images, labels = tiny_arrays(seed=rank)
        np.savez(tmp_path / f"disk-{rank}.npz", images=images, labels=labels)
    with ranks(2, tmp_path, "dpsyngen", *words(settings, "disk-{rank}.npz")) as started:
        assert all(ended(started))
        assert "".join(each.err for each in started).count("have read other images than the main one") == 1
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_the_settings_is_said_once(settings, tmp_path) -> None:
    with ranks(2, tmp_path, "dpsyngen", *words(settings), "--batch", "-3") as started:
        assert all(ended(started))
        err = "".join(each.err for each in started)
    (said,) = (line for line in err.splitlines() if line)
    assert said.startswith("dpsyngen:")
    assert "batch" in said
    assert not (tmp_path / "run").exists()


def test_the_worker_is_what_one_process_runs_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])
    monkeypatch.setattr("tests.training.distributed_worker.RUNS", {"sparse": RUNS["sparse"]})
    monkeypatch.setattr("tests.training.distributed_worker.watched", lambda seen: None)
    main()
    assert (tmp_path / "sparse" / "release" / "generator.json").exists()
