"""One process of an experiment; started by :func:`dpsyngen.experiments.pool.processes`."""

from __future__ import annotations

import sys
from pathlib import Path

from dpsyngen.errors import DpsyngenError


def main() -> None:
    """``python -m dpsyngen.experiments.worker EXPERIMENT DEVICE [--retry]``"""
    from dpsyngen.experiments.experiment import Experiment
    from dpsyngen.experiments.pool import STOPPED, work

    path, device, *rest = sys.argv[1:]
    try:
        finished = work(Experiment(Path(path)), device, retry="--retry" in rest)
    except DpsyngenError as error:
        print(f"dpsyngen: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if finished else STOPPED)


if __name__ == "__main__":
    main()
