"""Contact sheets of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpsyngen.errors import ConfigError
from dpsyngen.programs import image_grid, make_program, save_grid


def test_grid_places_images_in_reading_order() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 3), dtype=np.uint8)
    grid = image_grid(images, 3, scale=2, pad=1)
    assert (grid.mode, grid.size) == ("L", (3 * 7 + 1, 2 * 5 + 1))
    pixels = np.asarray(grid)
    assert pixels[1:5, 1:7].tolist() == [[0] * 6] * 4
    assert pixels[1:5, 15:21].tolist() == [[2] * 6] * 4
    assert pixels[6:10, 8:14].tolist() == [[4] * 6] * 4
    assert set(pixels[:, 0]) == set(pixels[5]) == set(pixels[6:10, 15:].ravel()) == {128}


def test_grid_keeps_colours() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), dtype=np.uint8)
    grid = image_grid(images, 8, pad=0)
    assert grid.mode == "RGB"
    assert np.array_equal(np.asarray(grid), np.concatenate(images.transpose(0, 2, 3, 1), axis=1))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 2, 4, 4), np.uint8),
        np.zeros((1, 1, 4, 4)),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 1, 4, 4), np.uint8),
    ],
)
def test_grid_refuses_other_arrays(images: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="uint8"):
        image_grid(images, 1)


def test_save_grid(tmp_path: Path) -> None:
    program = make_program("dead-leaves", resolution=8, channels=3)
    path = save_grid(program, tmp_path / "grid.png", count=5, columns=2, scale=1)
    with Image.open(path) as grid:
        assert np.array_equal(np.asarray(grid), np.asarray(image_grid(program.batch(range(5)), 2)))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        save_grid(program, path)
    assert path.read_bytes() == before
    save_grid(program, path, count=1, overwrite=True)
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]  # no temporary file stays


def test_save_grid_refuses_bad_paths_and_leaves_nothing(tmp_path: Path) -> None:
    program = make_program("dead-leaves", resolution=8, channels=1)
    with pytest.raises(ConfigError, match=r"\.png"):
        save_grid(program, tmp_path / "grid.jpg")
    with pytest.raises(ConfigError, match="not a folder"):
        save_grid(program, tmp_path / "nowhere" / "grid.png")
    with pytest.raises(ConfigError, match="count"):
        save_grid(program, tmp_path / "grid.png", count=0)
    assert list(tmp_path.iterdir()) == []
