"""A bundle made here verifies where nothing but the package is: a new virtual environment, in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("DPSYNGEN_LONG") == "1"


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="installs all packages anew, which takes minutes; set DPSYNGEN_LONG=1")
def test_verify_in_a_new_virtual_environment(signed, key, tmp_path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info", "build", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--constraint", source / "constraints.txt"]
    subprocess.run([*pip, "torch", "numpy"], check=True)
    subprocess.run([*pip, source], check=True)
    away = tmp_path / "away"
    away.mkdir()
    for file in (signed, key.with_name("k.pem.pub")):
        shutil.copy(file, away)
    # Neither this checkout nor its data can be found from there.
    environment = {"PATH": os.environ["PATH"], "HOME": str(away), "LANG": "C.UTF-8"}
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "dpsyngen", "verify", signed.name, "--public-key", "k.pem.pub"],
        cwd=away,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The bundle is sound" in done.stdout
    assert "is by the key that was given" in done.stdout
