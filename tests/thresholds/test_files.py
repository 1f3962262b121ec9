"""What `dpsyngen stages` says of its figures: stages as words and settings, and where the teacher is no measure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpsyngen.config import load_config
from dpsyngen.thresholds.files import StagesResult, stage_lines, stages_yaml, teacher_line
from dpsyngen.thresholds.gap import Elbow, GapCurve, log_sigma_grid
from dpsyngen.thresholds.search import Measured, StandInElbows

U = np.array(log_sigma_grid(0.02))


def elbow(side: Any, tau: float | None, found: float = 1.0) -> Elbow:
    ends = (None, None) if tau is None else (tau - 0.1, tau + 0.1)
    return Elbow(side, "tolerance", tau, *ends, found, 0.05, "" if tau is not None else "the gap is 9 %")


def test_networks_behind_the_wiener_filter_are_no_measure() -> None:
    def said(**losses: list[float]) -> str | None:
        squares = {name: np.array([[values] * 3]) for name, values in losses.items()}
        measured = Measured(np.arange(4.0), [GapCurve(n, n, "a", s, s, s) for n, s in squares.items()])
        result: Any = SimpleNamespace(measured=measured)
        return teacher_line(result)

    wiener = [0.1, 0.2, 0.3, 0.4]
    assert said() is None
    assert said(proxy=[0.2, 0.2, 0.3, 0.4]) is None
    assert said(wiener=wiener, proxy=[0.09, 0.19, 0.29, 0.39]) is None
    line = said(wiener=wiener, proxy=[0.2, 0.19, 0.5, 0.39])
    assert line is not None
    assert "at 2 of 4 noise levels" in line
    assert "--steps" in line


def result(cleaning: float | None, coarse: float | None, *, moments: bool = False, share: float = 1.0) -> StagesResult:
    """With `moments`, the coarse stage is the Wiener filter's, and that of the prior lies elsewhere."""

    def elbows(cleaning: float | None, coarse: float | None) -> Any:
        return {
            ("cleaning", "tolerance"): elbow("cleaning", cleaning, share),
            ("coarse", "tolerance"): elbow("coarse", coarse),
        }

    nothing: Any = None
    if not moments:
        decided = StandInElbows("proxy", "dead-leaves", nothing, elbows(cleaning, coarse))
        return StagesResult({"method": "tolerance"}, Measured(U), [decided], decided)
    of_wiener = StandInElbows("proxy", "wiener", nothing, elbows(-5.0, coarse))
    decided = StandInElbows("proxy", "prior", nothing, elbows(cleaning, 4.0))
    return StagesResult({"method": "tolerance"}, Measured(U), [of_wiener, decided], decided)


def test_stages_in_words() -> None:
    assert stage_lines(result(-2.5, None)) == [
        "cleaning: programs own log σ < -2.50 [95 %: -2.60 to -2.40]",
        "no coarse stage for programs: the gap is 9 %",
    ]
    rare = stage_lines(result(-2.5, 2.0, share=0.5))
    assert "but only 50 % of the bootstrap's curves have such a stage" in rare[0]
    assert rare[1].startswith("coarse: programs own log σ > 2.00")
    with_moments = stage_lines(result(-2.5, 2.0, moments=True))
    assert with_moments[0].startswith("cleaning: programs own log σ < -2.50")
    assert with_moments[1].startswith("coarse: DP moments own log σ > 2.00")
    assert stage_lines(result(-2.5, None, moments=True))[1] == "no coarse stage for DP moments: the gap is 9 %"


@pytest.mark.parametrize("preset", ["paper-28", "cpu-small"])
@pytest.mark.parametrize("tau", [(-2.5, 1.0), (-2.5, None), (None, 1.0), (None, None), (2.5, None), (None, -4.0)])
def test_thresholds_as_yaml_are_taken_by_the_configuration(tmp_path, tau, preset) -> None:
    path = tmp_path / "stages.yaml"
    given = {"preset": preset, "stages": {"variant": "coarse", "tau_coarse": 2.25}, "program": {"name": "contours"}}
    path.write_text(stages_yaml(result(*tau), given), encoding="utf-8")
    loaded = load_config({}, file=path)
    variant = {(True, True): "both", (True, False): "cleaning", (False, True): "coarse", (False, False): "dpdm"}
    assert loaded.stages.variant == variant[tau[0] is not None, tau[1] is not None]
    assert loaded.program.name == "contours"
    if tau[0] is not None:
        assert loaded.stages.tau_cleaning == tau[0]
    if tau[1] is not None:
        assert loaded.stages.tau_coarse == tau[1]


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ((-2.5, 1.0), (-2.5, 1.0)),
        ((None, 1.0), (-6.215, 1.0)),  # below what any sampler asks for
        ((-2.5, None), (-2.5, 4.382)),  # above it
        ((3.0, 1.0), (0.9, 1.0)),  # DP-SGD must own something
    ],
)
def test_with_moments_both_thresholds_are_those_of_residual(tmp_path, found, wanted) -> None:
    path = tmp_path / "stages.yaml"
    given = {"preset": "cpu-small", "stages": {"tau_coarse": 1.5}}
    path.write_text(stages_yaml(result(*found, moments=True), given), encoding="utf-8")
    loaded = load_config({}, file=path).stages
    assert (loaded.variant, loaded.tau_cleaning, loaded.tau_coarse) == ("residual", *wanted)
