"""What a run writes down about its steps: the fields, what is in which half, and that no clock reaches the release."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from dpsyngen import fit as api
from dpsyngen.config import load_config
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.training.log import CLOCK, JsonLines, OnEvent, ignore
from dpsyngen.training.pipeline import Training
from dpsyngen.training.run import Run

DOCUMENT = Path(__file__).parents[2] / "docs" / "logging.md"


def begin(settings: dict, out: Path, data, on_event: OnEvent = ignore, **sections: dict) -> Training:
    merged = {k: {**settings.get(k, {}), **sections.get(k, {})} for k in {*settings, *sections}}
    merged["privacy"] = {"epsilon": 8, "insecure_seed": 7, **merged.get("privacy", {})}
    return api.prepare(load_config(merged), out, data, on_event=on_event)


def finish(training: Training) -> Training:
    for _ in training.steps():
        pass
    return training


def clock(run: Run) -> list[dict]:
    return JsonLines(run.private / CLOCK, 0o600).read()


def documented(title: str) -> set[str]:
    """Names in the first column of the table under a heading of docs/logging.md."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n### {title}\n", 1)[1].split("\n#", 1)[0]
    return {name for row in re.findall(r"^\| (`[^|]+) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}


def test_every_figure_is_documented_and_no_other(tmp_path, tiny_settings, tiny_images) -> None:
    runs = [
        finish(begin(tiny_settings, tmp_path / n, tiny_images(), stages={"variant": "both", "networks": n}))
        for n in ("experts", "shared")
    ]
    private = {k for t in runs for line in t.private_log.read() for k in line}
    public = {k for t in runs for line in t.public_log.read() for k in line}
    times = {k for t in runs for line in clock(t.run) for k in line}
    assert private == documented("private/training.jsonl")
    assert public == documented("release/public_training.jsonl")
    assert times == documented("private/timing.jsonl")
    assert not (private | public) & (times - {"phase", "step"})


def test_figures_mean_what_they_say(tmp_path, tiny_settings, tiny_images) -> None:
    training = finish(
        begin(
            tiny_settings,
            tmp_path / "r",
            tiny_images(),
            stages={"variant": "cleaning"},
            private={"warmup": 2, "schedule": "cosine", "learning_rate": 0.01},
        )
    )
    log, m = training.private_log.read(), training.plan.mechanism
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["epsilon"] == Ledger(training.run.ledger_path).epsilon()
    assert [line["epsilon"] for line in log] == sorted({line["epsilon"] for line in log})
    assert [line["epochs"] for line in log] == pytest.approx([s * 12 / 60 for s in range(1, 7)])
    assert log[0]["learning_rate"] == pytest.approx(0.01 / 3)
    assert log[3]["learning_rate"] == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * 3 / 6)))
    for line in log:
        noise = m.noise_multiplier * m.clipping_norm * math.sqrt(training.parameters) / 12
        assert line["noise_norm"] == pytest.approx(noise)
        assert line["noise_to_signal"] == pytest.approx(noise / line["gradient_norm"])
        # Each image's part is at most C.
        assert 0 < line["gradient_norm"] <= m.clipping_norm * line["examples"] / 12 * (1 + 1e-6)
    assert [line["images"] for line in training.public_log.read()] == [4, 8, 12]
    for line in clock(training.run):
        assert line["seconds"] > 0
        assert line["time"] > 1.7e9
    phases = [line["phase"] for line in clock(training.run)]
    assert phases == ["cleaning"] * 3 + ["context"] * 6


def test_empty_batch_and_no_privacy_are_strict_json(tmp_path, tiny_settings, tiny_images) -> None:
    def strictly(path: Path) -> list[dict]:
        def refuse(word: str) -> None:
            raise AssertionError(word)

        return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]

    empty = finish(
        begin(
            tiny_settings, tmp_path / "a", tiny_images(), private={"batch": 1, "steps": 12}, stages={"variant": "dpdm"}
        )
    )
    lines = [v for v in strictly(empty.private_log.path) if not v["examples"]]
    assert lines
    assert all(v["gradient_norm"] == 0 and "noise_to_signal" not in v for v in lines)
    free = finish(
        begin(tiny_settings, tmp_path / "b", tiny_images(), privacy={"epsilon": math.inf}, stages={"variant": "dpdm"})
    )
    assert {v["epsilon"] for v in strictly(free.private_log.path)} == {"inf"}
    assert {v["epsilon"] for v in free.private_log.read()} == {math.inf}
    free.private_log.append(phase="x", step=1, loss=math.nan, low=-math.inf)
    assert strictly(free.private_log.path)[-1] == {"phase": "x", "step": 1, "loss": "nan", "low": "-inf"}
    last = free.private_log.read()[-1]
    assert math.isnan(last["loss"])
    assert last["low"] == -math.inf


def test_release_is_the_same_bytes_twice_and_public_figures_do_not_depend_on_the_data(
    tmp_path, tiny_settings, tiny_images
) -> None:
    def made(name: str, data: int, **sections: dict) -> dict[str, bytes]:
        run = finish(
            begin(tiny_settings, tmp_path / name, tiny_images(data), stages={"variant": "both"}, **sections)
        ).run
        return {str(p.relative_to(run.release)): p.read_bytes() for p in sorted(run.release.rglob("*")) if p.is_file()}

    first = made("a", 0)
    assert made("b", 0) == first
    assert made("c", 0, logging={"tensorboard": True}) == first
    other = made("d", 1)
    assert other["public_training.jsonl"] == first["public_training.jsonl"]
    assert other["weights/context.safetensors"] != first["weights/context.safetensors"]


def test_resumed_run_has_each_step_once_in_each_log(tmp_path, tiny_settings, tiny_images) -> None:
    training = begin(tiny_settings, tmp_path / "r", tiny_images(), stages={"variant": "dpdm"})
    for report in training.steps():
        if report.step == 5:  # the checkpoint is of step 4
            break
    del training
    training = finish(api.prepare_resume(tmp_path / "r", tiny_images()))
    for lines in (training.private_log.read(), clock(training.run)):
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert (training.run.private / CLOCK).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["training.jsonl", CLOCK])
def test_log_that_cannot_be_written_stops_the_run_which_can_be_resumed(
    name, tmp_path, tiny_settings, tiny_images, monkeypatch
) -> None:
    """Never silently: a step whose line is missing would look like a step that was not taken."""
    whole = finish(begin(tiny_settings, tmp_path / "whole", tiny_images(), stages={"variant": "dpdm"})).run
    real = JsonLines.append

    def full(self: JsonLines, **values: object) -> None:
        if self.path.name == name and values["step"] == 4:
            raise OSError(28, "No space left on device", str(self.path))
        real(self, **values)

    training = begin(tiny_settings, tmp_path / "r", tiny_images(), stages={"variant": "dpdm"})
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", full)
        with pytest.raises(OSError, match="No space"):
            finish(training)
    del training
    run = finish(api.prepare_resume(tmp_path / "r", tiny_images())).run
    for file in ("release/weights/context.safetensors", "release/privacy.json", "private/training.jsonl"):
        assert (run.path / file).read_bytes() == (whole.path / file).read_bytes()
