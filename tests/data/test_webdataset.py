"""WebDataset tars: samples, labels, and tars of strangers."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dpsyngen.data import load_images
from dpsyngen.data.load import whole_source
from dpsyngen.data.webdataset import _members
from dpsyngen.errors import DataError
from tests.data.encoded import pixels, png, samples, write_tar


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_samples_and_labels(tmp_path: Path, layout: int) -> None:
    images = pixels(9)
    content = samples(images, [2, 0, 7] * 3)
    content.insert(2, ("000000.txt", b"a caption"))
    path = write_tar(tmp_path / "s.tar", content, layout)
    data = load_images(path)
    assert np.array_equal(data.images[:, 0], images)
    assert data.class_names == ("0", "2", "7")
    assert data.labels.tolist() == [1, 0, 2] * 3
    unlabelled = load_images(path, labels=False)
    assert unlabelled.labels is None
    assert np.array_equal(unlabelled.array(), data.images)


def test_shards_in_folders_and_patterns(tmp_path: Path) -> None:
    images = pixels(12)
    folder = tmp_path / "shards"
    folder.mkdir()
    for k in range(3):
        write_tar(folder / f"part-{k:03}.tar", samples(images[4 * k : 4 * k + 4], [k] * 4, first=0))
    whole = load_images(folder)
    assert np.array_equal(whole.images[:, 0], images)
    assert whole.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for pattern in ("part-*.tar", "part-{000..002}.tar", "part-00[0-2].tar"):
        assert load_images(str(folder / pattern)).fingerprint() == whole.fingerprint()
    assert len(load_images(str(folder / "part-{001..002}.tar"))) == 8
    with pytest.raises(DataError, match="matches no file"):
        load_images(str(folder / "other-*.tar"))
    (folder / "extra.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="Give a pattern"):
        load_images(folder)


def test_more_shards_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(3):
        write_tar(tmp_path / f"part-{k}.tar", samples(pixels(2)))
    monkeypatch.setattr("dpsyngen.data.folder._MOST_FILES", 2)
    assert len(load_images(str(tmp_path / "part-{0..1}.tar"))) == 4
    for source, why in ((tmp_path, "3 files; at most 2"), (tmp_path / "part-{0..2}.tar", "a range of 3 files")):
        with pytest.raises(DataError, match=why):
            load_images(str(source))


def test_links_count_where_they_were_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "blob", samples(pixels(3)))
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "a.tar").symlink_to(path)
    with pytest.raises(DataError, match="link"):
        load_images(folder)
    assert len(load_images(str(folder / "*.tar"))) == 3


@pytest.mark.parametrize(
    ("labels", "names"),
    [(['{"cls": 1}', '{"cls": 0}'], ("0", "1")), (['{"label": "cat"}', '{"label": "ant"}'], ("ant", "cat"))],
)
def test_labels_in_json(tmp_path: Path, labels: list[str], names: tuple[str, ...]) -> None:
    content = [m for i in range(2) for m in ((f"{i}.png", png(pixels(2)[i])), (f"{i}.json", labels[i].encode()))]
    data = load_images(write_tar(tmp_path / "s.tar", content))
    assert data.class_names == names
    assert data.labels.tolist() == [1, 0]


def test_a_pattern_means_the_same_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "[2024] x").mkdir()
    monkeypatch.chdir(tmp_path / "[2024] x")
    write_tar(Path("s-0.tar"), samples(pixels(2)))
    whole = whole_source("s-*.tar")
    monkeypatch.chdir(tmp_path)
    assert len(load_images(whole)) == 2


def test_labels_that_start_with_a_zero_are_names_of_their_own(tmp_path: Path) -> None:
    values = ["010", "10", "1", "01"]
    data = load_images(write_tar(tmp_path / "s.tar", samples(pixels(4), values)))
    assert [data.class_names[i] for i in data.labels] == values


def test_long_names_and_other_alphabets(tmp_path: Path) -> None:
    for k, layout in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        stem = "ordner/" + "ß" * 150
        path = write_tar(tmp_path / f"{k}.tar", [(f"{stem}.png", png(pixels(1)[0])), (f"{stem}.cls", b"a")], layout)
        assert load_images(path).class_names == ("a",)
        assert [m.name for m in _members(path)] == [f"{stem}.png", f"{stem}.cls"]


def test_bad_samples_are_listed_or_left_out(tmp_path: Path) -> None:
    images = pixels(8)
    content = samples(images[:2], [0, 1])
    content += [("lone.cls", b"1"), ("two.png", png(images[2])), ("two.jpg", b"x"), ("two.cls", b"0")]
    content += [("unlabelled.png", png(images[3])), ("broken.png", png(images[4])[:60]), ("broken.cls", b"0")]
    content += [("odd.png", png(images[5])), ("odd.json", b'{"label": [1]}'), ("nojson.png", png(images[6]))]
    content += [("nojson.json", b"{"), ("latin.png", png(images[7])), ("latin.cls", b"\xe9t\xe9")]
    path = write_tar(tmp_path / "s.tar", content)
    with pytest.raises(DataError) as caught:
        load_images(path)
    message = str(caught.value)
    for text in ("lone: no image", "two: two images", "unlabelled: no label", "broken: ", "odd: its label", "nojson: "):
        assert f"s.tar: {text}" in message
    assert "s.tar: latin: its label in .cls is not UTF-8" in message
    data = load_images(path, skip_bad=True)
    assert np.array_equal(data.images[:, 0], images[:2])
    assert data.labels.tolist() == [0, 1]
    assert len(data.skipped) == 7


def test_a_class_that_loses_all_its_images_is_an_error(tmp_path: Path) -> None:
    content = [*samples(pixels(2), [0, 0]), ("x.png", b"no image"), ("x.cls", b"1")]
    with pytest.raises(DataError, match="no usable image of '1'"):
        load_images(write_tar(tmp_path / "s.tar", content), skip_bad=True)


def test_members_that_are_no_files_lead_nowhere(tmp_path: Path) -> None:
    """Links, devices and names that climb: nothing is unpacked, followed or opened."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(pixels(1)[0]))
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for i, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{i}.png")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        info = tarfile.TarInfo("../../climbs.png")
        data = png(pixels(1)[0])
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match="4 items") as caught:
        load_images(path)
    assert re.search("s.tar: .*, s.tar: .*: a link, which is not followed", str(caught.value))
    assert len(load_images(path, skip_bad=True)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar", "secret.png"]
    assert not (tmp_path.parent.parent / "climbs.png").exists()


def test_sparse_members_are_not_inflated(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(DataError, match="damaged"):
        load_images(tmp_path / "s.tar")


def test_one_stem_twice_is_two_records_of_one_sample(tmp_path: Path) -> None:
    content = [*samples(pixels(2), [0, 1]), *samples(pixels(1), [0])]
    with pytest.raises(DataError, match="000000 do not lie together"):
        load_images(write_tar(tmp_path / "s.tar", content))


def _with_header(changes: dict[int, bytes], *, sum_right: bool = True) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        data = png(pixels(1)[0])
        info = tarfile.TarInfo("0.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    content = bytearray(file.getvalue())
    for offset, value in changes.items():
        content[offset : offset + len(value)] = value
    if sum_right:
        content[148:156] = b" " * 8
        content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not a tar file"),
        (b"not a tar file at all, but long enough to be looked at" * 20, "not a tar file"),
        (b"\x1f\x8b" + bytes(600), "gunzip"),
        (_with_header({0: b"x"}, sum_right=False), "not a tar file"),
        (_with_header({124: b"77777777777\0"}), "truncated within"),
        (_with_header({124: b"\x80" + b"\xff" * 11}), "truncated within"),
        (_with_header({124: b"99999999999\0"}), "not a tar file"),
        (_with_header({124: b"00000700000\0", 156: b"L"}), "more than 65,536"),
        (_with_header({156: b"x"}), "not a tar file, or is damaged"),
    ],
)
def test_tars_that_are_none_or_that_lie(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=why):
        load_images(tmp_path / "s.tar")


def test_a_hole_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    """A sparse file can be as long as its header says."""
    path = tmp_path / "s.tar"
    path.write_bytes(_with_header({124: b"\x80" + (2**40).to_bytes(11, "big")}))
    try:
        os.truncate(path, 2**40 + 2048)
    except OSError:
        pytest.skip("this disk has no files of a terabyte")
    with pytest.raises(DataError, match="over the limit"):
        load_images(path)


def test_truncated(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", samples(pixels(5), [0, 1, 0, 1, 0]))
    os.truncate(path, 3000)
    with pytest.raises(DataError, match="truncated"):
        load_images(path)


@pytest.mark.parametrize(
    ("label", "why"),
    [
        ("x" * 2_000_000, "a label of 2,000,000 bytes"),
        ("y" * 300, "too long for the name of a class"),
        (" ", "label is empty"),
        ("9" * 30, "beyond 64 bits"),
    ],
)
def test_labels_that_are_no_classes(tmp_path: Path, label: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        load_images(write_tar(tmp_path / "s.tar", samples(pixels(1), [label])))


def test_json_as_deep_as_the_sea(tmp_path: Path) -> None:
    content = [("0.png", png(pixels(1)[0])), ("0.json", b"[" * 100_000)]
    with pytest.raises(DataError, match="not JSON"):
        load_images(write_tar(tmp_path / "s.tar", content))


def test_the_own_writer_of_webdataset_is_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    images = pixels(4)
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"{i:04}", "png": png(images[i]), "cls": i % 2, "json": {"text": "x"}})
    data = load_images(tmp_path / "s.tar")
    assert np.array_equal(data.images[:, 0], images)
    assert data.labels.tolist() == [0, 1, 0, 1]


def test_other_members_and_keys_are_named(tmp_path: Path) -> None:
    members = [
        member
        for i, image in enumerate(pixels(4))
        for member in (
            (f"{i}.png", png(image)),
            (f"{i}.txt", b"a caption"),
            (f"{i}.json", b'{"dx": "%s", "age": 4}' % b"ab"[i % 2 : i % 2 + 1]),
        )
    ]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.warns(UserWarning, match=r"ignored beside the images: '\.txt', 'age of \.json', 'dx of \.json'"):
        assert load_images(path).labels is None
    with pytest.warns(UserWarning, match=r"'\.txt', 'age of \.json'\.$"):
        assert load_images(path, label_column="dx").class_names == ("a", "b")


def test_labels_stand_under_one_key(tmp_path: Path) -> None:
    labels = ({"label": 0}, {"class": 6}, {"label": 1, "class": 5})
    members = [(f"{i}.png", png(image)) for i, image in enumerate(pixels(3))]
    members += [(f"{i}.json", json.dumps(label).encode()) for i, label in enumerate(labels)]
    path = write_tar(tmp_path / "a.tar", sorted(members))
    with pytest.raises(DataError, match=r"'class', 'label' could all be the labels.* --label-column"):
        load_images(path)
    with pytest.raises(DataError, match="no label"):
        load_images(path, label_column="class")
    assert load_images(path, label_column="class", skip_bad=True).class_names == ("5", "6")


def test_dots_in_names_are_told_of(tmp_path: Path) -> None:
    members = [(f"scan_1.{i}.{kind}", c) for i in range(2) for kind, c in (("png", png(pixels(1)[0])), ("cls", b"0"))]
    with pytest.raises(DataError, match=r"scan_1\.\d\.png has a dot before its extension"):
        load_images(write_tar(tmp_path / "a.tar", members))


def test_byte_order_marks_are_no_part_of_a_class(tmp_path: Path) -> None:
    members = [
        member
        for i, (kind, label) in enumerate([("cls", "\ufeff0"), ("cls", "0"), ("json", '\ufeff{"label": 0}')])
        for member in ((f"{i}.png", png(pixels(1)[0])), (f"{i}.{kind}", label.encode()))
    ]
    assert load_images(write_tar(tmp_path / "a.tar", members)).class_names == ("0",)
