"""Nearest neighbours in blocks are those of the brute force."""

from __future__ import annotations

import numpy as np
import pytest

from dpsyngen.errors import ConfigError
from dpsyngen.evaluation import neighbours as module
from dpsyngen.evaluation.neighbours import nearest


def brute(queries: np.ndarray, references: np.ndarray, skip: np.ndarray | None = None) -> np.ndarray:
    """Squared distances [Q, N]."""
    wide = np.int64 if queries.dtype == np.uint8 else np.float64
    q, r = (x.reshape(len(x), -1).astype(wide) for x in (queries, references))
    out = ((q[:, None] - r[None]) ** 2).sum(-1).astype(float)
    if skip is not None:
        rows = np.flatnonzero(skip >= 0)
        out[rows, skip[rows]] = np.inf
    return out


@pytest.mark.parametrize("block_bytes", [1, 5000, 2**26])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_blocks_equal_brute_force(kind, block_bytes, monkeypatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    q, r = rng.integers(0, 256, (37, 1, 9, 9)), rng.integers(0, 256, (211, 1, 9, 9))
    queries, references = (x.astype(np.uint8) if kind == "uint8" else (x / 17).astype(np.float32) for x in (q, r))
    found, wanted = (
        nearest(
            queries,
            references,
        ),
        brute(queries, references),
    )
    assert np.array_equal(found.index, wanted.argmin(1))
    assert np.allclose(found.squared, wanted.min(1), rtol=1e-12, atol=0)
    assert np.allclose(found.distance**2, wanted.min(1))


def test_distances_of_nearly_equal_images_are_exact() -> None:
    """Where fp32 would lose the difference of large squares."""
    rng = np.random.default_rng(1)
    references = rng.integers(0, 2, (300, 3, 40, 40), dtype=np.uint8) * 255
    queries = references[:20].copy()
    queries[:, 0, 0, 0] ^= 1
    found = nearest(queries, references)
    assert np.array_equal(found.index, np.arange(20))
    assert np.array_equal(found.squared, np.ones(20))


def test_an_image_is_not_its_own_neighbour(monkeypatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 2000)
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (50, 1, 8, 8), dtype=np.uint8)
    rows = np.array([0, 7, 49])
    found = nearest(images[rows], images, skip=rows)
    assert np.array_equal(found.index, brute(images[rows], images, rows).argmin(1))
    assert (found.squared > 0).all()
    assert np.array_equal(nearest(images[rows], images).index, rows)


def test_equal_distances_are_exactly_equal() -> None:
    image = np.full((1, 1, 8, 8), 100, np.uint8)
    references = np.concatenate([image + 3, image - 3, image + 9])
    assert nearest(image, references).squared == nearest(image, references[1:]).squared == 64 * 9


def test_few_references_and_memory_maps(tmp_path) -> None:
    rng = np.random.default_rng(3)
    np.save(tmp_path / "r.npy", rng.integers(0, 256, (3, 1, 8, 8), dtype=np.uint8))
    references = np.load(tmp_path / "r.npy", mmap_mode="r")
    queries = rng.integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)
    for n in (1, 2, 3):
        assert np.array_equal(nearest(queries, references[:n]).index, brute(queries, references[:n]).argmin(1))


@pytest.mark.parametrize(
    ("queries", "references", "skip"),
    [
        (np.zeros((2, 4), np.uint8), np.zeros((2, 5), np.uint8), None),
        (np.zeros((2, 4), np.uint8), np.zeros((2, 4), np.float32), None),
        (np.zeros((0, 4), np.uint8), np.zeros((2, 4), np.uint8), None),
        (np.zeros((2, 4), np.uint8), np.zeros((0, 4), np.uint8), None),
        (np.zeros((1, 4), np.uint8), np.zeros((1, 4), np.uint8), np.zeros(1, np.int64)),
    ],
)
def test_what_cannot_be_compared_is_refused(queries, references, skip) -> None:
    with pytest.raises(ConfigError):
        nearest(queries, references, skip=skip)
