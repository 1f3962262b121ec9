"""The tutorials run, show what they are committed with, and are fit to be published."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent.parent / "docs" / "tutorials"


def _execute() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tutorials_execute", HERE / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = _execute()


def cells(notebook, kind: str, tag: str | None = None) -> list:
    return [c for c in notebook.cells if c.cell_type == kind and (tag is None or tag in c.metadata.get("tags", []))]


SHORTER = {
    # DP-SGD is nine tenths of the time, and of what it does only the length depends on these.
    "own-folder": [("steps=20", "steps=3"), ('"batch": 256', '"batch": 64')],
    "comparing-methods": [("steps: 20, batch: 256", "steps: 3, batch: 64"), ("images: 500", "images: 100")],
    "your-own-loop": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in execute.NAMES])
def test_a_tutorial_runs_and_shows_again_what_it_is_committed_with(name, tmp_path, monkeypatch) -> None:
    """In an empty folder, with fewer steps.  The asserts in its cells hold, or running it raises."""
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent.parent))  # where the package is not installed
    committed = execute.read(name)
    shorter = copy.deepcopy(committed)
    for given, instead in SHORTER[name]:
        (cell,) = (c for c in cells(shorter, "code") if given in c.source)
        cell.source = cell.source.replace(given, instead)
    fresh = execute.run(shorter, tmp_path)
    stable = cells(committed, "code", "stable")
    assert stable
    for before, after in zip(stable, cells(fresh, "code", "stable"), strict=True):
        assert execute.shown(after) == execute.shown(before), before.source
    # A warning of a library in a tutorial is a fault of ours.
    for cell in cells(fresh, "code"):
        for output in cell.outputs:
            assert output.get("name") != "stderr", output.get("text")


def test_all_notebooks_are_run() -> None:
    assert sorted(execute.NAMES) == sorted(p.stem for p in HERE.glob("*.ipynb"))


@pytest.mark.parametrize("name", execute.NAMES)
def test_a_committed_tutorial_is_whole_small_and_of_no_machine(name) -> None:
    notebook, text = execute.read(name), (HERE / f"{name}.ipynb").read_text()
    assert execute.cleaned(notebook) == notebook
    code = cells(notebook, "code")
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), "run docs/tutorials/execute.py"
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert len(text) < 300_000
    assert any("assert " in c.source for c in code)
    for place in (str(HERE.parent.parent), str(Path.home()), sys.prefix, "/tmp/"):
        assert place not in text


@pytest.mark.parametrize("name", execute.NAMES)
def test_links_of_a_tutorial_lead_somewhere(name) -> None:
    import re

    for cell in cells(execute.read(name), "markdown"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", cell.source):
            assert (HERE / target).exists(), target


def test_pictures_are_shown_inline() -> None:
    for name in ("own-folder", "comparing-methods"):
        outputs = [o for c in cells(execute.read(name), "code") for o in c.outputs if "data" in o]
        assert any("image/png" in o.data for o in outputs)


def test_a_fit_in_a_notebook_shows_progress_without_private_figures() -> None:
    fit = next(c for c in cells(execute.read("own-folder"), "code") if "Generator.fit" in c.source)
    (text,) = (o.text for o in fit.outputs if o.get("name") == "stdout")
    assert "run directory: runs/digits" in text
    lines = [line for line in text.splitlines() if line.startswith("context: DP-SGD")]
    assert lines
    assert not [line for line in lines if "loss" in line]


def test_a_changed_output_is_noticed(tmp_path) -> None:
    """What the test above compares is more than nothing."""
    import nbformat

    cell = nbformat.v4.new_code_cell("print(6 * 7)\n6 * 7")
    notebook = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute.run(notebook, tmp_path)
    notebook.cells = [cell]
    assert execute.shown(execute.run(notebook, tmp_path).cells[0]).split() == ["42", "42"]
    notebook.cells = [nbformat.v4.new_code_cell("import os; print(os.getcwd())")]
    with pytest.raises(ValueError, match="of this machine only"):
        execute.run(notebook, tmp_path)
