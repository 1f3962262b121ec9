"""``dpsyngen programs``: list the programs, show one, save many images."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsyngen.cli.assignments import assignments
from dpsyngen.cli.options import AsJson, Quiet
from dpsyngen.cli.ranks import require_shared
from dpsyngen.errors import ConfigError

if TYPE_CHECKING:
    from dpsyngen.programs import Program

app = typer.Typer(
    help="Look at images drawn by programs, and save them.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(context: typer.Context) -> None:
    require_shared(f"programs {context.invoked_subcommand}")


Name = Annotated[str, typer.Argument(metavar="NAME", help="which program; see `dpsyngen programs list`")]
Resolution = Annotated[int, typer.Option(help="height and width in pixels, 1 to 2048")]
Channels = Annotated[str, typer.Option(help="grey or rgb")]
Seed = Annotated[int, typer.Option(help="public seed, 0 to 2⁶⁴ − 1")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="parameter of the program, such as shape=disc or width=[0.1,0.2]"),
]


def _make(name: str, resolution: int, channels: str, seed: int, settings: list[str] | None) -> Program:
    from dpsyngen.programs import make_program

    if channels not in ("grey", "rgb"):
        raise ConfigError(f"--channels is {channels!r}, but must be grey or rgb.")
    params = assignments(settings or [], "name=value, such as shape=disc")
    taken = sorted(params.keys() & {"name", "resolution", "channels", "seed"})
    if taken:
        raise ConfigError(f"--set {taken[0]}=… is not a parameter of the program: use --{taken[0]}.")
    return make_program(name, resolution=resolution, channels=1 if channels == "grey" else 3, seed=seed, **params)


def _summary(cls: type[Program]) -> str:
    return re.split(r"[.;:] |[.;:]?$", (inspect.getdoc(cls) or "").split("\n")[0], maxsplit=1)[0]


def _tier(cls: type[Program]) -> int | None:
    """The prior tier of a program with its default parameters; None if it is that of programs which must be given."""
    from dataclasses import MISSING, fields

    if isinstance(cls.prior_tier, int):
        return cls.prior_tier
    if any(f.default is MISSING for f in fields(cls) if f.name not in ("resolution", "channels", "seed")):
        return None
    return cls(resolution=8, channels=1).prior_tier


@app.command("list")
def list_(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the programs with their prior tier: how much each assumes about the private images."""
    from dpsyngen.console import Console
    from dpsyngen.programs import TIERS, program_names
    from dpsyngen.programs.registry import program_class

    classes = {name: program_class(name) for name in program_names()}
    rows = [{"name": name, "tier": _tier(cls), "draws": _summary(cls)} for name, cls in classes.items()]
    width = max(map(len, classes))
    lines = [f"{'program':{width}}  tier  draws"]
    lines += [f"{r['name']:{width}}  {'–' if r['tier'] is None else r['tier']:>4}  {r['draws']}" for r in rows]
    lines += ["", *(f"tier {number}: {meaning}" for number, meaning in TIERS.items())]
    lines += ["tier –: that of the programs in it", "More on one: dpsyngen programs show NAME"]
    Console(quiet, as_json).result({"programs": rows, "tiers": TIERS}, lines)


