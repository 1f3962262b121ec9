"""Sampling, programs and evaluation by 3 processes, as those that torchrun starts, against one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsyngen import Generator
from dpsyngen import fit as api
from dpsyngen.privacy.ledger import Ledger
from tests.conftest import TINY_SETTINGS, tiny_arrays
from tests.distributed_commands import COMMANDS
from tests.forked import ended, ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("forked")]

ROOT = Path(__file__).parents[1]
OWN = """
from torch import nn

flat = nn.Flatten()


def picky(images):  # fails in one of several processes: on what is neither tried out nor in the first part
    picky.calls = getattr(picky, "calls", 0) + 1
    if len(images) != 2 and int(__import__("os").environ.get("RANK", "1")) == 1:
        raise ValueError("too picky")
    return images.flatten(1)
"""
Said = list[dict[str, list[Any]]]


def work(count: int, trained: Path, folder: Path) -> tuple[Path, Said]:
    """What so many processes make of all commands, and what each of them says."""
    shutil.copytree(trained, folder)
    with ranks(count, folder.with_name("said"), "tests.distributed_commands", folder) as started:
        assert not any(ended(started)), [each.err[-3000:] for each in started]
    return folder, [json.loads((folder / f"said-{r}.json").read_text()) for r in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its images, test images and features of one's own."""
    folder = tmp_path_factory.mktemp("trained")
    for name, seed in (("data", 0), ("test", 1)):
        images, labels = tiny_arrays(seed)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
    (folder / "own.py").write_text(OWN)
    api.train(folder / "data.npz", epsilon=8, out=folder / "run", settings=TINY_SETTINGS)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    return work(1, trained, tmp_path_factory.mktemp("one") / "work")


@pytest.fixture(scope="module", params=[3])
def together(request, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    return work(request.param, trained, tmp_path_factory.mktemp(f"processes-{request.param}") / "work")


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["folder", "few", "leaves", "tables"])
def test_files_are_those_of_one_process_byte_for_byte(alone, together, name) -> None:
    expected = contents(alone[0] / name)
    assert len(expected) > 1
    assert contents(together[0] / name) == expected


def test_several_processes_fill_an_empty_folder(alone, together) -> None:
    """On a disk of its own, say, which cannot be renamed onto."""
    assert contents(together[0] / "empty") == contents(alone[0] / "leaves")


def test_stochastic_samples_of_chosen_classes_are_those_of_one_process(alone, together) -> None:
    with np.load(alone[0] / "images.npz") as expected, np.load(together[0] / "images.npz") as got:
        assert sorted(expected) == sorted(got)
        assert len(expected["images"]) == 20
        for key in expected:
            np.testing.assert_array_equal(got[key], expected[key], err_msg=key)


def test_without_a_seed_all_processes_use_the_one_that_is_written_down(together) -> None:
    from dpsyngen.data import load_images

    folder, said = together
    seed = json.loads(said[0]["no seed"][1])["seed"]
    assert json.loads((folder / "no-seed" / "about.json").read_text())["seed"] == seed
    drawn = Generator(folder / "run" / "release").sample(7, seed=seed, batch_size=2).images
    written = load_images(folder / "no-seed").images
    assert {x.tobytes() for x in np.asarray(written)} == {x.tobytes() for x in drawn}


def test_figures_are_those_of_one_process(alone, together) -> None:
    one, several = (json.loads((f / "run" / "private" / "metrics.json").read_text()) for f, _ in (alone, together))
    assert set(one["cas"]) == {"logreg", "mlp"}
    assert set(one["features"]) == {"pixels-pca", "own.py:flat"}
    assert several == one


def test_the_ledger_has_one_entry_for_an_evaluation_however_many_processes(alone, together) -> None:
    one, several = (Ledger(f / "run" / "private" / "ledger.jsonl").entries for f, _ in (alone, together))
    assert [(e.kind, e.details) for e in several] == [(e.kind, e.details) for e in one]


def test_features_of_real_images_are_kept_once(alone, together) -> None:
    one, several = ({p.name for p in (f / "run" / "private" / "features").iterdir()} for f, _ in (alone, together))
    assert one
    assert several == one


def test_the_main_process_speaks_as_one_process_would_and_the_others_are_silent(alone, together) -> None:
    for name in set(COMMANDS) - {"no seed", "report", "programs list", "bad features"}:
        code, out, _ = alone[1][0][name]
        assert together[1][0][name][:2] == [code, out], name
        assert out or code, name
        for rank, said in enumerate(together[1][1:], 1):
            assert said[name] == [code, "", ""], (name, rank)


@pytest.mark.parametrize("name", ["taken", "finished", "usage"])
def test_an_error_is_told_once(alone, together, name) -> None:
    assert alone[1][0][name][0] != 0
    assert together[1][0][name][2] == alone[1][0][name][2]


def test_what_goes_wrong_in_another_process_is_told_by_the_main_one_with_its_rank(together) -> None:
    code, out, err = together[1][0]["bad features"]
    assert code == 2
    assert "rank 1" in err
    assert "too picky" in err
    assert "too picky" in json.loads(out)["error"]["message"]
    for said in together[1][1:]:
        assert said["bad features"] == [2, "", ""]


def test_what_is_the_work_of_one_process_is_refused_in_several(alone, together) -> None:
    assert alone[1][0]["report"][0] == 0
    code, out, err = together[1][0]["report"]
    assert (code, out) == (2, "")
    assert "without torchrun" in err
    assert not (together[0] / "run" / "private" / "report.html").exists()
    code, out, _ = together[1][0]["programs list"]
    assert code == 2
    assert "without torchrun" in json.loads(out)["error"]["message"]
    for said in together[1][1:]:
        assert said["report"] == said["programs list"] == [2, "", ""]


def test_the_real_command_line_says_its_result_once(trained, tmp_path) -> None:
    command = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    command += ["-m", "dpsyngen", "sample", str(trained / "run"), "--out", "s", "-n", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "3 images in s\n"
