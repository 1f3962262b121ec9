"""Images that lie in a file."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

from dpsyngen.data import ImageDataset, ImageStore, load_images, save_images
from dpsyngen.data.store import SelectedImages, StoredImages
from dpsyngen.errors import DataError, RunError


def colour(count: int = 40, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[np.ndarray, StoredImages]:
    images = colour()
    (tmp_path / "raw").write_bytes(b"head" + images.tobytes())
    return images, StoredImages(tmp_path / "raw", (40, 3, 8, 8), 4)


@pytest.mark.parametrize("index", [[3, 4, 5, 20], [39, 0, 0, 7], [], list(range(40))])
def test_rows_come_in_the_order_in_which_they_are_asked_for(stored, index) -> None:
    images, store = stored
    assert np.array_equal(store[np.array(index, dtype=np.int64)], images[np.array(index, dtype=np.int64)])
    assert isinstance(store, ImageStore)


def test_slices_and_fresh_arrays(stored) -> None:
    images, store = stored
    part = store[5:30:3]
    assert np.array_equal(part, images[5:30:3])
    part[:] = 0
    assert np.array_equal(store[5:30:3], images[5:30:3])


def test_a_file_that_is_cut_short_is_an_error_and_not_the_end_of_the_process(stored, tmp_path: Path) -> None:
    _, store = stored
    os.truncate(tmp_path / "raw", 4 + 10 * 192)
    assert len(store[np.arange(10)]) == 10
    with pytest.raises(DataError, match="shorter"):
        store[np.array([12])]
    with pytest.raises(DataError, match="shorter"):
        StoredImages(tmp_path / "raw", (40, 3, 8, 8), 4)


def test_the_file_is_closed_when_nobody_needs_it(stored) -> None:
    _, store = stored
    descriptor = store._descriptor
    os.fstat(descriptor)
    closed = store._closed
    del store, stored
    closed()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


def test_threads_read_at_the_same_time(stored) -> None:
    images, store = stored
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            rows = rng.integers(0, 40, 9)
            if not np.array_equal(store[rows], images[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_store_goes_to_other_processes(stored) -> None:
    images, store = stored
    assert np.array_equal(pickle.loads(pickle.dumps(store))[np.array([3])], images[[3]])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        os.write(writer, store[np.array([7])].tobytes())
        os._exit(0)
    assert store[np.array([8])].tobytes() == images[8].tobytes()
    os.waitpid(child, 0)
    assert os.read(reader, 1000) == images[7].tobytes()


class _Refuses:
    """A store of the user's own that may be asked for a few images at a time only."""

    def __init__(self, images: np.ndarray, most: int) -> None:
        self.images, self.most = images, most
        self.shape, self.dtype = images.shape, images.dtype

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        part = self.images[index]
        assert len(part) <= self.most
        return part.copy()


def test_a_data_set_reads_no_more_than_it_is_asked_for(monkeypatch) -> None:
    images = colour()
    monkeypatch.setattr("dpsyngen.data.dataset._HASH_CHUNK_BYTES", 5 * 192)
    labels = np.arange(40, dtype=np.int64) % 2
    dataset = ImageDataset(_Refuses(images, 5), labels, ("a", "b"), "own store")
    in_memory = ImageDataset(images, labels, ("a", "b"), "memory")
    assert np.array_equal(dataset.batch([-1, 3]), images[[-1, 3]])
    part = dataset.subset(np.arange(40) % 2 == 1)
    assert isinstance(part.images, SelectedImages)
    assert np.array_equal(part.batch([0, 4]), images[[1, 9]])
    again = part.subset([3, 0])
    assert np.array_equal(again.batch([0, 1]), images[[7, 1]])
    assert isinstance(again.images, SelectedImages)
    assert not isinstance(again.images.images, SelectedImages)
    assert dataset.fingerprint() == in_memory.fingerprint()
    assert part.fingerprint() == in_memory.subset(np.arange(1, 40, 2)).fingerprint()
    for wrong in ([40], [-41], np.ones(39, dtype=bool), [[1]], [0.5]):
        with pytest.raises(IndexError):
            dataset.batch(wrong)
    assert "own store" in repr(dataset)
    assert "40 RGB images of 8×8, 2 classes, in a file" in repr(dataset)


