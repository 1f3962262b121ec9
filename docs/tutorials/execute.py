"""Run the tutorials of this folder and keep what they show: ``python docs/tutorials/execute.py [NAME …]``.

The notebooks are the source.  Each is run in an empty temporary folder by the interpreter that runs this file, and
written back with its outputs, without what changes from machine to machine.  ``tests/test_tutorials.py`` runs them the
same way: cells tagged ``stable`` must show the same text again, and every cell must run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
NAMES = ("own-folder", "comparing-methods", "your-own-loop")
SECONDS = 600  # for one cell, on a machine that has other work, too


def read(name: str) -> NotebookNode:
    """The notebook `name` of this folder."""
    return nbformat.read(HERE / f"{name}.ipynb", as_version=4)


def run(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run all cells of a copy of `notebook` in `folder`, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    fresh = nbformat.from_dict(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        fresh,
        timeout=SECONDS,
        kernel_name="python3",
        extra_arguments=["--IPKernelApp.log_level=40"],  # no warning of sockets that only this process talks to
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    # The kernel is this interpreter, so `!dpsyngen` is to be the command beside it.
    client.execute(env=os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])})
    return cleaned(fresh, folder)


def cleaned(notebook: NotebookNode, folder: Path | None = None) -> NotebookNode:
    """The notebook without what changes from machine to machine, or from one run to the next without a reason.

    Raises:
        ValueError: an output holds the path of `folder` or of this checkout.
    """
    out = nbformat.from_dict(notebook)
    out.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    out.nbformat, out.nbformat_minor = 4, 5
    for number, cell in enumerate(out.cells):
        cell.id = f"cell-{number:02}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    text = nbformat.writes(out)
    for place in (folder, HERE.parent.parent, Path(sys.prefix), Path.home()):
        if place is not None and len(place.parts) > 2 and str(place) in text:
            raise ValueError(f"an output holds the path {place}, which is of this machine only")
    return out


def shown(cell: NotebookNode) -> str:
    """The text that a cell shows: what it printed, then its value."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append(output.text)
        elif "data" in output:
            texts.append(output.data.get("text/plain", ""))
    return "\n".join(texts)


def main(names: list[str]) -> None:
    """Run the named notebooks, or all, and write them."""
    for name in names or NAMES:
        with tempfile.TemporaryDirectory(prefix="tutorial-") as folder:
            done = run(read(name), Path(folder))
        path = HERE / f"{name}.ipynb"
        nbformat.write(done, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
