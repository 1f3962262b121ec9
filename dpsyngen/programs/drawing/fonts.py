"""Freely licensed fonts found on the system, and their outlines.

A font is known by its full name and by the hash of its file, so that a configuration says exactly which outlines it
draws, whatever is installed elsewhere.  Searched are the folders of the XDG standard and matplotlib's own (which holds
DejaVu), or instead of these the folders that the environment variable ``DPSYNGEN_FONTS`` lists.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import ConfigError

# Phrases of licences that allow use and redistribution, as they stand in the name records 0, 13 and 14.
FREE = (
    "open font license",
    "scripts.sil.org/ofl",
    "openfontlicense.org",
    "apache license",
    "apache.org/licenses",
    "bitstream vera",
    "dejavu changes are in public domain",
    "public domain",
    "gust font license",
    "ubuntu font licence",
    "font exception",
    "creativecommons.org/publicdomain/zero",
    "liberation fonts license",
)
_PIECES = 6  # straight pieces to a curve
_HASH = 12  # characters of the SHA-256 of the file


@dataclass(frozen=True)
class Font:
    """A font file: full name, start of the SHA-256 of its bytes, place."""

    name: str
    digest: str
    path: Path

    @property
    def key(self) -> str:
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True)
class Outlines:
    """Outlines of glyphs, flattened, in units of the em with y down.

    Attributes:
        points: float64 [P, 2].
        contours: int64 [K + 1]; contour k is ``points[contours[k] : contours[k + 1]]``.
        glyphs: int64 [G + 1]; glyph g has the contours ``glyphs[g]`` to ``glyphs[g + 1] − 1``.
    """

    points: NDArray[np.float64]
    contours: NDArray[np.int64]
    glyphs: NDArray[np.int64]


def font_folders() -> list[Path]:
    """Folders that are searched, whether or not they exist."""
    listed = os.environ.get("DPSYNGEN_FONTS")
    if listed is not None:
        return [Path(part) for part in listed.split(os.pathsep) if part]
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    shared = (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    folders = [home / "fonts", Path.home() / ".fonts", *(Path(part) / "fonts" for part in shared if part)]
    found = importlib.util.find_spec("matplotlib")
    if found is not None and found.origin:
        folders.append(Path(found.origin).parent / "mpl-data/fonts/ttf")
    return folders


def find_fonts() -> list[Font]:
    """All freely licensed TrueType and OpenType fonts found, sorted by name and hash, each once."""
    return list(_find(tuple(font_folders())))


@lru_cache(maxsize=8)
def _find(folders: tuple[Path, ...]) -> tuple[Font, ...]:
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    found: dict[str, Font] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.suffix.lower() in (".ttf", ".otf") and path.is_file():
                font = _read(path)
                if font is not None:
                    found.setdefault(font.digest, font)
    return tuple(sorted(found.values(), key=lambda f: f.key))


def _read(path: Path) -> Font | None:
    """The font in a file, or None if it cannot be read or says nothing of a free licence."""
    from fontTools.ttLib import TTFont

    try:
        data = path.read_bytes()
        with TTFont(path, lazy=True) as font:
            records = font["name"]
            words = " ".join(
                record.toUnicode() for n in (0, 13, 14) if (record := records.getName(n, 3, 1)) is not None
            )
            name = records.getDebugName(4) or path.stem
            glyphs = font.getBestCmap() or {}
    except Exception:  # fontTools raises whatever the damage in a file leads to; a file that is no font is no font
        return None
    if not any(phrase in words.lower() for phrase in FREE):
        return None
    if ord("A") in glyphs and glyphs[ord("A")] == glyphs.get(ord("B")):  # fallback fonts show one box for all letters
        return None
    return Font(" ".join(name.replace("@", " ").split()), hashlib.sha256(data).hexdigest()[:_HASH], path)


def choose_fonts(wanted: Any, characters: str) -> tuple[str, ...]:
    """Keys of the fonts that are wanted and have all characters.

    Args:
        wanted: None for all that are found, or a name ("DejaVu Sans"), a key ("DejaVu Sans@3fdf69cabf06"), or a list.
        characters: what must be drawable.

    Raises:
        ConfigError: no font is found, one that is named is missing, or it lacks a character.
    """
    fonts = find_fonts()
    places = ", ".join(map(str, font_folders()))
    help_ = f"searched: {places}.  Install one (Debian: fonts-dejavu-core), or name folders in DPSYNGEN_FONTS"
    if not fonts:
        raise ConfigError(f"No freely licensed font found; {help_}.")
    if wanted is None:
        keys = tuple(font.key for font in fonts if _missing(font, characters) == "")
        if not keys:
            raise ConfigError(
                f"None of the {len(fonts)} fonts found has all of the characters {characters!r}; {help_}."
            )
        return keys
    names = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"fonts={wanted!r} does not name fonts: give a list of names such as [DejaVu Sans].")
    keys = ()
    for name in names:
        match = [font for font in fonts if name in (font.key, font.name) or name.lower() == font.name.lower()]
        if not match:
            known = ", ".join(sorted({font.name for font in fonts})[:12])
            raise ConfigError(f"There is no font {name!r} among those found ({known}, …); {help_}.")
        missing = _missing(match[0], characters)
        if missing:
            raise ConfigError(f"Font {match[0].name!r} lacks {missing!r}: leave it out, or those characters.")
        keys += (match[0].key,)
    return tuple(dict.fromkeys(keys))


@lru_cache(maxsize=4096)
def _missing(font: Font, characters: str) -> str:
    from fontTools.ttLib import TTFont

    with TTFont(font.path, lazy=True) as file:
        known = file.getBestCmap() or {}
    return "".join(c for c in characters if ord(c) not in known)


@lru_cache(maxsize=16)
def outlines(keys: tuple[str, ...], characters: str) -> Outlines:
    """Outlines of all characters in all fonts: glyph f·len(characters) + c is character c in font f."""
    from fontTools.pens.basePen import BasePen
    from fontTools.ttLib import TTFont

    class Flattening(BasePen):
        """Collects contours; curves become straight pieces, by additions and multiplications only."""

        def __init__(self, glyphs: Any) -> None:
            super().__init__(glyphs)
            self.contours: list[list[tuple[float, float]]] = []

        def _moveTo(self, pt: tuple[float, float]) -> None:
            self.contours.append([pt])

        def _lineTo(self, pt: tuple[float, float]) -> None:
            self.contours[-1].append(pt)

        def _curveToOne(self, pt1: Any, pt2: Any, pt3: Any) -> None:
            start = self.contours[-1][-1]
            for piece in range(1, _PIECES + 1):
                t = piece / _PIECES
                s = 1.0 - t
                weights = s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t
                points = start, pt1, pt2, pt3
                self.contours[-1].append(
                    (
                        sum(w * p[0] for w, p in zip(weights, points, strict=True)),
                        sum(w * p[1] for w, p in zip(weights, points, strict=True)),
                    )
                )

    by_key = {font.key: font for font in find_fonts()}
    points: list[tuple[float, float]] = []
    contours, glyphs = [0], [0]
    for key in keys:
        with TTFont(by_key[key].path) as file:
            names, shapes = file.getBestCmap(), file.getGlyphSet()
            em = float(file["head"].unitsPerEm)
            for character in characters:
                pen = Flattening(shapes)
                shapes[names[ord(character)]].draw(pen)
                for contour in pen.contours:
                    points += [(x / em, -y / em) for x, y in contour]
                    contours.append(len(points))
                glyphs.append(len(contours) - 1)
    return Outlines(np.array(points, dtype=np.float64).reshape(-1, 2), np.array(contours), np.array(glyphs))
