"""The processes that work together: shares, messages, and what goes between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpsyngen.distributed import ALONE, Ranks, joined, numbers
from dpsyngen.errors import ConfigError, DataError
from dpsyngen.hardware import Facts, Gpu, device_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [0, 1, 5, 64])
def test_shares_are_all_of_it_without_overlap_and_even(count, total) -> None:
    shares = [Ranks(r, count).share(total) for r in range(count)]
    assert [i for s in shares for i in range(s.start, s.stop)] == list(range(total))
    sizes = [s.stop - s.start for s in shares]
    assert max(sizes) - min(sizes) <= 1


def test_alone_everything_is_itself_and_nothing_is_started() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    with joined() as ranks:
        assert ranks is ALONE
        assert ranks.gather(3) == [3]
        assert ranks.from_main("x") == "x"
        assert all(a is b for a, b in zip(ranks.sum_to_main(tensors), tensors, strict=True))
        assert ranks.sum_everywhere(tensors[0]) is tensors[0]
        with ranks.leading(), ranks.lead("step", step=1):
            pass
        with pytest.raises(DataError, match="bad"):
            ranks.agree(lambda: (_ for _ in ()).throw(DataError("bad")))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("name", "value"), [("RANK", "two"), ("RANK", "4"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1")])
def test_a_strange_environment_is_refused(monkeypatch, name, value) -> None:
    for k, v in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", name: value}.items():
        monkeypatch.setenv(k, v)
    with pytest.raises(ConfigError, match="torchrun"):
        numbers()


def test_each_process_gets_the_gpu_of_its_number(monkeypatch) -> None:
    gpu = Gpu("NVIDIA A100", (8, 0), 2**36)
    monkeypatch.setattr("dpsyngen.hardware.find", lambda: Facts((gpu, gpu), "cuda"))
    assert device_of("cuda", Ranks(3, 4, 1)) == "cuda:1"
    assert device_of("cuda:1", ALONE) == "cuda:1"
    assert device_of("cpu", Ranks(3, 4, 1)) == "cpu"
    with pytest.raises(ConfigError, match="nproc-per-node 2"):
        device_of("cuda", Ranks(2, 4, 2))
    with pytest.raises(ConfigError, match="use --device cuda"):
        device_of("cuda:0", Ranks(1, 2, 1))
    monkeypatch.setattr("dpsyngen.hardware.find", lambda: Facts((), "cuda"))
    with pytest.raises(ConfigError, match="Choose auto or cpu"):
        device_of("cuda", Ranks(1, 2, 1))


WORKER = """
import json, sys, torch
from dpsyngen.distributed import Dismissed, END, joined
from dpsyngen.errors import DataError, RunError

said = {}
with joined() as ranks:
    r = ranks.rank
    said["gather"] = ranks.gather(10 + r)
    said["from_main"] = ranks.from_main({"rank": r})
    said["to_main"] = ranks.gather_to_main(r)
    sums = ranks.sum_to_main([torch.full((2, 2), float(r + 1)), torch.arange(3.0)])
    said["sums"] = [s.tolist() for s in sums] if ranks.main else None
    whole = ranks.sum_to_main([torch.tensor([2**40 + r])])
    said["whole"] = whole[0].tolist() if ranks.main else None
    said["everywhere"] = ranks.sum_everywhere(torch.tensor([r], dtype=torch.int64)).tolist()
    mine = [torch.full((2,), float(r)), torch.full((1, 1), float(r))]
    ranks.copy_from_main(mine)
    said["copied"] = [t.flatten().tolist() for t in mine]
    try:
        ranks.agree(lambda: 1 / 1 if r != 1 else (_ for _ in ()).throw(DataError("no such file")))
    except (RunError, Dismissed, DataError) as error:
        said["agree"] = f"{type(error).__name__}: {error}"
# Again, and this time the main one leads and fails.
try:
    with joined() as ranks:
        if ranks.main:
            with ranks.leading():
                ranks.tell("something", value=3)
                raise DataError("it went wrong")
        while (command := ranks.next_command()).name != END:
            said["command"] = command.name, command.values
except (DataError, Dismissed) as error:
    said["failed"] = f"{type(error).__name__}: {error}"
with joined() as ranks:  # and once more, to the end
    if ranks.main:
        with ranks.leading():
            pass
    else:
        said["end"] = ranks.next_command().name
json.dump(said, open(f"{sys.argv[1]}/{r}.json", "w"))
"""


def test_what_processes_tell_each_other(tmp_path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(tmp_path / "worker.py"), str(tmp_path)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    main, other = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    assert main["gather"] == other["gather"] == [10, 11]
    assert main["from_main"] == other["from_main"] == {"rank": 0}
    assert main["to_main"] == [0, 1]
    assert other["to_main"] is None
    assert main["sums"] == [[[3.0, 3.0], [3.0, 3.0]], [0.0, 2.0, 4.0]]
    assert main["whole"] == [2**41 + 1]
    assert main["everywhere"] == other["everywhere"] == [1]
    assert main["copied"] == other["copied"] == [[0.0, 0.0], [0.0]]
    assert main["agree"] == "RunError: in the process of rank 1 (of 2): no such file"
    assert other["agree"] == "Dismissed: no such file"
    assert other["command"] == ["something", {"value": 3}]
    assert main["failed"] == "DataError: it went wrong"
    assert other["failed"] == "Dismissed: DataError: it went wrong"
    assert other["end"] == "end"
