"""Charts as SVG: what is drawn where, what they say to those who do not see them, and that texts are escaped."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from dpsyngen.report.charts import HEIGHT, WIDTH, Series, line_chart, nice_ticks
from dpsyngen.report.stage_chart import stage_charts


def lines(chart, css_class: str = "line") -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(str(chart))
    found = [e.get("points") for e in root.iter("polyline") if css_class in e.get("class").split()]
    return [[tuple(map(float, p.split(","))) for p in points.split()] for points in found]


def texts(chart) -> list[str]:
    return [e.text for e in ElementTree.fromstring(str(chart)).iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0.3, 1.4, [0, 0.5, 1, 1.5]),
        (7, 1000, [0, 500, 1000]),
        (5, 5, [4.4, 4.6, 4.8, 5, 5.2, 5.4, 5.6]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1
    assert f"{steps.pop():e}"[0] in "125"
    assert len(ticks) <= 8
    if low != high:
        assert set(expected) <= set(ticks) or ticks == expected


def test_a_line_lies_where_its_values_are() -> None:
    chart = line_chart([Series("loss", [(0, 1.0), (5, 0.0), (10, 0.5)])], "Loss", x_label="step", smooth=False)
    ((first, low, last),) = lines(chart)
    assert first[0] < low[0] < last[0]
    assert low[0] == pytest.approx((first[0] + last[0]) / 2)
    assert last[1] == pytest.approx((first[1] + low[1]) / 2)  # y grows downwards
    assert low[1] > first[1]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in (first, low, last))


def test_steps_are_whole() -> None:
    chart = line_chart([Series("loss", [(1, 0.3), (2, 0.1), (3, 0.2)])], "Loss", x_label="step", smooth=False)
    assert {"1", "2", "3"} <= set(texts(chart))
    assert not {"1.5", "2.5"} & set(texts(chart))


def test_far_apart_values_get_a_logarithmic_axis() -> None:
    chart = line_chart([Series("norm", [(0, 1.0), (1, 10.0), (2, 100.0)])], "Norm", x_label="step", smooth=False)
    ((a, b, c),) = lines(chart)
    assert b[1] == pytest.approx((a[1] + c[1]) / 2, abs=0.11)
    assert {"1", "10", "100"} <= set(texts(chart))


def test_shares_have_the_whole_axis() -> None:
    chart = line_chart([Series("c", [(0, 0.5), (1, 0.5)])], "Clipped", x_label="step", percent=True)
    assert {"0 %", "50 %", "100 %"} <= set(texts(chart))


def test_the_running_mean_is_smoother_and_the_values_stay() -> None:
    values = [(i, 1.0 + (-1) ** i * 0.1) for i in range(100)]
    chart = line_chart([Series("loss", values)], "Loss", x_label="step")
    (raw,), (mean,) = lines(chart, "raw"), lines(chart)

    def spread(line):
        return max(y for _, y in line) - min(y for _, y in line)

    assert len(raw) == 100
    assert spread(mean) < spread(raw) / 3


def test_a_long_log_stays_small() -> None:
    chart = line_chart([Series("loss", [(i, math.sin(i)) for i in range(100_000)])], "Loss", x_label="step")
    assert len(chart) < 20_000
    assert len(lines(chart, "raw")[0]) <= 240


def test_words_and_escapes() -> None:
    evil = '"><script>alert(1)</script>'
    series = [Series(evil, [(1, 0.9), (2, 0.25), (3, 0.5)]), Series("other", [(1, 1), (2, 1)])]
    chart = line_chart(series, "Loss", x_label="step")
    root = ElementTree.fromstring(str(chart))
    assert root.get("role") == "img"
    label = root.get("aria-label")
    assert "0.9 at step 1, 0.5 at step 3, lowest 0.25 at step 2" in label
    assert evil in label
    assert evil in texts(chart)
    assert "<script>" not in chart
    # Lines are told apart by more than colour.
    dashes = [e.get("class") for e in root.iter("polyline") if "line" in e.get("class").split()]
    assert len(set(dashes)) == 2


def test_nothing_to_draw() -> None:
    assert line_chart([], "Loss", x_label="step") is None
    assert line_chart([Series("loss", [(1, 1.0)])], "Loss", x_label="step") is None


def stage(name: str, low: float | None, high: float | None, trained_by: str) -> dict:
    return {"name": name, "log_sigma_low": low, "log_sigma_high": high, "trained_by": trained_by}


BOTH = [
    stage("cleaning", None, -3.0, "public"),
    stage("context", -3.0, 2.0, "private"),
    stage("coarse", 2.0, None, "public"),
]


def test_stages_meet_at_their_thresholds_and_are_named() -> None:
    wide, narrow = stage_charts(BOTH, -1.2, 1.2, 0.002, 80.0)
    for chart, look in ((wide, "wide"), (narrow, "narrow")):
        root = ElementTree.fromstring(str(chart))
        assert look in root.get("class").split()
        grounds = [e for e in root.iter("rect") if "ground" in e.get("class")]
        assert [e.get("class").split("tone-")[1] for e in grounds] == ["public", "private", "public"]
        edges = [(float(e.get("x")), float(e.get("x")) + float(e.get("width"))) for e in grounds]
        for (_, right), (left, _) in itertools.pairwise(edges):
            assert right == pytest.approx(left, abs=0.11)
        unit = (edges[1][1] - edges[1][0]) / 5
        low = math.log(0.002) - 0.6
        assert edges[0][1] - edges[0][0] == pytest.approx(unit * (-3 - low), rel=0.01)
        assert {"cleaning", "context", "coarse", "log σ = −3", "log σ = 2"} <= set(texts(chart))
    assert "log σ below -3: trained on programs, no privacy cost" in ElementTree.fromstring(str(wide)).get("aria-label")


def test_stages_of_moments_have_a_name_and_a_colour_of_their_own() -> None:
    residual = [stage("context", None, 1.5, "private"), stage("coarse", 1.5, None, "moments")]
    for stages in (residual, [stage("gaussian", None, None, "moments")]):
        for chart in stage_charts(stages, -0.5, 1.0, 0.02, 80.0):
            root = ElementTree.fromstring(str(chart))
            tones = [e.get("class").split("tone-")[1] for e in root.iter("rect") if "ground" in e.get("class")]
            assert tones == [s["trained_by"] for s in stages]
            assert any(text.startswith("DP moments") for text in texts(chart))
            assert "DP moments, in closed form" in root.get("aria-label")
            assert "trained on DP moments" not in root.get("aria-label")


def test_one_stage_and_thresholds_beyond_the_axis() -> None:
    for stages in (
        [stage("context", None, None, "private")],
        [stage("context", None, 40.0, "private"), stage("coarse", 40.0, None, "public")],
    ):
        for chart in stage_charts(stages, -1.2, 1.2, 0.002, 80.0):
            for value in re.findall(r'(?:x|y|width|height)="(-?[\d.]+)"', str(chart)):
                assert 0 <= float(value) <= 760


@pytest.mark.parametrize("trainer", ["public", "moments"])
@pytest.mark.parametrize("thresholds", [(-3.0, 2.0), (-6.4, -6.0), (-0.1, 0.1), (4.3, 4.6)])
def test_labels_of_stages_do_not_run_into_each_other(thresholds, trainer) -> None:
    low, high = thresholds
    stages = [
        stage("cleaning", None, low, "public"),
        stage("context", low, high, "private"),
        stage("coarse", high, None, trainer),
    ]
    for chart in stage_charts(stages, -1.2, 1.2, 0.002, 80.0):
        root = ElementTree.fromstring(str(chart))
        boxes = []
        for e in root.iter("text"):
            if "tone-" in e.get("class") or e.text.startswith("log σ"):
                half = 3.3 * len(e.text)
                boxes.append((float(e.get("x")) - half, float(e.get("x")) + half, float(e.get("y"))))
        assert len(boxes) == 8
        for i, (left, right, y) in enumerate(boxes):
            assert left >= -2
            assert right <= float(root.get("viewBox").split()[2]) + 2
            for other_left, other_right, other_y in boxes[:i]:
                assert abs(y - other_y) >= 12 or right <= other_left or other_right <= left