@app.command()
def show(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="PNG file for a grid of its images")] = None,
    resolution: Resolution = 32,
    channels: Channels = "grey",
    count: Annotated[int, typer.Option("-n", "--count", help="images in the grid")] = 64,
    seed: Seed = 0,
    settings: Settings = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Describe a program and its parameters; with --out, draw a grid of its images."""
    from dataclasses import MISSING, fields

    from dpsyngen.console import Console
    from dpsyngen.programs import TIERS, Program, save_grid
    from dpsyngen.programs.registry import program_class

    console = Console(quiet, as_json)
    cls = program_class(name)
    if out is not None:
        program = _make(name, resolution, channels, seed, settings)
        save_grid(program, out, count=count)
        console.result(
            {"name": name, "tier": program.prior_tier, "path": out, "images": count, "program": program.config()},
            [f"{count} images of {name} in {out}", f"tier {program.prior_tier}: {TIERS[program.prior_tier]}"],
        )
        return
    if settings:
        _make(name, resolution, channels, seed, settings)  # to say what is wrong with them
    tier, text = _tier(cls), inspect.getdoc(cls) or ""
    common = {field.name for field in fields(Program)}
    own = [field for field in fields(cls) if field.name not in common]
    console.result(
        {
            "name": name,
            "tier": tier,
            "description": text,
            "defaults": {f.name: f.default for f in own if f.default is not MISSING},
            "required": [f.name for f in own if f.default is MISSING],
        },
        [
            f"{name}, tier {'of the programs in it' if tier is None else f'{tier}: {TIERS[tier]}'}",
            "",
            text,
            "",
            "Defaults: " + ", ".join(f"{f.name}={_shown(f.default, MISSING)}" for f in own),
            f"See it: dpsyngen programs show {name} --out {name}.png" + _needed(own, MISSING),
        ],
    )


def _shown(default: Any, missing: Any) -> str:
    if default is missing:
        return "(to be given)"
    return str(list(default)) if isinstance(default, tuple) else str(default)


def _needed(own: list[Any], missing: Any) -> str:
    needed = [f.name for f in own if f.default is missing]
    return "".join(f" --set '{n}={'[dead-leaves, strokes]' if n == 'programs' else 'dead-leaves'}'" for n in needed)


@app.command()
def save(
    name: Name,
    out: Annotated[Path, typer.Option(help="folder to make (or, with --resume, to continue)")],
    count: Annotated[int, typer.Option("-n", "--count", help="how many images")],
    format: Annotated[str, typer.Option(help="folder, zip, webdataset, parquet or npy")] = "folder",
    resolution: Resolution = 32,
    channels: Channels = "rgb",
    seed: Seed = 0,
    start: Annotated[int, typer.Option(help="index of the first image")] = 0,
    shard_size: Annotated[int, typer.Option(help="images written together")] = 1000,
    workers: Annotated[int | None, typer.Option(help="processes; default: one for each core")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a job that was interrupted")] = False,
    settings: Settings = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Save many images, with a manifest.json that says how to draw them again."""
    from dpsyngen.console import Console
    from dpsyngen.distributed import joined
    from dpsyngen.programs.saving import follow_saving, save_images

    console = Console(quiet, as_json)
    done: int | None = None
    try:
        with joined() as ranks:
            if not ranks.main:
                follow_saving(ranks)
                return
            with ranks.leading():
                program = _make(name, resolution, channels, seed, settings)
                if workers is None:
                    # A process takes a second or two to start.
                    workers = min(len(os.sched_getaffinity(0)), max(1, count // 4000)) if ranks.alone else 1
                with console.progress(f"drawing {name}", count, "images") as progress:

                    def on_progress(now: int) -> None:
                        nonlocal done
                        if done is None:
                            progress.start = now
                        done = now
                        progress.update(now)

                    manifest = save_images(
                        program,
                        out,
                        count,
                        format=format,
                        start=start,
                        shard_size=shard_size,
                        workers=workers,
                        resume=resume,
                        on_progress=on_progress,
                        ranks=ranks,
                    )
    except KeyboardInterrupt:
        text = f"Stopped: {done or 0:,} of {count:,} images are saved.  Continue with the same command and --resume."
        console.result({"error": {"kind": "interrupted", "message": text}}, [text])
        raise typer.Exit(130) from None
    console.result(
        {"path": out, "images": count, "manifest": manifest, "program": program.config()},
        [f"{count:,} images of {name} in {out}; how they were drawn is in {manifest}"],
    )


@app.command()
def gallery(
    out: Annotated[Path, typer.Option(help="folder that gets gallery.md and the folder gallery/")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a page with pictures of every program."""
    from dpsyngen.console import Console
    from dpsyngen.programs.gallery import write_gallery

    page = write_gallery(out)
    Console(quiet, as_json).result({"path": page}, [f"The gallery is {page}"])
