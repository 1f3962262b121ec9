from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpsyngen.data import load_images
from dpsyngen.data.decode import read_image
from dpsyngen.errors import ConfigError, DataError


def images(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(("image_key", "label_key"), [("images", "labels"), ("x", "y"), ("x_train", "y_train")])
def test_npz(tmp_path: Path, rng: np.random.Generator, image_key: str, label_key: str) -> None:
    x = images(rng, 6, 12, 12)
    path = save(tmp_path / "a.npz", **{image_key: x, label_key: np.array([0, 1, 2] * 2), "other": np.zeros(3)})
    with pytest.warns(UserWarning, match=r"ignored beside the images: 'other'"):
        data = load_images(path)
    assert np.array_equal(data.images, x[:, None])
    assert data.class_names == ("0", "1", "2")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2] * 2
    assert load_images(path, labels=False).labels is None


@pytest.mark.parametrize("key", ["label", "target", "targets", "y"])
def test_npz_other_keys_of_labels(tmp_path: Path, rng: np.random.Generator, key: str) -> None:
    data = load_images(save(tmp_path / "a.npz", images=images(rng, 4, 8, 8), **{key: [3, 1, 3, 1]}))
    assert data.class_names == ("1", "3")


def test_npz_what_could_be_labels_is_not_dropped(tmp_path: Path, rng: np.random.Generator) -> None:
    x = images(rng, 4, 8, 8)
    for dx in (np.array([0, 1, 0, 1]), np.array([[0], [1], [0], [1]], np.uint8), np.array(["a", "b", "a", "b"])):
        path = save(tmp_path / "a.npz", images=x, dx=dx)
        with pytest.raises(DataError, match=r"'dx' could be the labels.*--unconditional"):
            load_images(path)
        assert load_images(path, labels=False).labels is None
    with pytest.raises(DataError, match="'label', 'y' could all be the labels"):
        load_images(save(tmp_path / "b.npz", images=x, label=[0, 1, 0, 1], y=[0, 1, 0, 1]))


def test_npz_what_cannot_be_labels_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    others: dict[str, Any] = {
        "mean": np.zeros(3),
        "age": np.linspace(0, 1, 4),
        "notes": np.array({"by": "hand"}),  # of Python objects, and left pickled
        "x_test": images(rng, 2, 8, 8),
        "y_test": [0, 1],
    }
    path = save(tmp_path / "a.npz", x_train=images(rng, 4, 8, 8), **others, about="drawn")
    with pytest.warns(UserWarning, match="ignored"):
        data = load_images(path)
    assert data.labels is None
    assert all(repr(key) in data.ignored[0] for key in others)
    assert "about" not in data.ignored[0]  # what `dpsyngen sample` says of its images
    path = save(tmp_path / "b.npz", x_train=images(rng, 4, 8, 8), y_train=[0, 1, 0, 1], dx=[1, 0, 1, 0], **others)
    with pytest.warns(UserWarning, match="'dx'"):
        assert load_images(path).num_classes == 2


