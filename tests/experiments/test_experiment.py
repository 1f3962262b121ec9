"""An experiment from its specification to its results: nothing twice, nothing lost, nothing overwritten."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from dpsyngen import fit as api
from dpsyngen.errors import BudgetExceeded, DataError, RunError
from dpsyngen.experiments import pool, runner
from dpsyngen.experiments.cost import privacy_cost
from dpsyngen.experiments.experiment import Experiment, networks_of
from dpsyngen.experiments.runner import Images, Stopped, Worker
from dpsyngen.experiments.spec import jobs_of, load_spec
from dpsyngen.privacy.budget import Budget, Composition
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.plan import Shape, shape_of, stages_of

pytestmark = pytest.mark.slow


def made(spec: Path, out: Path) -> Experiment:
    return Experiment.open_or_create(out, load_spec(spec))


def weights(experiment: Experiment, job: str, network: str) -> bytes:
    return (experiment.path / "runs" / job / "release" / "weights" / f"{network}.safetensors").read_bytes()


def test_every_job_gets_a_run_and_a_result(worked) -> None:
    experiment = Experiment(worked)
    assert {s.state for s in experiment.statuses().values()} == {"done"}
    for job in experiment.jobs:
        result = json.loads(experiment.result_path(job).read_text())
        assert (result["job"], result["variant"], result["epsilon"], result["seed"]) == (job.name, job.variant, 3.0, 0)
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
    path.write_bytes(path.read_bytes()[:100])
    experiment.result_path(job).unlink()
    pool.work(experiment)
    with np.load(path) as file:
        assert (file["images"] == before).all()


def test_killed_processes_lose_nothing_and_no_job_is_done_twice(tiny_spec, tmp_path) -> None:
    experiment = made(tiny_spec(), tmp_path / "x")
    command = [sys.executable, "-m", "dpsyngen.experiments.pool", str(experiment.path), "cpu"]
    killed = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ledger = experiment.run_path(experiment.jobs[0]) / "private" / "ledger.jsonl"
    deadline = time.monotonic() + 120
    while not ledger.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert pool.processes(experiment, 2, "cpu", retry=False)
    assert {s.state for s in experiment.statuses().values()} == {"done"}
    for job in experiment.jobs:
        charged = Ledger(experiment.run_path(job) / "private" / "ledger.jsonl").mechanisms
        assert sum(m.count for m in charged) == 6


def test_a_job_that_somebody_is_at_is_left_alone(tiny_spec, tmp_path) -> None:
    from dpsyngen.experiments.experiment import claimed

    experiment = made(tiny_spec(), tmp_path / "x")
    job = experiment.jobs[0]
    experiment.work_path(job).mkdir()
    with claimed(experiment.work_path(job) / "lock"):
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
            raise RunError("no such luck")
        return real(config, out, data, device, on_event=on_event)

    monkeypatch.setattr(api, "prepare", broken)
    assert pool.work(experiment)
    assert experiment.status(first).state == "failed"
    assert "no such luck" in experiment.status(first).error
    assert experiment.status(second).state == "done"
    monkeypatch.setattr(api, "prepare", real)
    pool.work(experiment)
    assert experiment.status(first).state == "failed"
    pool.work(experiment, retry=True)
    assert experiment.status(first).state == "done"


def test_what_failed_to_be_measured_is_tried_again_when_it_is_measured_otherwise(tiny_spec, tmp_path) -> None:
    grid = {"variant": ["dpdm"], "epsilon": [3], "seeds": 1}
    measured = {"features": [], "classifiers": ["logreg"]}
    few = made(tiny_spec(grid=grid, evaluation=measured), tmp_path / "x")
    pool.work(few)
    assert "too few" in few.status(few.jobs[0]).error
    more = made(tiny_spec(grid=grid, evaluation=measured, sampling={"images": 60, "steps": 2}), tmp_path / "x")
    pool.work(more)
    assert more.status(more.jobs[0]).state == "done"


def test_no_run_is_begun_when_the_computing_time_is_used_up(tiny_spec, tmp_path) -> None:
    experiment = made(tiny_spec(cost={"hours": 1e-9}), tmp_path / "x")
    assert not pool.work(experiment)
    assert sorted(s.state for s in experiment.statuses().values()) == ["done", "waiting"]


# ---------------------------------------------------------------------------------------------- privacy


def test_the_cost_of_all_runs_is_what_their_ledgers_compose_to(tiny_spec, tmp_path) -> None:
    grid = {"variant": ["both"], "epsilon": [1, 3], "seeds": 1}
    spec = load_spec(tiny_spec(grid=grid, noise="system"))
    jobs = jobs_of(spec)
    images = Images(spec)
    cost = privacy_cost(spec, jobs, shape_of(images.train, jobs[0].config))
    experiment = Experiment.open_or_create(tmp_path / "x", spec)
    pool.work(experiment)
    ledgers = [Ledger(experiment.run_path(job) / "private" / "ledger.jsonl") for job in jobs]
    assert all(ledger.secure for ledger in ledgers)
    composed = Composition.of(ledgers).epsilon()
    assert cost.runs == 2
    assert cost.total_epsilon == pytest.approx(composed, rel=1e-6)
    assert cost.total_epsilon > 3


def test_more_than_the_specification_allows_is_refused_before_anything_is_made(tiny_spec, tmp_path, call) -> None:
    spec = tiny_spec(noise="system", cost={"total_epsilon": 3.5})
    loaded = load_spec(spec)
    jobs = jobs_of(loaded)
    with pytest.raises(BudgetExceeded, match=r"above cost\.total_epsilon = 3\.5"):
        privacy_cost(loaded, jobs, shape_of(Images(loaded).train, jobs[0].config))
    code, _, err = call("compare", spec, "--out", tmp_path / "x")
    assert code != 0
    assert "total_epsilon" in err
    assert not (tmp_path / "x").exists()


def test_runs_that_a_specification_has_dropped_still_count(tiny_spec, tmp_path, call) -> None:
    def spec(label: str, **cost: float) -> Path:
        cases = [{"label": label, "settings": {"private.learning_rate": 0.01 if label == "a" else 0.02}}]
        grid = {"variant": ["dpdm"], "epsilon": [3], "seeds": 1, "cases": cases}
        return tiny_spec(noise="system", grid=grid, cost=cost)

    assert call("compare", spec("a", total_epsilon=3.01), "--out", tmp_path / "x")[0] == 0
    code, _, err = call("compare", spec("b", total_epsilon=3.01), "--out", tmp_path / "x")
    assert code != 0
    assert "the 2 private runs" in err
    assert len(list((tmp_path / "x" / "runs").iterdir())) == 1
    assert call("compare", spec("b", total_epsilon=9), "--out", tmp_path / "x")[0] == 0
    ledgers = [Ledger(run / "private" / "ledger.jsonl") for run in (tmp_path / "x" / "runs").iterdir()]
    stated = Experiment(tmp_path / "x").about["privacy"]
    assert stated["earlier"] == 1
    assert stated["total_epsilon"] == pytest.approx(Composition.of(ledgers).epsilon(), rel=1e-6)


def test_every_run_reserves_in_a_budget_file(tiny_spec, tmp_path, call) -> None:
    budget = Budget.create(tmp_path / "b", epsilon_limit=10, delta=1e-2)
    spec = tiny_spec(noise="system", cost={"budget_file": str(budget.path)})
    code, _, err = call("compare", spec, "--out", tmp_path / "x")
    assert code == 0, err
    assert len(Budget(budget.path).charges) == 2
    assert Budget(budget.path).epsilon() > 3
    # Once more, with what is reserved already: nothing new is asked for.
    assert call("compare", spec, "--out", tmp_path / "x")[0] == 0


def test_an_experiment_that_does_not_fit_into_a_budget_file_is_refused_whole(tiny_spec, tmp_path, call) -> None:
    budget = Budget.create(tmp_path / "b", epsilon_limit=3.5, delta=1e-2)
    spec = tiny_spec(noise="system", cost={"budget_file": str(budget.path)})
    code, _, err = call("compare", spec, "--out", tmp_path / "x")
    assert code != 0
    assert "all 2 runs" in err
    assert not (tmp_path / "x").exists()
    assert not Budget(budget.path).charges


# ------------------------------------------------------------------------------------- the command line


def test_the_command_runs_all_and_says_where_the_figures_are(tiny_spec, tmp_path, call) -> None:
    measured = {"features": ["pixels-pca"], "metrics": ["frechet"], "classifiers": ["logreg"], "bootstrap": 0}
    grid = {"variant": ["dpdm", "cleaning"], "epsilon": [3], "seeds": 2}
    sampling = {"images": 60, "steps": 2}
    spec = tiny_spec(evaluation=measured, grid=grid, sampling=sampling, references=["real", "programs"])
    code, out, err = call("compare", spec, "--out", tmp_path / "x")
    assert code == 0, out + err
    assert "PRIVATE" in out
    assert (tmp_path / "x" / "report.html").exists()
    assert (tmp_path / "x" / "results.csv").exists()
    assert (tmp_path / "x" / "tables.md").exists()
    code, out, _ = call("compare", tmp_path / "x", "--tables")
    assert code == 0
    assert "Cleaning" in out


def test_the_dry_run_makes_nothing_and_says_what_it_would_cost(tiny_spec, tmp_path, call) -> None:
    code, out, err = call("compare", tiny_spec(noise="system"), "--out", tmp_path / "x", "--dry-run")
    assert code == 0, err
    assert not (tmp_path / "x").exists()
    assert "2 runs" in out
    assert "would cost ε = " in out
    assert "time         about " in out


def test_the_dry_run_needs_no_images_where_the_specification_has_the_facts(tiny_spec, tmp_path, call) -> None:
    facts = {"records": 60, "resolution": 8, "channels": 1, "classes": 3}
    data = {"train": str(tmp_path / "none.npz"), "test": str(tmp_path / "none.npz")}
    assert call("compare", tiny_spec(data={**data, "facts": facts}), "--dry-run")[0] == 0
    code, _, err = call("compare", tiny_spec(data=data), "--dry-run")
    assert code != 0
    assert "none.npz" in err


def test_data_that_is_not_what_the_specification_says_is_refused(tiny_spec, tiny_data, tmp_path, call) -> None:
    data = {"train": str(tiny_data / "train.npz"), "test": str(tiny_data / "test.npz")}
    facts = {"records": 70, "resolution": 8, "channels": 1, "classes": 3}
    code, _, err = call("compare", tiny_spec(data={**data, "facts": facts}), "--out", tmp_path / "x")
    assert code != 0
    assert "records 60 instead of 70" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["none.yaml", "--out", "x"], "no file"),
        (["SPEC"], "--out is missing"),
        (["SPEC", "--out", "x", "--processes", "0"], "--processes"),
        (["SPEC", "--out", "x", "--device", "nonsense"], "device"),
        (["SPEC", "--out", "x", "--tables"], "not the folder of an experiment"),
        (["SPEC", "--out", "x", "--data", "none.npz"], "none.npz"),
    ],
)
def test_a_wrong_argument_is_named(tiny_spec, tmp_path, call, monkeypatch, arguments, word) -> None:
    spec = tiny_spec()
    monkeypatch.chdir(tmp_path)
    code, _, err = call("compare", *[spec if a == "SPEC" else a for a in arguments])
    assert code != 0
    assert word in err
    assert not (tmp_path / "x").exists()


def test_ranks_of_torchrun_share_the_jobs(tiny_spec, tmp_path) -> None:
    torchrun = shutil.which("torchrun", path=str(Path(sys.executable).parent))
    if torchrun is None:
        pytest.skip("there is no torchrun beside this Python")
    grid = {"variant": ["dpdm", "cleaning"], "epsilon": [3], "seeds": 1}
    command = [
        torchrun,
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dpsyngen",
        "compare",
        str(tiny_spec(grid=grid)),
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "x"), "--quiet", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {s.state for s in Experiment(tmp_path / "x").statuses().values()} == {"done"}
    assert (tmp_path / "x" / "report.html").exists()
    said = json.loads(done.stdout)  # one document, of one process
    assert (said["done"], said["left"]) == (said["jobs"], [])


def test_figures_of_other_images_are_not_pooled(done, tiny_data, tmp_path, call, monkeypatch) -> None:
    """Images are what they are: copies in another place go on, and others in the same place are refused."""
    data = shutil.copytree(tiny_data, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    given = ("compare", done.path, "-q")
    code, _, err = call(*given, "--data", "copy/train.npz", "--test", "copy/test.npz")
    assert code == 0, err
    monkeypatch.chdir("/")
    again = Experiment(done.path)
    assert again.spec.data.train == str(data / "train.npz")
    assert {s.state for s in again.statuses().values()} == {"done"}
    kept = {path: path.read_bytes() for path in done.path.rglob("*.json")}
    for what, other in (("train", "test"), ("test", "train")):
        shutil.copy(tiny_data / f"{other}.npz", data / f"{what}.npz")
        code, _, err = call(*given)
        assert code == 2
        assert f"the {what}" in err
        assert "must not be pooled" in err
        shutil.copy(tiny_data / f"{what}.npz", data)
    assert {path: path.read_bytes() for path in done.path.rglob("*.json")} == kept


def test_all_test_images_there_were_are_remembered(done, tiny_data) -> None:
    """Other ones that are asked for are measured anew; none that changed since are taken for what they were."""
    images = Images(done.spec)
    other = done.spec.model_copy(update={"data": done.spec.data.model_copy(update={"test": "/other.npz"})})
    again = Experiment.open_or_create(done.path, other)
    again.pin(other, images.train, images.train)
    assert "done" not in {s.state for s in again.statuses().values()}
    done.pin(done.spec, images.train, images.test)
    assert {s.state for s in done.statuses().values()} == {"done"}
    for spec, changed in ((done.spec, images.train), (other, images.test)):
        with pytest.raises(DataError, match="the test images in"):
            done.pin(spec, images.train, changed)


def test_a_finished_run_on_other_images_is_not_measured(done, tiny_data) -> None:
    """Also where the experiment no longer knows which images it is of."""
    data = done.spec.data.model_copy(update={"train": str(tiny_data / "test.npz")})
    worker = Worker(done, Images(done.spec.model_copy(update={"data": data})), "cpu", lambda *said: None)
    with pytest.raises(DataError, match="was trained on other images"):
        worker.do(done.jobs[0])
