"""An experiment from its specification to its results: nothing twice, nothing lost, nothing overwritten."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from dpsyngen import fit as api
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.experiments import pool, runner
from dpsyngen.experiments.experiment import Experiment, networks_of
from dpsyngen.experiments.runner import Images, Stopped, Worker
from dpsyngen.experiments.spec import jobs_of, load_spec
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.plan import Shape, stages_of
from tests.forked import Forked

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("experiments")]  # worked once


def made(spec: Path, out: Path) -> Experiment:
    return Experiment.open_or_create(out, load_spec(spec))


def weights(experiment: Experiment, job: str, network: str) -> bytes:
    return (experiment.path / "runs" / job / "release" / "weights" / f"{network}.safetensors").read_bytes()


def test_every_job_gets_a_run_and_a_result(worked) -> None:
    experiment = Experiment(worked)
    assert {s.state for s in experiment.statuses().values()} == {"done"}
    for job in experiment.jobs:
        result = json.loads(experiment.result_path(job).read_text())
        assert result["job"] == job.name
        assert result["private"] is False  # seeded noise
        assert result["epsilon_spent"] <= 3
        assert result["facts"]["steps"] == 6
        assert result["facts"]["private_images_seen"] == 72
        assert result["facts"]["seconds_private"] > 0
        assert sum(m.count for m in Ledger(experiment.run_path(job) / "private" / "ledger.jsonl").mechanisms) == 6
        with np.load(experiment.work_path(job) / "samples.npz") as samples:
            assert samples["images"].shape == (12, 1, 8, 8)
    assert result["facts"]["seconds_public"] > 0  # the last one is Cleaning


def test_all_of_it_is_closed_to_others(worked) -> None:
    experiment = Experiment(worked)
    assert worked.stat().st_mode & 0o077 == 0
    for path in (experiment.path / "results").iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_what_is_done_is_not_done_again(done, tmp_path, monkeypatch) -> None:
    experiment = done
    before = {p: p.stat().st_mtime_ns for p in experiment.path.rglob("*") if p.is_file()}
    monkeypatch.setattr(runner, "Worker", None)
    assert pool.work(Experiment(tmp_path / "x"))
    assert {p: p.stat().st_mtime_ns for p in experiment.path.rglob("*") if p.is_file()} == before


def test_a_specification_may_grow(tiny_spec, done, tmp_path) -> None:
    kept = {p.name: p.read_bytes() for p in (tmp_path / "x" / "results").iterdir()}
    larger = made(tiny_spec(grid={"variant": ["dpdm", "cleaning"], "epsilon": [3], "seeds": 2}), tmp_path / "x")
    assert sorted(s.state for s in larger.statuses().values()) == ["done", "done", "waiting", "waiting"]
    pool.work(larger)
    now = {p.name: p.read_bytes() for p in (tmp_path / "x" / "results").iterdir()}
    assert len(now) == 4
    assert kept.items() <= now.items()


def test_other_settings_for_runs_that_were_begun_are_refused(tiny_spec, done, tmp_path) -> None:
    spec = tiny_spec()
    before = (tmp_path / "x" / "spec.yaml").read_bytes()
    values = yaml.safe_load(spec.read_text())
    values["settings"]["private"]["learning_rate"] = 0.5
    spec.write_text(yaml.safe_dump(values))
    with pytest.raises(RunError, match=r"other settings.*dpdm-eps3-seed0"):
        made(spec, tmp_path / "x")
    assert (tmp_path / "x" / "spec.yaml").read_bytes() == before


def test_runs_draw_as_they_were_begun_so_other_sampling_of_a_variant_is_refused(tiny_spec, done, tmp_path) -> None:
    grid = {"variant": ["dpdm", "cleaning"], "epsilon": [3], "seeds": 2}
    grid["variant_settings"] = {"dpdm": {"sampling.guidance": 3.0}}
    with pytest.raises(RunError, match=r"other settings.*dpdm-eps3-seed0"):
        made(tiny_spec(grid=grid), tmp_path / "x")


def test_own_features_are_found_from_another_working_folder(tiny_spec, tmp_path, monkeypatch) -> None:
    (tmp_path / "own.py").write_text("def mean(x):\n    return x.mean((1, 2))\n")
    features = ["own.py:mean", "package.module:mean", "pixels-pca"]
    measured = {"features": features, "metrics": ["frechet"], "classifiers": []}
    monkeypatch.chdir(tmp_path)
    experiment = made(tiny_spec(evaluation=measured), tmp_path / "x")
    assert experiment.spec.evaluation.features == (f"{tmp_path / 'own.py'}:mean", *features[1:])


def test_own_priors_are_found_from_another_working_folder(tiny_spec, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    grid = {"variant": ["residual", "instant"], "epsilon": [3], "seeds": 1}
    grid["axes"] = {"network.prior": ["own/a.safetensors", "shipped"]}
    asked = tiny_spec(grid=grid)
    experiment = made(asked, tmp_path / "x")
    own = str(tmp_path / "own" / "a.safetensors")
    assert [job.config.network.prior for job in experiment.jobs] == [own, own, "shipped", "shipped"]
    assert [job.name for job in experiment.jobs] == [job.name for job in jobs_of(load_spec(asked))]
    grid["axes"], grid["cases"] = {}, [{"label": "own", "settings": {"network.prior": "a"}, "variants": ["residual"]}]
    grid["cases"].append({"label": "of-variant", "variants": ["instant"]})
    grid["variant_settings"] = {"instant": {"network.prior": "b"}}
    jobs = made(tiny_spec(grid=grid), tmp_path / "y").jobs
    assert [job.config.network.prior for job in jobs] == [str(tmp_path / name) for name in "ab"]
    jobs = made(tiny_spec(settings={"network": {"prior": "c"}}), tmp_path / "z").jobs
    assert {job.config.network.prior for job in jobs} == {str(tmp_path / "c")}


def test_measuring_otherwise_keeps_the_runs_and_the_earlier_figures(tiny_spec, done, tmp_path) -> None:
    experiment, job = done, done.jobs[0]
    before, old = weights(experiment, job.name, "context"), experiment.result_path(job).read_bytes()
    again = made(tiny_spec(sampling={"images": 20, "steps": 2}), tmp_path / "x")
    assert again.status(again.jobs[0]).state != "done"
    pool.work(again)
    assert weights(again, job.name, "context") == before
    assert json.loads(again.result_path(job).read_text())["evaluation"]["protocol"]["generated_images"] == 20
    earlier = list((tmp_path / "x" / "results" / "earlier").glob(f"{job.name}.*.json"))
    assert [p.read_bytes() for p in earlier] == [old]


def test_own_features_that_were_changed_are_measured_again(tiny_spec, tmp_path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def mean(x):\n    return x.mean((1, 2))\n")
    measured = {"features": [f"{own}:mean"], "metrics": ["frechet"], "classifiers": [], "bootstrap": 0}
    grid = {"variant": ["dpdm"], "epsilon": [3], "seeds": 1}
    experiment = made(tiny_spec(grid=grid, evaluation=measured), tmp_path / "x")
    pool.work(experiment)
    assert experiment.status(experiment.jobs[0]).state == "done"
    own.write_text("def mean(x):\n    return 2 * x.mean((1, 2))\n")
    assert experiment.status(experiment.jobs[0]).state != "done"


def test_another_folder_is_not_touched(tiny_spec, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match="not an empty folder"):
        made(tiny_spec(), tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


# ------------------------------------------------------------------------------------- public networks


def test_sharing_public_networks_changes_no_run_by_a_bit(tiny_spec, tmp_path) -> None:
    grid = {"variant": ["finetune", "both"], "epsilon": [3, 5], "seeds": 1}
    experiment = made(tiny_spec(grid=grid), tmp_path / "x")
    pool.work(experiment)
    # Three public networks for four runs, which on their own would have trained six.
    assert len(list((experiment.path / "public").iterdir())) == 3
    for job in (experiment.jobs[-1], experiment.jobs[-2]):
        alone = api.prepare(job.config, tmp_path / job.name)
        for _ in alone.steps():
            pass
        for name in ("context", "cleaning", "coarse"):
            path = alone.run.weights(name)
            if path.exists():
                assert path.read_bytes() == weights(experiment, job.name, name)
        log = (alone.run.release / "public_training.jsonl").read_text()
        assert (experiment.run_path(job) / "release" / "public_training.jsonl").read_text() == log


def test_a_public_network_is_there_for_others_before_the_private_phase_begins(tiny_spec, tmp_path) -> None:
    experiment = made(tiny_spec(grid={"variant": ["cleaning"], "epsilon": [3], "seeds": 1}), tmp_path / "x")
    there: dict[str, bool] = {}

    def tell(job, doing: str, done: int, total: int) -> None:
        if doing.startswith("training") and done == 1:
            there[doing] = any((experiment.path / "public").glob("*/about.json"))

    pool.work(experiment, tell=tell)
    assert there == {"training: cleaning": False, "training: context": True}


def test_networks_of_other_settings_are_not_shared(tiny_spec) -> None:
    grid = {"variant": ["cleaning"], "epsilon": [3, 5], "seeds": 2, "axes": {"stages.tau_cleaning": [-3, -2]}}
    spec = load_spec(tiny_spec(grid=grid))
    shape = Shape(8, 1, ("a", "b", "c"), 60)
    keys = [networks_of(job.config, stages_of(job.config), shape)[0].key for job in jobs_of(spec)]
    assert len(keys) == 2 * len(set(keys)) == 8  # one of each seed and τ, whatever the ε


# ---------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("end", [None, ValueError("no such thing")])
def test_a_signal_near_the_end_of_a_job_stops_the_next_one(tiny_spec, tmp_path, monkeypatch, end) -> None:
    """A job looks for a stop where it tells how far it is; after that, as in the last classifier, it ends first."""
    begun = []

    def do(worker: Worker, job) -> None:
        begun.append(job.name)
        signal.raise_signal(signal.SIGTERM)
        if end is not None:
            raise end

    monkeypatch.setattr(Worker, "do", do)
    experiment = made(tiny_spec(), tmp_path / "x")
    assert len(experiment.jobs) > 1
    assert not pool.work(experiment)
    assert len(begun) == 1


@pytest.mark.parametrize("doing", ["training: cleaning", "training: context", "drawing images"])
def test_a_stopped_job_goes_on_to_the_same_end(tiny_spec, worked, tmp_path, doing) -> None:
    grid = {"variant": ["cleaning"], "epsilon": [3], "seeds": 1}
    whole = Experiment(worked)
    job = whole.jobs[1]
    stopped = made(tiny_spec(grid=grid), tmp_path / "stopped")
    stopped.work_path(job).mkdir()
    worker = Worker(stopped, Images(stopped.spec), "cpu", lambda *a: None)

    def tell(what: str, done: int, total: int) -> None:
        if what == doing and done:
            worker.stop_requested = True

    worker._tell = tell
    with pytest.raises(Stopped):
        worker.do(job)
    assert stopped.status(job).state in ("stopped", "waiting")
    assert not stopped.result_path(job).exists()
    pool.work(stopped)
    for network in ("context", "cleaning"):
        assert weights(stopped, job.name, network) == weights(whole, job.name, network)
    with np.load(whole.work_path(job) / "samples.npz") as a, np.load(stopped.work_path(job) / "samples.npz") as b:
        assert (a["images"] == b["images"]).all()


def test_a_stop_reaches_a_query_that_is_being_read(tiny_spec, tmp_path) -> None:
    """A query of DP moments takes no step: only the training itself can look whether it is to end."""
    grid = {"variant": ["gaussian"], "epsilon": [3], "seeds": 1}
    experiment = made(tiny_spec(grid=grid), tmp_path / "x")
    (job,) = experiment.jobs
    experiment.work_path(job).mkdir()
    worker = Worker(experiment, Images(experiment.spec), "cpu", lambda *a: None)
    worker._tell = lambda doing, done, total: doing == "getting ready" and worker.stop()
    with pytest.raises(Stopped):
        worker.do(job)
    assert not (experiment.run_path(job) / "release" / "generator.json").exists()
    assert pool.work(experiment)


def test_damaged_samples_are_drawn_again(done) -> None:
    experiment, job = done, done.jobs[0]
    path = experiment.work_path(job) / "samples.npz"
    with np.load(path) as file:
        before = file["images"]
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:90] + b"\xff" * 60 + whole[150:]):  # the latter is a zlib.error
        path.write_bytes(damaged)
        experiment.result_path(job).unlink()
        pool.work(experiment)
        with np.load(path) as file:
            assert (file["images"] == before).all()


def test_killed_processes_lose_nothing_and_no_job_is_done_twice(tiny_spec, tmp_path) -> None:
    experiment = made(tiny_spec(), tmp_path / "x")
    killed = Forked(tmp_path, "dpsyngen.experiments.pool", experiment.path, "cpu")
    ledger = experiment.run_path(experiment.jobs[0]) / "private" / "ledger.jsonl"
    deadline = time.monotonic() + 120
    while not ledger.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send(signal.SIGKILL)
    assert killed.code() == -signal.SIGKILL
    assert pool.processes(experiment, 2, "cpu")
    assert {s.state for s in experiment.statuses().values()} == {"done"}
    for job in experiment.jobs:
        charged = Ledger(experiment.run_path(job) / "private" / "ledger.jsonl").mechanisms
        assert sum(m.count for m in charged) == 6


def test_a_job_that_somebody_is_at_is_left_alone(tiny_spec, tmp_path) -> None:
    from dpsyngen.experiments.experiment import claimed

    experiment = made(tiny_spec(), tmp_path / "x")
    job = experiment.jobs[0]
    experiment.work_path(job).mkdir()
    with claimed(experiment.work_path(job) / "lock") as mine:
        assert mine
        assert experiment.status(job).state == "running"
        pool.work(experiment)
        assert not experiment.run_path(job).exists()
    assert experiment.status(job).state == "stopped"


def test_a_failed_job_costs_no_other_and_is_tried_again_when_asked(tiny_spec, tmp_path, monkeypatch) -> None:
    experiment = made(tiny_spec(), tmp_path / "x")
    first, second = experiment.jobs
    real = api.prepare

    def broken(config, out, data, device, on_event):
        if out.name == first.name:
            raise RunError("no such luck with \udcff")  # a file name that is no UTF-8
        return real(config, out, data, device, on_event=on_event)

    monkeypatch.setattr(api, "prepare", broken)
    assert pool.work(experiment)
    assert experiment.status(first).state == "failed"
    assert "no such luck" in experiment.status(first).error
    assert experiment.status(second).state == "done"
    monkeypatch.setattr(api, "prepare", real)
    pool.work(experiment)
    assert experiment.status(first).state == "failed"
    pool.work(experiment, retry=time.time() - 3600)  # as of another process that began an hour ago: it failed since
    assert experiment.status(first).state == "failed"
    pool.work(experiment, retry=time.time())
    assert experiment.status(first).state == "done"


def test_what_failed_to_be_measured_is_tried_again_when_it_is_measured_otherwise(tiny_spec, tmp_path) -> None:
    grid = {"variant": ["dpdm"], "epsilon": [3], "seeds": 1}
    (tmp_path / "own.py").write_text("def broken(x):\n    raise ValueError('no such luck')\n")
    measured = {"features": [f"{tmp_path / 'own.py'}:broken"], "metrics": ["frechet"], "classifiers": []}
    few = made(tiny_spec(grid=grid, evaluation=measured), tmp_path / "x")
    pool.work(few)
    assert "no such luck" in few.status(few.jobs[0]).error
    more = made(tiny_spec(grid=grid, evaluation={**measured, "features": ["pixels-pca"]}), tmp_path / "x")
    pool.work(more)
    assert more.status(more.jobs[0]).state == "done"


def test_too_few_images_to_train_a_classifier_are_refused_before_any_run(tiny_spec, tmp_path) -> None:
    spec = tiny_spec(evaluation={"features": [], "classifiers": ["logreg"]})
    with pytest.raises(ConfigError, match="12 generated images of 3 classes are too few"):
        Images(load_spec(spec))


def test_no_run_is_begun_when_the_computing_time_is_used_up(tiny_spec, tmp_path) -> None:
    experiment = made(tiny_spec(cost={"hours": 1e-9}), tmp_path / "x")
    assert not pool.work(experiment)
    assert sorted(s.state for s in experiment.statuses().values()) == ["done", "waiting"]
