"""What messages echo: short, on one line, harmless to a terminal."""

from __future__ import annotations

import numpy as np
import pytest

from dpsyngen.errors import ConfigError, listed, printable, require, shown


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\x9b1m", "\u202egnp", "\ud800", "\u2028", "\x00", "\u200b"])
def test_what_no_terminal_should_get_is_written_as_an_escape(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text).startswith(("\\", "a\\"))
    for safe in (listed([text]), shown(text), shown({text: [text]})):
        assert safe.isprintable()
        safe.encode("utf-8")


def test_ordinary_text_is_kept() -> None:
    for text in ("/home/me/photos and more/日本", "café", "it's"):
        assert printable(text) == text
    assert shown("it's") == '"it\'s"'
    assert listed(["a", 'b"']) == "'a', 'b\"'"


def test_everything_is_short() -> None:
    shared: list = ["x"] * 9
    for _ in range(30):
        shared = [shared] * 9
    recursive: dict = {}
    recursive["self"] = recursive

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in (
        "x" * 10**6,
        b"x" * 10**6,
        10**5000,
        -(10**5000),
        shared,
        recursive,
        np.zeros(10**5),
        Broken(),
        {"x" * 10**6: 1},
    ):
        assert len(shown(value)) < 250
    assert len(printable("x" * 10**6)) < 450
    assert len(listed(["x" * 10**4] * 10**4)) < 2500
    assert listed(range(25)).endswith("(25 in all)")
    assert listed([]) == "none"


def test_both_ends_of_a_long_text_are_shown() -> None:
    assert printable("start" + "x" * 1000 + "end").startswith("start")
    assert "end (1,008 characters)" in printable("start" + "x" * 1000 + "end")


def test_require_says_what_was_given_and_what_is_allowed() -> None:
    require(True, "steps", 1, "at least 1")
    require("a", "sampler", "a", ["a", "b"])
    with pytest.raises(ConfigError, match=r"^steps is 0, but must be at least 1\. Give more\.$"):
        require(False, "steps", 0, "at least 1. Give more.")
    with pytest.raises(ConfigError, match=r"^sampler is 'c', but must be one of a, b\.$"):
        require("", "sampler", "c", ["a", "b"])
