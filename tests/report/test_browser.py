"""The run report in a browser: nothing fails, nothing is fetched, nothing sticks out, and all text can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.chromium import inspect, needs_chromium

pytestmark = [needs_chromium, pytest.mark.slow]

# Each text whose contrast with the ground behind it is below what WCAG 2.2 (1.4.3) asks for.
CONTRAST = """
(() => {
  const parse = c => { const p = c.match(/[\\d.]+/g).map(Number); return p.length < 4 ? [...p, 1] : p; };
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => {
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] > 0) return c; }
    return [255, 255, 255, 1];
  };
  const poor = []; let seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const text = walk.currentNode.textContent.trim(), e = walk.currentNode.parentElement;
    if (!text || !e.checkVisibility()) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
    seen += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${text.slice(0, 40)}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  return {poor, seen};
})()
"""


@pytest.fixture(scope="module")
def reports(reported) -> dict[str, Path]:
    return {half: reported.path / half / "report.html" for half in ("private", "release")}


@pytest.mark.parametrize("half", ["private", "release"])
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_opens(reports, half, width, dark) -> None:
    page = inspect(reports[half], width=width, dark=dark, expression=CONTRAST)
    assert page.errors == []
    assert page.requests == []
    assert page.broken == []
    assert page.images == {"private": 68, "release": 8}[half]
    assert page.overflow == 0
    assert page.value["poor"] == []
    assert page.value["seen"] > 50
    assert "b & <i>" in page.text


def test_both_schemes_differ_and_print_is_light(reports) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = inspect(reports["release"], expression=ground).value
    dark = inspect(reports["release"], dark=True, expression=ground, pdf=True)
    assert (light, dark.value) == ("rgb(255, 255, 255)", "rgb(20, 23, 28)")
    assert dark.pdf.startswith(b"%PDF")
    assert inspect(reports["release"], dark=True, media="print", expression=ground).value == light


def test_print_shows_what_is_folded(reports) -> None:
    folded = "[...document.querySelectorAll('details pre')].map(e => e.checkVisibility())"
    assert inspect(reports["private"], expression=folded).value == [False, False]
    assert inspect(reports["private"], media="print", expression=folded).value == [True, True]


def test_the_driver_sees_what_is_wrong(tmp_path) -> None:
    """Were it blind, the tests above could not fail."""
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>x</title>"
        "<body style='color: #999; background: #fff'>"
        "<div style='width: 500px'>faint</div><img alt='not an image' src='data:image/png;base64,AAAA'>"
        "<img alt='outside' src='http://127.0.0.1:9/pixel.png'>"
        "<script>console.error('said'); throw Error('thrown')</script>"
    )
    page = inspect(wrong, width=360, expression=CONTRAST, screenshot=True)
    assert page.requests == ["http://127.0.0.1:9/pixel.png"]
    assert page.broken == ["not an image", "outside"]
    assert page.overflow >= 140
    assert any("said" in error for error in page.errors)
    assert any("thrown" in error for error in page.errors)
    assert page.value["poor"] == ["faint: 2.85"]
    assert page.screenshot.startswith(b"\x89PNG")
    assert inspect(wrong, width=1200).overflow == 0
    right = tmp_path / "right.html"
    right.write_text("<!doctype html><title>x</title><p>fine</p>")
    page = inspect(right)
    assert (page.errors, page.requests, page.broken, page.overflow) == ([], [], [], 0)


def test_the_policy_of_a_report_refuses_what_slipped_in(reports, tmp_path) -> None:
    changed = tmp_path / "changed.html"
    inserted = "<img alt='outside' src='http://127.0.0.1:9/x.png'><script>document.title = 'run'</script></body>"
    changed.write_text(reports["release"].read_text().replace("</body>", inserted))
    page = inspect(changed, expression="document.title")
    assert page.value == "dpsyngen report"
    assert page.broken == ["outside"]
    assert sum("Content Security Policy" in error for error in page.errors) == 2
