"""Progress on a terminal and off it."""

from __future__ import annotations

import io
import sys

import pytest

from dpsyngen import console as console_module
from dpsyngen.console import Console, Progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_have_rate_and_time_left(clock, capsys) -> None:
    with Console().progress("work", 100, "things") as p:
        for i in range(1, 101):
            clock[0] += 1.0
            p.update(i, "note")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work: 10/100 things, 1.00/s, 1:30 left  note"
    assert len(lines) == 10  # every ten seconds, and the end
    assert lines[-1] == "work: 100 things in 1:40"


def test_resumed_work_counts_its_own_part(clock, capsys) -> None:
    with Console().progress("work", 100, "things", start=80) as p:
        clock[0] += 10.0
        p.update(90)
        assert p.rate() == 1.0
    assert capsys.readouterr().err.splitlines()[-1] == "work: 10 things in 0:10"


def test_quiet_has_nothing_and_errors_have_no_end(clock, capsys) -> None:
    with Console(quiet=True).progress("work", 10, "things") as p:
        for i in range(1, 11):
            clock[0] += 60.0
            p.update(i)
    assert capsys.readouterr() == ("", "")
    p = Console().progress("work", 10, "things")
    p.update(1)
    p.__exit__(RuntimeError, RuntimeError(), None)
    assert capsys.readouterr().err == ""


def test_bar_is_drawn_on_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    console = Console()
    assert console.live
    with console.progress("work", 3, "things") as p:
        assert type(p) is not Progress
        p.update(3, "done")
    assert "work: 3 things" in capsys.readouterr().err


def test_hours() -> None:
    assert console_module._clock(3725) == "1:02:05"


@pytest.mark.parametrize("closed", [False, True])
def test_without_standard_error_or_output_nothing_is_said(closed, monkeypatch, tmp_path) -> None:
    for name in ("stdout", "stderr"):
        stream = None
        if closed:
            with open(tmp_path / name, "w", encoding="utf-8") as stream:
                pass
        monkeypatch.setattr(sys, name, stream)
    console = Console()
    console.note("a note")
    console.result({}, ["a line"])
    console.error("data", "an error")
    console_module.speak_any_language(as_json=True)
    with console.progress("work", 3, "things") as p:
        p.update(3)
    assert not console.live


@pytest.mark.parametrize("as_json", [False, True])
def test_what_an_encoding_lacks_is_escaped_and_json_is_utf8(as_json, monkeypatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    console_module.speak_any_language(as_json)
    Console(as_json=as_json).result({"ε": "é"}, ["ε is é"])
    assert written.getvalue() == ('{"ε": "é"}\n'.encode() if as_json else b"\\u03b5 is \xe9\n")


def test_markdown_is_drawn_on_a_terminal_and_plain_elsewhere(monkeypatch, capsys) -> None:
    text = "### A\\_b\n\n| variant | ε = 1 |\n|---|---:|\n| Both | **3.1** |\n"
    Console().markdown(text)
    assert "| Both | **3.1** |" in capsys.readouterr().out
    Console(as_json=True).markdown(text)
    assert not capsys.readouterr().out
    monkeypatch.setattr(console_module, "is_terminal", lambda stream: stream is sys.stdout)
    Console().markdown(text)
    drawn = capsys.readouterr().out
    assert "A_b" in drawn
    assert "Both" in drawn
    assert "|" not in drawn