def test_npz_positional_and_compressed(tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez_compressed(tmp_path / "a.npz", images(rng, 2, 8, 8))
    assert load_images(tmp_path / "a.npz").labels is None


def test_layouts(rng: np.random.Generator) -> None:
    x = images(rng, 4, 3, 16, 16)
    for array in (x, x.transpose(0, 2, 3, 1)):
        assert np.array_equal(load_images((array, None)).images, x)
    assert load_images((x[:, :1].transpose(0, 2, 3, 1), None)).channels == 1


@pytest.mark.parametrize(
    "shape", [(), (4, 3, 8, 3), (4, 1, 8, 1), (4, 8, 8, 4), (4, 64), (16, 16, 3), (8,), (2, 2, 3, 8, 8)]
)
def test_unclear_layouts(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="shape"):
        load_images((np.zeros(shape, dtype=np.uint8), None))


def test_channels_agree_with_pillow_to_the_bit(tmp_path: Path, rng: np.random.Generator) -> None:
    x = images(rng, 1, 16, 16, 3)
    Image.fromarray(x[0]).save(tmp_path / "a.png")
    grey = load_images((x, None), channels="grey", resolution=16)
    assert np.array_equal(grey.images[0], read_image(tmp_path / "a.png", resolution=16, colour="grey"))
    small = load_images((x, None), resolution=8)
    assert np.array_equal(small.images[0], read_image(tmp_path / "a.png", resolution=8, colour="rgb"))


def test_grey_to_rgb_and_resize(rng: np.random.Generator) -> None:
    data = load_images((images(rng, 3, 30, 20), [0, 1, 0]), channels="rgb")
    assert data.images.shape == (3, 3, 32, 32)
    assert np.array_equal(data.images[:, 0], data.images[:, 2])
    assert load_images((images(rng, 3, 20, 20), None), resolution=10).resolution == 10


def test_npy_is_memory_mapped(tmp_path: Path, rng: np.random.Generator) -> None:
    x = images(rng, 5, 8, 8)
    np.save(tmp_path / "a.npy", x)
    data = load_images(tmp_path / "a.npy")
    assert isinstance(data.images, np.memmap)
    assert not data.images.flags.writeable
    assert np.array_equal(data.batch([1, 2]), x[1:3, None])
    assert not isinstance(data.batch([1]), np.memmap)
    assert data.fingerprint() == load_images((x, None)).fingerprint()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_in_0_1(rng: np.random.Generator, dtype: Any) -> None:
    x = images(rng, 3, 8, 8)
    assert np.array_equal(load_images(((x / 255).astype(dtype), None)).images[:, 0], x)


def test_bad_floats(rng: np.random.Generator) -> None:
    x = rng.random((5, 8, 8))
    x[1, 0, 0], x[3, 7, 7], x[4, 1, 1] = np.nan, 1.5, -np.inf
    with pytest.raises(DataError, match="3 items") as caught:
        load_images((x, [0, 1, 0, 1, 1]))
    assert "image 1, image 4: NaN" in str(caught.value)
    assert "image 3: values outside" in str(caught.value)
    data = load_images((x, ["a", "b", "a", "b", "b"]), skip_bad=True)
    assert (len(data), len(data.skipped), data.class_names) == (2, 3, ("a", "b"))
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_floats_of_another_range(skip_bad: bool) -> None:
    with pytest.raises(DataError, match=r"divide 0\.\.255 by 255"):
        load_images((np.full((3, 8, 8), 200.0), None), skip_bad=skip_bad)


@pytest.mark.parametrize("dtype", [np.int64, complex, "U3"])
def test_other_types(dtype: Any) -> None:
    with pytest.raises(DataError, match="uint8"):
        load_images((np.zeros((2, 8, 8), dtype=dtype), None))


def test_labels(rng: np.random.Generator, tmp_path: Path) -> None:
    x = images(rng, 3, 8, 8)
    for labels, names, index in [
        (np.array([10, 2, 10]), ("2", "10"), [1, 0, 1]),
        (np.array([[1], [0], [1]]), ("0", "1"), [1, 0, 1]),
        (np.array(["b", "a", "b"]), ("a", "b"), [1, 0, 1]),
        (np.array(["b", "a", "b"], object), ("a", "b"), [1, 0, 1]),  # a column of pandas
        (np.array([10, 2, 10], object), ("2", "10"), [1, 0, 1]),
    ]:
        data = load_images((x, labels))
        assert data.class_names == names
        assert data.labels is not None
        assert data.labels.tolist() == index
    path = save(tmp_path / "a.npz", images=x, labels=[0, 2, 0], class_names=["x", "y", "z"])
    assert load_images(path).class_names == ("x", "y", "z")
    path = save(tmp_path / "b.npz", images=x, labels=["z", "x", "z"], class_names=["x", "y", "z"])
    data = load_images(path)
    assert data.labels is not None
    assert data.labels.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([0, 1], "3 images but 2 labels"),
        ([0.0, 1.0, np.nan], "float64"),
        ([-1, 0, 1], "1 labels are negative"),
        (np.eye(3, dtype=int), "one-hot"),
        (np.array([None, 1, 2]), "1 labels are missing"),
        (np.array(["a", None, "b"], object), "1 labels are missing"),
        (np.array([0, float("nan"), 1], object), "1 labels are missing"),
        (np.array(["a", 1, "b"], object), "types 'int', 'str'"),
        (np.array(["a", "b" * 300, "b"], object), "more than 255"),
        (np.array([[1, 1], [0, 0], [0, 1]]), "several labels"),
    ],
)
def test_bad_labels(rng: np.random.Generator, labels: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        load_images((images(rng, 3, 8, 8), labels))


@pytest.mark.parametrize(
    ("labels", "names", "match"),
    [([0, 3, 1], ["x", "y"], "2 class names"), (["q", "x", "x"], ["x", "y"], "'q'"), ([0, 1, 1], [1, 2], "strings")],
)
def test_bad_class_names(rng: np.random.Generator, tmp_path: Path, labels: Any, names: Any, match: str) -> None:
    path = save(tmp_path / "a.npz", images=images(rng, 3, 8, 8), labels=labels, class_names=names)
    with pytest.raises(DataError, match=match):
        load_images(path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.zeros((8, 8)), np.zeros((9, 9))]
    np.savez(tmp_path / "a.npz", images=ragged)
    np.save(tmp_path / "a.npy", ragged, allow_pickle=True)
    for name in ("a.npz", "a.npy"):
        with pytest.raises(DataError, match="Python objects"):
            load_images(tmp_path / name)
    with pytest.raises(DataError, match="Python objects"):
        load_images((ragged, None))


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'pictures'"):
        load_images(save(tmp_path / "a.npz", pictures=np.zeros((2, 8, 8), dtype=np.uint8)))
    with pytest.raises(DataError, match="no images"):
        load_images(save(tmp_path / "b.npz", images=np.zeros((0, 8, 8), dtype=np.uint8)))


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_broken_files(tmp_path: Path, rng: np.random.Generator, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    (np.savez if suffix == "npz" else np.save)(path, images(rng, 9, 8, 8))
    whole = path.read_bytes()
    for content in (b"", b"no array", whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            load_images(path)


def test_corrupt_compressed_member(tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=images(rng, 40, 16, 16))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[600:5000] = b"\xff" * 4400
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        load_images(tmp_path / "a.npz")


def test_zip_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 28, 28)}
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("images.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(DataError, match="GiB of memory"):
        load_images(tmp_path / "a.npz")


def test_large_declared_arrays_respect_the_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((1000, 8, 8), dtype=np.uint8))
    monkeypatch.setattr("dpsyngen.data.store.memory_bytes", lambda: (0, 100_000))
    with pytest.raises(DataError, match="memory"):
        load_images(tmp_path / "a.npz")


@pytest.mark.parametrize("source", [(np.zeros((2, 8, 8)),), 3, None, "", np.zeros((2, 8, 8), dtype=np.uint8)])
def test_sources_of_the_wrong_kind(source: Any) -> None:
    with pytest.raises(ConfigError):
        load_images(source)


def test_ragged_lists() -> None:
    with pytest.raises(DataError, match=r"np\.stack"):
        load_images(([[[0.0] * 8] * 8, [[0.0] * 9] * 9], None))  # type: ignore[arg-type]


def test_lists_of_images_in_any_form_and_tensors_of_any_type(rng: np.random.Generator, tmp_path: Path) -> None:
    """Each is decoded by itself: colour of a palette, 16 bits, bfloat16, sizes that differ."""
    import torch

    colour = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    palette = Image.fromarray(colour).quantize(8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    deep = Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16))
    given = [
        palette,
        deep,
        torch.ones(3, 8, 8).bfloat16(),
        tmp_path / "a.png",
        (tmp_path / "a.png").read_bytes(),
        colour,
    ]
    got = load_images((given, [0, 1, 0, 1, 0, 1]), resolution=8)  # type: ignore[arg-type]
    assert got.channels == 3
    assert np.array_equal(got.array()[0].transpose(1, 2, 0), np.asarray(palette.convert("RGB")))
    assert got.array()[1].min() == got.array()[2].min() == 255
    assert all(np.array_equal(image.transpose(1, 2, 0), colour) for image in got.array()[3:])
    with pytest.raises(DataError, match="image 1: not an image"):
        load_images(([palette, b"no image"], None))  # type: ignore[arg-type]
    half = torch.full((2, 8, 8), 0.5)
    for tensor in (half.bfloat16().requires_grad_(), half.half(), half.to(torch.float8_e4m3fn)):
        assert load_images((tensor, None)).array().min() == 128  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "value", "value_range", "level"),
    [
        (bool, 1, None, 255),
        (np.uint16, 65535, None, 255),
        (">u2", 4095, (0, 4095), 255),
        (np.uint8, 1, (0, 1), 255),
        (np.int16, -1024, (-1024, 3071), 0),
        (np.int16, 5000, (-1024, 3071), 255),
        (np.int64, 51, (0, 255), 51),
        (np.float32, -1, (-1, 1), 0),
        (np.float32, 1, (1, 0), 0),
    ],
)
def test_value_ranges_of_arrays(
    tmp_path: Path, dtype: Any, value: float, value_range: tuple[float, float] | None, level: int
) -> None:
    given = np.full((40, 8, 8), value, dtype=dtype)
    np.save(tmp_path / "x.npy", given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source, options in (
            ((given, None), {}),
            ((list(given), None), {}),
            (tmp_path / "x.npy", {}),
            (tmp_path / "x.npy", {"cache": tmp_path / "cache"}),
        ):
            got = load_images(source, value_range=value_range, **options)  # type: ignore[arg-type]
            assert np.unique(got.array()).tolist() == [level]


@pytest.mark.parametrize("value_range", [(0, 0), (0,), (0, np.nan), (0, np.inf), "ab", 3])
def test_value_ranges_that_are_none(value_range: Any) -> None:
    with pytest.raises(ConfigError, match="value_range"):
        load_images((np.zeros((2, 8, 8)), None), value_range=value_range)


def test_images_that_are_nearly_black_are_told_of(rng: np.random.Generator) -> None:
    twelve = rng.integers(0, 4096, (20, 8, 8)).astype(np.uint16)
    for dark in (twelve, (twelve > 2000).astype(np.uint8), twelve / 65535):
        with pytest.warns(UserWarning, match="--value-range"):
            load_images((dark, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images((twelve, None), value_range=(0, 4095))
        load_images(((twelve > 2000).astype(np.float32), None))


def test_masked_images_are_refused() -> None:
    """Taken as an array they would show what was masked."""
    masked = np.ma.MaskedArray(np.zeros((2, 8, 8), dtype=np.uint8), mask=True)
    with pytest.raises(DataError, match="masked"):
        load_images((masked, None))


@pytest.mark.parametrize("shape", [(2, 0, 8), (2, 8, 0), (10**12, 0, 8), (10**12, 0, 0), (3, 0, 8, 3)])
def test_images_without_pixels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for dtype in (np.uint8, np.float32):
        array = np.zeros(shape, dtype=dtype)
        np.save(tmp_path / "a.npy", array)
        for source in ((array, None), tmp_path / "a.npy"):
            with pytest.raises(DataError, match="are empty"):
                load_images(source)


@pytest.mark.parametrize("shape", [(1, 65_536, 2), (1, 1, 2**31), (1, 8200, 8200), (1, 3, 2**20, 2**20)])
def test_images_that_are_too_large(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="at most"):
        load_images((np.broadcast_to(np.uint8(0), shape), None))


@pytest.mark.parametrize("values", [np.inf, -np.inf, np.nan, 65504.0])
def test_half_precision_that_is_not_in_range(values: float) -> None:
    x = np.zeros((2, 8, 8), dtype=np.float16)
    x[1, 3, 3] = values
    with pytest.raises(DataError, match="image 1"):
        load_images((x, None))


@pytest.mark.parametrize(
    "text", ["x" * 5000, "a/" * 3000, "~nobody-of-this-name/x", "a\x00b", "\ud800", "\x1b[2J\u202e"]
)
def test_paths_that_cannot_be(text: str) -> None:
    with pytest.raises(DataError) as caught:
        load_images(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


def test_paths_of_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    np.save(tmp_path / "a.npy", images(rng, 2, 8, 8))

    class Bytes(os.PathLike[Any]):
        def __fspath__(self) -> bytes:
            return os.fsencode(tmp_path / "a.npy")

    assert len(load_images(Bytes())) == 2
