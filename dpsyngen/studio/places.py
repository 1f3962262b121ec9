"""Which files the studio touches: those below the folders that were named when it was started, and no other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpsyngen.data.named import parse_name
from dpsyngen.errors import ConfigError, listed, printable, require
from dpsyngen.files import expanded
from dpsyngen.training.run import Run


@dataclass(frozen=True)
class Places:
    """The folder of runs, and the folders in which images and other files may lie; all of them resolved."""

    runs: Path
    folders: tuple[Path, ...]

    def inside(self, text: str, what: str) -> Path:
        """The path `text` (relative: to the first folder), without links; ConfigError if it leads outside."""
        require(text.strip(), what, text, "the path of a file or folder")
        try:
            path = (self.folders[0] / expanded(text.strip())).resolve()
        except (OSError, ValueError, RuntimeError):
            raise ConfigError(f"{what} is {printable(text)!r}, which cannot be a path.") from None
        if any(path.is_relative_to(folder) for folder in (self.runs, *self.folders)):
            return path
        raise ConfigError(
            f"{what} is {printable(text)!r}, which is outside the folders that the studio may use: "
            f"{listed(self.folders)}.  Choose a path inside, or start it with `dpsyngen studio --folder FOLDER`."
        )

    def short(self, path: Path) -> str:
        """A path as :meth:`inside` takes it, relative where it can be."""
        return str(path.relative_to(self.folders[0]) if path.is_relative_to(self.folders[0]) else path)

    def source(self, text: str, what: str = "the images") -> str:
        """Images as :func:`dpsyngen.load_images` takes them: a named set, or a path that is :meth:`inside`."""
        named = parse_name(text.strip())
        if named is not None and not (self.folders[0] / text.strip()).exists():
            return ":".join(named)
        path = self.inside(text, what)
        if not path.exists():
            raise ConfigError(
                f"{what}: there is nothing at {printable(path)}.  Give a folder or file of images, or a public set: "
                "digits, fashion-mnist, mnist or cifar10."
            )
        return str(path)

    def path_of(self, name: str) -> Path:
        """Where the run `name` is, or would be; ConfigError unless that is a plain name."""
        what = "the name of the run"
        plain = name.strip() == name and name not in ("", ".", "..") and not name.startswith(".")
        ok = plain and not any(c in "/\\%?#" or not c.isprintable() for c in name) and len(name.encode()) <= 200
        require(ok, what, name, "a plain name such as digits-1, without / and not beginning with a dot")
        path = self.runs / name
        require(path.resolve() == path, what, name, "the name of a folder, not of a link")
        return path

    def run(self, name: str) -> Run:
        """The run `name`; RunError if there is none."""
        return Run(self.path_of(name))

    def names(self) -> list[str]:
        """All runs, the newest first."""
        found = [p.parent for p in self.runs.glob("*/run.json") if p.parent.resolve() == p.parent]
        return [p.name for p in sorted(found, key=lambda p: (p / "run.json").stat().st_mtime, reverse=True)]