def test_memory_maps_are_selected_from_and_not_copied(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", colour()[:, 0])
    dataset = load_images(tmp_path / "x.npy")
    part = dataset.subset([5, 6])
    assert isinstance(part.images, SelectedImages)
    assert np.array_equal(part.array(), np.load(tmp_path / "x.npy")[[5, 6], None])


def test_all_of_a_store_is_refused_where_it_does_not_fit(stored, monkeypatch) -> None:
    images, store = stored
    dataset = ImageDataset(store, None, (), "much")
    assert np.array_equal(dataset.array(), images)
    monkeypatch.setattr("dpsyngen.data.store.memory_bytes", lambda: (0, images.nbytes))
    with pytest.raises(DataError, match="half of what is available"):
        dataset.array()
    assert len(dataset.batch(range(5))) == 5


def test_what_was_saved_is_used_where_it_lies(tmp_path: Path) -> None:
    dataset = ImageDataset(colour(), np.arange(40) % 2, ("b", "a"), "x")
    folder = tmp_path / "saved"
    save_images(dataset, folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.name: p.stat().st_mode & 0o777 for p in folder.iterdir()} == dict.fromkeys(
        ("images.npy", "labels.npy", "class_names.json"), 0o600
    )
    for cache in ("auto", tmp_path / "unused"):
        again = load_images(folder, cache=cache)
        assert again.fingerprint() == dataset.fingerprint()
    assert isinstance(again.images, StoredImages)
    assert not (tmp_path / "unused").exists()
    assert load_images(folder, labels=False).labels is None
    with pytest.raises(RunError, match="not an empty folder"):
        save_images(dataset, folder)


def test_folders_of_arrays_of_strangers(tmp_path: Path) -> None:
    images = colour()
    for changes, why in (
        ({"labels.npy": np.arange(39)}, "39 labels"),
        ({"class_names.json": "{}"}, "list of texts"),
        ({"class_names.json": '["a"]'}, "labels go up to 1"),
        ({"class_names.json": '["a", "b"]' + " " * 2**23}, "over the limit"),
        ({"images.npy": np.array([object()])}, "Python objects"),
    ):
        folder = tmp_path / why.replace(" ", "")
        save_images(ImageDataset(images, np.arange(40) % 2, ("b", "a"), "x"), folder)
        for name, content in changes.items():
            if isinstance(content, str):
                (folder / name).write_text(content)
            else:
                np.save(folder / name, content, allow_pickle=True)
        with pytest.raises(DataError, match=why):
            load_images(folder)
    (folder / "labels.npy").unlink()
    (folder / "labels.npy").symlink_to(tmp_path / "39labels" / "labels.npy")
    with pytest.raises(DataError, match="link"):
        load_images(folder)


@pytest.mark.parametrize("kind", ["float", "resized", "grey", "rgb", "fortran", "last"])
def test_large_arrays_that_must_be_converted_are_as_small_ones(tmp_path: Path, kind: str) -> None:
    images: np.ndarray = colour(70)
    options: dict = {}
    if kind == "float":
        images = (images / 255).astype(np.float32)
    elif kind == "resized":
        options = {"resolution": 12}
    elif kind == "grey":
        options = {"channels": "grey"}
    elif kind == "rgb":
        images, options = images[:, 0], {"channels": "rgb"}
    elif kind == "fortran":
        images = np.asfortranarray(images)
    else:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    np.save(tmp_path / "x.npy", images)
    small = load_images(tmp_path / "x.npy", **options)
    large = load_images(tmp_path / "x.npy", cache=tmp_path / "cache", **options)
    assert large.fingerprint() == small.fingerprint()
    assert (tmp_path / "cache").exists() == (kind in ("float", "resized", "grey"))


def test_bad_values_in_large_arrays_are_listed_or_left_out(tmp_path: Path) -> None:
    images = colour(70) / 255
    images[66, 0, 0, 0] = 1.5
    images[2, 0, 0, 0] = np.nan
    np.save(tmp_path / "x.npy", images)
    with pytest.raises(DataError, match=r"2 items(.|\n)*image 2: NaN(.|\n)*image 66: values outside"):
        load_images(tmp_path / "x.npy", cache=tmp_path / "cache")
    small = load_images(tmp_path / "x.npy", skip_bad=True)
    large = load_images(tmp_path / "x.npy", cache=tmp_path / "cache", skip_bad=True)
    assert (len(large), large.fingerprint()) == (68, small.fingerprint())
    assert large.skipped == small.skipped


def test_training_reads_its_batches_and_nothing_else(tiny_settings) -> None:
    """The same weights from a store as from memory; the store hands out no more than a block of a step, or a batch of
    the moments, at a time."""
    import torch

    from dpsyngen.config import load_config
    from dpsyngen.diffusion.loss import NoiseLevels
    from dpsyngen.privacy.kernels import KernelChoices
    from dpsyngen.privacy.randomness import Randomness
    from dpsyngen.training import moments
    from dpsyngen.training.networks import make_denoiser
    from dpsyngen.training.plan import plan_moments, shape_of
    from dpsyngen.training.private import Computing, DpSgd, PrivateStep

    count, key = 300, Randomness.from_insecure_seed(1)
    images, labels = colour(count), np.arange(count, dtype=np.int64) % 2
    config = load_config(tiny_settings, preset="cpu-small")
    # Measured, the kernels of the two may differ by chance, and with them the last bits of the weights.
    how = Computing(5, KernelChoices(measure=False))
    weights, fitted = [], []
    for held in (images, _Refuses(images, 16)):
        dataset = ImageDataset(held, labels, ("a", "b"), "x")
        denoiser = make_denoiser(config, shape_of(dataset, config), True, seed=0)
        mechanism = DpSgd(count, 1.0, 1.0, config.private)
        take = PrivateStep(dataset, NoiseLevels(-1.2, 1.2, -3.0, 2.0), 0.1, mechanism, key, how)
        optimizer = torch.optim.SGD(denoiser.parameters())
        for step in range(2):
            assert take(denoiser, optimizer, step)["examples"] > 0
        weights.append(torch.nn.utils.parameters_to_vector(denoiser.parameters()))
        if held is not images:
            held.most = 100
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moments, "_NUMBERS_A_BATCH", 100 * 192)
            fitted.append(moments.estimate_moments(dataset, 2, count, plan_moments(5.0, 2), key, rank=4))
    assert torch.equal(*weights)
    assert all(torch.equal(a, b) for a, b in zip(*(f.to_tensors().values() for f in fitted), strict=True))
