"""What a notebook shows while work goes on, and its stop button."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpsyngen.console import Console, in_notebook
from tests.conftest import TINY_SETTINGS

pytestmark = pytest.mark.slow


def test_a_notebook_has_a_bar_where_it_can_show_one(monkeypatch) -> None:
    class Shell:
        kernel: Any = None

    monkeypatch.setattr("IPython.get_ipython", lambda: Shell())
    assert not in_notebook()  # IPython in a terminal
    monkeypatch.setattr(Shell, "kernel", object())
    assert in_notebook()
    for found, bar in ((object(), True), (None, False)):
        monkeypatch.setattr("dpsyngen.console.find_spec", lambda name, found=found: found)
        assert Console().live is bar
        assert not Console(quiet=True).live


def test_nobody_needs_ipython() -> None:
    code = """
import sys
sys.modules["IPython"] = None  # as if it were not installed
import numpy as np
from dpsyngen.console import in_notebook
from dpsyngen.generator.samples import Samples
assert not in_notebook()
print(Samples(np.zeros((1, 1, 8, 8), np.uint8), None, (), {})._repr_html_()[:6])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "<table"


ROOT = Path(__file__).resolve().parents[2]

FIT = f"""
import numpy as np
import dpsyngen
rng = np.random.default_rng(0)
images, labels = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 3
settings = {TINY_SETTINGS!r}
settings["private"] |= {{"steps": 2000, "checkpoint_every": 1000}}
generator = dpsyngen.Generator.fit(images, labels, epsilon=4, settings=settings, out="run")
"""
LOOK = """
from dpsyngen.fit import prepare_resume
training = prepare_resume("run", (images, labels))
steps = iter(training.steps())
first = next(steps)
print("goes on with step", first.step, "of", first.steps, first.phase)
steps.close()
"""


def test_the_stop_button_of_a_notebook_ends_a_fit_with_a_checkpoint(tmp_path, monkeypatch) -> None:
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path), extra_arguments=["--quiet"])
    outputs: list[str] = []
    try:
        # what follows the interruption is asked at once: a kernel that stops on errors would drop it
        asked = client.execute(FIT, stop_on_error=False)
        log, deadline = tmp_path / "run" / "private" / "training.jsonl", time.monotonic() + 120
        while not (log.exists() and log.read_bytes().count(b"\n") > 3):  # some steps on private images
            assert time.monotonic() < deadline
            time.sleep(0.1)
        manager.interrupt_kernel()
        while (message := client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] != asked:
            pass  # the answer to what was asked while the kernel started
        reply = message["content"]
        assert reply.get("ename") == "Interrupted", reply
        advice = "go on with: Generator.resume('run', images, labels)"
        assert reply["evalue"] == f"training was interrupted; nothing is lost: {advice}"

        def keep(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                outputs.append(message["content"]["text"])

        taken = log.read_bytes().count(b"\n")
        looked = client.execute_interactive(LOOK, timeout=120, output_hook=keep)
        assert looked["content"]["status"] == "ok", looked["content"]
        assert f"goes on with step {taken + 1} of 2000 context" in "".join(outputs)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
