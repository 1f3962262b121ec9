"""Charts as SVG: what is drawn where, what they say to those who do not see them, and that texts are escaped."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from dpsyngen.report.charts import line_chart, smoothed, stage_chart


def parsed(chart) -> ElementTree.Element:
    return ElementTree.fromstring(str(chart).replace("<svg", '<svg xmlns:xlink="x"', 1))


def texts(chart) -> list[str]:
    return [e.text for e in parsed(chart).iter("text")]


def paths(chart, colour: str) -> list[np.ndarray]:
    """Points of what is drawn in a colour, [n, 2]; y grows downwards."""
    found = [e.get("d") for e in parsed(chart).iter("path") if colour in e.get("style", "")]
    return [np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", d), float) for d in found]


def test_a_line_lies_where_its_values_are() -> None:
    chart = line_chart({"loss": [(0, 1.0), (5, 0.0), (10, 0.5)]}, "Loss", "public")
    ((first, low, last),) = paths(chart, "stroke: var(--pub);")
    assert first[0] < low[0] < last[0]
    assert low[0] == pytest.approx((first[0] + last[0]) / 2)
    assert last[1] == pytest.approx((first[1] + low[1]) / 2)
    assert low[1] > first[1]


def test_steps_are_whole() -> None:
    chart = line_chart({"loss": [(1, 0.3), (2, 0.1), (3, 0.2)]}, "Loss", "public")
    assert {"1", "2", "3"} <= set(texts(chart))
    assert not {"1.5", "2.5"} & set(texts(chart))


def test_far_apart_values_get_a_logarithmic_axis() -> None:
    chart = line_chart({"norm": [(0, 1.0), (1, 10.0), (2, 100.0)]}, "Norm", "private")
    ((a, b, c),) = paths(chart, "stroke: var(--priv);")
    assert b[1] == pytest.approx((a[1] + c[1]) / 2)
    assert {"1", "10", "100"} <= set(texts(chart))


def test_shares_have_the_whole_axis() -> None:
    chart = line_chart({"c": [(0, 0.5), (1, 0.5)]}, "Clipped", "private", percent=True)
    assert {"0 %", "40 %", "100 %"} <= set(texts(chart))


def test_the_running_mean_is_smoother_and_the_values_stay() -> None:
    x, y, mean = smoothed([(i, 1.0 + (-1) ** i * 0.1) for i in range(100)])
    assert len(x) == len(y) == 100
    assert np.ptp(mean) < np.ptp(y) / 3
    assert mean == pytest.approx(1, abs=0.03)
    assert smoothed([(1, 0.5), (2, 0.7)])[2] == pytest.approx([0.5, 0.7])


def test_a_long_log_stays_small() -> None:
    points = [(i, math.sin(i)) for i in range(100_000)]
    assert len(line_chart({"loss": points}, "Loss", "public")) < 40_000
    x, y, _ = smoothed(points)
    assert len(x) == len(y) <= 240
    assert (np.diff(x) > 0).all()


def test_words_and_escapes() -> None:
    evil = '"><script>alert(1)</script> $x_$'
    chart = line_chart({evil: [(1, 0.9), (2, 0.25), (3, 0.5)], "other": [(1, 1), (2, 1)]}, "Loss", "public")
    root = parsed(chart)
    assert root.get("role") == "img"
    label = root.get("aria-label")
    assert "0.9 at step 1, 0.5 at step 3, lowest 0.25 at step 2" in label
    assert evil in label
    assert evil in texts(chart)  # neither markup nor a formula
    assert "<script>" not in chart
    # Lines are told apart by more than colour, and colours are those of the page.
    assert len([e for e in root.iter("path") if "stroke-dasharray" in e.get("style", "")]) > 0
    assert not re.search(r"#0102|font-family|<style|<metadata", chart)


def test_the_same_values_give_the_same_bytes_and_names_are_those_of_the_chart() -> None:
    points = {"loss": [(i, float(i)) for i in range(50)]}
    one, again, other = (line_chart(points, title, "public") for title in ("Loss", "Loss", "Loss of b"))
    assert one == again
    assert not set(re.findall(r' id="([^"]+)"', one)) & set(re.findall(r' id="([^"]+)"', other))


def test_nothing_to_draw() -> None:
    assert line_chart({}, "Loss", "public") is None
    assert line_chart({"loss": [(1, 1.0)]}, "Loss", "public") is None


def stage(name: str, low: float | None, high: float | None, trained_by: str) -> dict:
    return {"name": name, "log_sigma_low": low, "log_sigma_high": high, "trained_by": trained_by}


def chart_of(stages: list[dict]):
    network, sampling = {"noise_mean": -1.2, "noise_std": 1.2}, {"sigma_min": 0.002, "sigma_max": 80.0}
    return stage_chart(stages, network, sampling)


BOTH = [
    stage("cleaning", None, -3.0, "public"),
    stage("context", -3.0, 2.0, "private"),
    stage("coarse", 2.0, None, "public"),
]


def grounds(chart) -> list[tuple[str, float, float]]:
    """Tone, left and right end of the ground of each stage."""
    out = []
    for e in parsed(chart).iter("path"):
        tone = re.search(r"fill: var\(--(\w+)-soft\)", e.get("style", ""))
        if tone:
            x = [float(v) for v in re.findall(r"[ML] (-?[\d.]+) ", e.get("d"))]
            out.append((tone[1], min(x), max(x)))
    return out


def test_stages_meet_at_their_thresholds_and_are_named() -> None:
    chart = chart_of(BOTH)
    found = grounds(chart)
    assert [tone for tone, *_ in found] == ["pub", "priv", "pub"]
    for (_, _, right), (_, left, _) in itertools.pairwise(found):
        assert right == pytest.approx(left, abs=0.01)
    unit = (found[1][2] - found[1][1]) / 5
    low = math.log(0.002) - 0.6
    assert found[0][2] - found[0][1] == pytest.approx(unit * (-3 - low), rel=0.01)
    legend = [text for text in texts(chart) if "log σ" in text]
    assert [text.split(" (")[0] for text in legend] == ["cleaning", "context", "coarse"]
    assert "log σ < −3" in legend[0]
    assert "log σ from −3 to 2" in legend[1]
    assert {"0.002", "0.1", "80"} <= set(texts(chart))
    assert "log σ < −3: trained on programs, no privacy cost" in parsed(chart).get("aria-label")


def test_stages_of_moments_have_a_name_and_a_colour_of_their_own() -> None:
    residual = [stage("context", None, 1.5, "private"), stage("coarse", 1.5, None, "moments")]
    for stages in (residual, [stage("gaussian", None, None, "moments")]):
        chart = chart_of(stages)
        tones = {"private": "priv", "moments": "mom"}
        assert [tone for tone, *_ in grounds(chart)] == [tones[s["trained_by"]] for s in stages]
        assert any("DP moments" in text for text in texts(chart))
        label = parsed(chart).get("aria-label")
        assert "DP moments, in closed form" in label
        assert "trained on DP moments" not in label


def test_one_stage_and_thresholds_beyond_the_axis() -> None:
    beyond = [stage("context", None, 40.0, "private"), stage("coarse", 40.0, None, "public")]
    for stages in ([stage("context", None, None, "private")], beyond):
        chart = chart_of(stages)
        width = float(parsed(chart).get("viewBox").split()[2])
        assert all(-1 <= left <= right <= width + 1 for _, left, right in grounds(chart))
    assert "log σ < 40" in parsed(chart).get("aria-label")
