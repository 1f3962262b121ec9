"""Coverage-guided fuzzing of the readers with atheris, which is not a dependency: install it where you run this.

    python -m tests.fuzz.atheris_readers KIND FOLDER [libFuzzer options, such as -max_total_time=300]

KIND is png, jpg, webp, bmp, tif, gif, npy, npz, idx, idx.gz or yaml.  FOLDER keeps the corpus and what was found.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dpsyngen.data", "dpsyngen.files", "PIL", "numpy.lib", "yaml", "zipfile"]):
    from PIL import Image

    Image.init()  # the decoders are imported late
    import dpsyngen.data.decode
    import dpsyngen.data.memory
    from dpsyngen.config import load_config
    from dpsyngen.data.decode import BadImage, read_header, read_image
    from dpsyngen.data.quiet import quiet_decoders
    from dpsyngen.errors import DpsyngenError

from tests.fuzz import seeds
from tests.fuzz.properties import is_printable, load_or_refuse, nothing_else_happens, zip_of


def main() -> None:
    kind, corpus, *options = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="dpsyngen-fuzz-"))
    dpsyngen.data.decode.MAX_PIXELS = 2**18
    dpsyngen.data.memory.available_bytes = lambda: 2**25
    name = {"idx": "train-images-idx3-ubyte", "idx.gz": "train-images-idx3-ubyte.gz"}.get(kind, f"a.{kind}")
    path = folder / name
    if kind.startswith("idx"):
        (folder / name.replace("images", "labels").replace("idx3", "idx1")).write_bytes(
            seeds.idx()[kind == "idx.gz"][1]
        )

    def image(data: bytes) -> None:
        # Without the pool of threads, which would cost more than all the rest.
        path.write_bytes(data)
        with nothing_else_happens(folder), quiet_decoders():
            try:
                header = read_header(path)
                pixels = read_image(path, resolution=8, colour="grey" if header.is_grey else "rgb")
            except BadImage:
                return
        assert pixels.shape == (1 if header.is_grey else 3, 8, 8)

    def arrays(data: bytes) -> None:
        path.write_bytes(data)
        load_or_refuse(kind, path)

    def settings(data: bytes) -> None:
        path.write_bytes(data)
        try:
            load_config(file=path)
        except DpsyngenError as error:
            is_printable(str(error))

    place = Path(corpus)
    place.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(_seeds(kind)):
        (place / f"seed-{i}").write_bytes(seed)
    one = image if kind in seeds.images() else settings if kind == "yaml" else arrays
    atheris.Setup([sys.argv[0], f"-artifact_prefix={corpus}/found-", *options, corpus], one)
    atheris.Fuzz()


def _seeds(kind: str) -> tuple[bytes, ...]:
    if kind in seeds.images():
        return seeds.images()[kind]
    if kind == "npz":
        members = seeds.members()
        labelled = [(f"{key}.npy", contents[0]) for key, contents in members.items()]
        return tuple(zip_of([*labelled[1:], ("images.npy", content)]) for content in members["images"])
    if kind == "yaml":
        from tests.fuzz.test_settings import TEXTS

        return TEXTS
    return seeds.npy() if kind == "npy" else (seeds.idx()[kind == "idx.gz"][0],)


if __name__ == "__main__":
    main()
