"""Folders of DICOM files, and what is set for them."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from dpsyngen.config import load_config
from dpsyngen.data import folder, load_images
from dpsyngen.data.load import load_private
from dpsyngen.errors import ConfigError, DataError
from tests.data.test_dicom import FILES, PLANTED, content_of, made

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("kind", ["array", "npy", "npz", "Pillow", "map-style"])
def test_a_window_is_refused_where_it_would_do_nothing(kind: str, tmp_path: Path) -> None:
    images = np.arange(768).astype(np.uint8).reshape(3, 16, 16)
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", images=images)
    sources = {"array": (images, None), "npy": tmp_path / "a.npy", "npz": tmp_path / "a.npz"}
    sources |= {"Pillow": ([Image.fromarray(image) for image in images], None)}
    sources |= {"map-style": TensorDataset(torch.from_numpy(images))}
    with pytest.raises(DataError, match="a window is for DICOM files"):
        load_images(sources[kind], window=(40, 400))


def test_settings_of_windows_and_frames() -> None:
    def config(privacy: dict[str, Any] | None = None, **data: Any) -> Any:
        return load_config({"data": data, "privacy": privacy or {}}, preset="cpu-small")

    assert config(window="40,400").data.window == (40, 400)
    for window in ("40", "40,4,4", "a,b", "0,inf"):
        with pytest.raises(ConfigError, match=r"data\.window"):
            config(window=window)
    assert config(frames="first").data.frames == "first"
    with pytest.raises(ConfigError, match="--group-size"):
        config(frames="all")
    assert config({"group_size": 1}, frames="all").privacy.group_size == 1
    for wrong in ({"window": (40, 0)}, {"window": (40, -1)}, {"window": 40}, {"frames": "last"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            load_images(FILES, **wrong)  # type: ignore[arg-type]


def test_pictures_of_one_grey_are_told_of(tmp_path: Path) -> None:
    """As CT is whose file has no window: its values are a small part of what 16 bits can hold."""
    (tmp_path / "a.dcm").write_bytes(content_of("CT_small.dcm"))
    with pytest.warns(UserWarning, match="--window CENTRE,WIDTH"):
        load_images(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_images(tmp_path, window=(40, 400)).images.shape == (1, 1, 32, 32)


# ------------------------------------------------------------------------------------------------------------- folders


def export_to(folder: Path) -> Path:
    """As a hospital exports: nested, without suffixes, of several sizes; the planted name wherever it may stand."""
    rng = np.random.default_rng(0)
    lines = ["file,diagnosis"]
    for i in range(24):
        pixels = rng.integers(0, 200 + 100 * (i % 2), (2, 20 + i % 3, 24), dtype=np.uint16)
        content = made(
            pixels if i == 5 else pixels[0],
            StudyDescription=PLANTED,
            ImageComments=PLANTED,
            WindowCenterWidthExplanation=PLANTED,
            WindowCenter=150,
            WindowWidth=300,
            InstitutionAddress=PLANTED * 100,
        )
        path = folder / f"study{i % 4}" / f"series{i % 3}" / f"IM{i:04}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PLANTED.encode().ljust(128) + content[128:])
        lines.append(f"{path.relative_to(folder)},{('benign', 'malignant')[i % 2]}")
    (folder / "DICOMDIR").write_bytes(content_of("dicomdirtests/DICOMDIR"))
    (folder / "study0" / "broken").write_bytes(content[:-300])
    lines.append("study0/broken,benign")
    (folder.parent / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.slow
def test_from_a_hospitals_files_to_a_bundle_and_nothing_of_a_header_is_anywhere(call, tmp_path: Path) -> None:
    from tests.cli.test_app import SMALL
    from tests.cli.test_evaluate import QUICK

    data, run, cache = export_to(tmp_path / "export"), tmp_path / "run", tmp_path / "cache"
    given = ["train", "--data", data, "--labels", tmp_path / "labels.csv", "--epsilon", 3, "--resolution", 16]
    given += [*SMALL, "--set", f"data.cache={cache}", "--out", run]
    said = ""
    code, out, err = call(*given)
    said += out + err
    assert code == 2, err
    assert "study0/broken: broken or truncated pixel data" in err
    assert "IM0005: 2 frames: say --frames first, or all" in err
    assert not run.exists()
    for command in (
        [*given, "--frames", "first", "--skip-bad"],
        ["sample", run, "-n", 4, "--out", tmp_path / "samples"],
        ["evaluate", run, "--test", data, "--labels", tmp_path / "labels.csv", "-n", 8, *QUICK, "--bootstrap", 0],
        ["memorisation", run, "-n", 8],
        ["report", run],
        ["release", run, tmp_path / "bundle.zip"],
        ["doctor", run],
    ):
        code, out, err = call(*command)
        said += out + err
        assert code in (0, 5), err
    assert json.loads((run / "release" / "generator.json").read_text())["class_names"] == ["benign", "malignant"]
    with zipfile.ZipFile(tmp_path / "bundle.zip") as bundle:
        bundle.extractall(tmp_path / "unpacked")
    assert list(cache.rglob("images.npy"))
    for text in (said, *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and data not in p.parents)):
        content = text.encode() if isinstance(text, str) else text
        assert PLANTED[:9].encode() not in content
        assert PLANTED[:9].encode("utf-16-le") not in content


def test_frames_are_images_of_one_person(tmp_path: Path) -> None:
    frames = np.stack([np.full((16, 16), level, dtype=np.uint8) for level in (10, 100, 250)])
    for name, pixels in (("a/x", frames), ("a/y", frames[0]), ("b/z", frames[::-1])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(made(pixels))
    (tmp_path / "b" / "w").write_bytes(made(frames)[:-400])
    Image.fromarray(frames[1]).save(tmp_path / "b" / "v.png")
    with pytest.raises(DataError, match=r"(?s)b/w, frame 1, b/w, frame 2, b/w, frame 3: broken"):
        load_images(tmp_path, frames="all")
    for cache in ("auto", str(tmp_path.parent / "cache")):
        data = load_images(tmp_path, frames="all", skip_bad=True, cache=cache)
        assert data.array()[:, 0, 0, 0].tolist() == [10, 100, 250, 10, 100, 250, 100, 10]
        assert data.labels is not None
        assert data.labels.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(DataError, match=r"a/x, b/w, b/z: 3 frames, which are of one person, but the group size is 2"):
        load_images(tmp_path, frames="all", group_size=2)
    assert load_images(tmp_path, frames="first", skip_bad=True).array()[:, 0, 0, 0].tolist() == [10, 10, 100, 250]


def test_a_file_may_have_any_number_of_frames_where_images_of_each_person_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(made(np.arange(1001 * 64, dtype=np.uint16).astype(np.uint8).reshape(1001, 8, 8)))
    (tmp_path / "patients.csv").write_text("file_name,person\nx,1\n")
    table = tmp_path / "patients.csv"
    settings = {"groups": str(table), "most_per_person": 2}
    data = {"frames": "all", "resolution": 8, "channels": "grey"}
    wanted = load_config({"data": data, "privacy": settings}, preset="cpu-small")
    assert len(load_private(tmp_path, wanted, groups=table)) == 1001
    with pytest.raises(DataError, match="1,001 frames, which are of one person, but the group size is 1,000; give"):
        load_images(tmp_path, frames="all", groups=table)
    monkeypatch.setattr(folder, "_MOST_FRAMES", 1000)
    with pytest.raises(DataError, match="1,001 frames; at most 1,000 are read"):
        load_private(tmp_path, wanted, groups=table)


def test_class_folders_may_be_nested_for_dicom(tmp_path: Path) -> None:
    for name in ("benign/p1/s1/IM1", "benign/p2/IM1.dcm", "malignant/p3/s2/IM7"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content_of("MR_small.dcm"))
    data = load_images(tmp_path)
    assert data.class_names == ("benign", "malignant")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]
    Image.new("L", (8, 8)).save(tmp_path / "benign" / "p1" / "a.png")
    with pytest.raises(DataError, match="a folder inside a class folder"):
        load_images(tmp_path)
