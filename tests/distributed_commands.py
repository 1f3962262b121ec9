"""Command lines of tests/test_distributed_tools.py, run one after the other in the folder that is given.

They are the same in one process and in several; what each process says to whom is written down.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from dpsyngen.cli import options as cli_options
from dpsyngen.cli.app import main
from dpsyngen.distributed import joined, numbers

EVALUATE = "--test test.npz -n 100 --bootstrap 40 --classifiers logreg,mlp --features pixels-pca,own.py:flat"
COMMANDS = {
    "folder": "sample run --out folder -n 45 --seed 3 --batch-size 8",
    "npz": "sample run/release --out images.npz -n 20 --seed 4 --batch-size 8 --sampler heun --churn 5 --classes 2,0",
    "no seed": "sample run --out no-seed -n 7 --batch-size 2 --json",
    "few": "sample run --out few -n 5 --seed 3",
    "taken": "sample run --out folder -n 5",
    "programs": "programs save dead-leaves --out leaves -n 25 --resolution 16 --shard-size 4 --workers 1",
    "quiet": "programs save dead-leaves --out empty -n 25 --resolution 16 --shard-size 4 --quiet",
    "parquet": "programs save strokes --out tables -n 9 --start 3 --resolution 16 --shard-size 2 --format parquet",
    "finished": "programs save dead-leaves --out leaves -n 25 --resolution 16 --shard-size 4",
    "evaluate": f"evaluate run {EVALUATE}",
    "bad features": "evaluate run -n 100 --classifiers= --features own.py:picky --json",
    "usage": "sample run --nonsense",
    "version": "--version",
    "report": "report run",
    "programs list": "programs list --json",
}


def run(folder: Path) -> dict[str, tuple[int, str, str]]:
    """Run all commands in `folder`; exit code, standard output and standard error of each."""
    os.chdir(folder)
    cli_options._WAIT = 0.0  # these processes do not end when a command does
    said = {}
    for name, line in COMMANDS.items():
        sys.argv = ["dpsyngen", *line.split(" ")]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0
        said[name] = code, out.getvalue(), err.getvalue()
    return said


if __name__ == "__main__":
    target = Path(sys.argv[1])
    with joined():  # a group that all commands find, as a process can found only one
        result = run(target)
    (target / f"said-{numbers()[0]}.json").write_text(json.dumps(result))
