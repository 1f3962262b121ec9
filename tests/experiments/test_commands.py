"""The commands of experiments, what all of its runs cost together, and images that are not those of before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dpsyngen.console import Progress
from dpsyngen.errors import BudgetExceeded, DataError
from dpsyngen.experiments import pool
from dpsyngen.experiments.cost import privacy_cost
from dpsyngen.experiments.experiment import Experiment
from dpsyngen.experiments.runner import Images, Worker
from dpsyngen.experiments.spec import jobs_of, load_spec
from dpsyngen.privacy.budget import Budget, Composition
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.plan import shape_of
from tests.forked import ended, ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("experiments")]  # worked once


# ---------------------------------------------------------------------------------------------- privacy


def test_the_cost_of_all_runs_is_what_their_ledgers_compose_to(tiny_spec, tmp_path) -> None:
    grid = {"variant": ["both"], "epsilon": [3, 8], "seeds": 1}
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
    assert cost.total_epsilon > 8


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


def test_there_is_no_one_ceiling_where_variants_have_programs_of_their_own(tiny_spec) -> None:
    measured = {"features": ["pixels-pca"], "metrics": ["frechet"], "classifiers": [], "bootstrap": 0}
    grid = {"variant": ["dpdm", "cleaning"], "epsilon": [3], "seeds": 1}
    of_all = tiny_spec(evaluation=measured, grid=grid, references=["programs"])
    assert Images(load_spec(of_all)).programs is not None
    grid["variant_settings"] = {"cleaning": {"program.name": "fractal"}}
    assert Images(load_spec(tiny_spec(evaluation=measured, grid=grid, references=["programs"]))).programs is None


# ------------------------------------------------------------------------------------- the command line


def test_the_command_runs_all_and_says_where_the_figures_are(tiny_spec, tmp_path, call, monkeypatch) -> None:
    monkeypatch.setattr(Progress, "every", 0.0)
    measured = {"features": ["pixels-pca"], "metrics": ["frechet"], "classifiers": ["logreg"], "bootstrap": 0}
    grid = {"variant": ["dpdm", "cleaning"], "epsilon": [3], "seeds": 2}
    sampling = {"images": 60, "steps": 2}
    spec = tiny_spec(evaluation=measured, grid=grid, sampling=sampling, references=["real", "programs"])
    code, out, err = call("compare", spec, "--out", tmp_path / "x")
    assert code == 0, out + err
    assert "5/6 jobs" in err  # also before one that trains nothing
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


def test_the_dry_run_measures_with_the_threads_that_a_process_will_have(tiny_spec, monkeypatch, call) -> None:
    import torch

    seen = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(
        "dpsyngen.experiments.cost.estimate", lambda *_: seen.append(torch.get_num_threads()) or {"public": 1.0}
    )
    before = torch.get_num_threads()
    assert call("compare", tiny_spec(), "--dry-run", "--processes", 2)[0] == 0
    assert (seen, torch.get_num_threads()) == ([3], before)


def test_the_dry_run_needs_no_images_where_the_specification_has_the_facts(tiny_spec, tmp_path, call) -> None:
    facts = {"records": 60, "resolution": 8, "channels": 1, "classes": 3}
    data = {"train": str(tmp_path / "none.npz"), "test": str(tmp_path / "none.npz")}
    assert call("compare", tiny_spec(data={**data, "facts": facts}), "--dry-run")[0] == 0
    code, _, err = call("compare", tiny_spec(data={**data, "facts": facts}), "--dry-run", "--data", tmp_path / "gone")
    assert code == 2
    assert "gone" in err
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
    # Images that are given stand in for those of the specification: nothing is said of them there.
    given = ("--data", tiny_data / "train.npz", "--dry-run")
    assert call("compare", tiny_spec(data={**data, "train": "mnist", "facts": facts}), *given)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["none.yaml", "--out", "x"], "no file"),
        (["SPEC"], "--out is missing"),
        (["SPEC", "--out", "x", "--processes", "0"], "--processes"),
        (["SPEC", "--out", "x", "--device", "nonsense"], "device"),
        (["SPEC", "--out", "x", "--tables"], "not the folder of an experiment"),
        (["SPEC", "--out", "x", "--tables", "--data", "none.npz"], "leave out --data"),
        (["SPEC", "--out", "x", "--tables", "--test", "none.npz"], "leave out --data"),
        (["SPEC", "--out", "x", "--tables", "--retry"], "leave out --data"),
        (["SPEC", "--out", "x", "--tables", "--dry-run"], "leave out --data"),
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
    spec = tiny_spec(grid={"variant": ["dpdm", "cleaning"], "epsilon": [3], "seeds": 1})
    command = ["compare", spec, "--out", tmp_path / "x", "--quiet", "--json"]
    with ranks(2, tmp_path, "dpsyngen", *command) as started:
        assert not any(ended(started)), [each.err[-3000:] for each in started]
        said = json.loads("".join(each.out for each in started))  # one document, of one process
    assert {s.state for s in Experiment(tmp_path / "x").statuses().values()} == {"done"}
    assert (tmp_path / "x" / "report.html").exists()
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
