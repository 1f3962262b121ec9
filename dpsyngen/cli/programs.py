"""``dpsyngen programs``: list the programs, show one, save many images."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsyngen.cli.options import AsJson, Quiet, assignments, require_shared
from dpsyngen.console import Console
from dpsyngen.distributed import joined
from dpsyngen.errors import ConfigError, require

if TYPE_CHECKING:
    from dpsyngen.programs import Program

app = typer.Typer(help="Look at images drawn by programs, and save them.", no_args_is_help=True)


@app.callback()
def _root(context: typer.Context) -> None:
    require_shared(f"programs {context.invoked_subcommand}")


Name = Annotated[str, typer.Argument(metavar="NAME", help="which program; see `dpsyngen programs list`")]
Resolution = Annotated[int, typer.Option(help="height and width in pixels, 1 to 2048")]
Channels = Annotated[str, typer.Option(help="grey or rgb")]
Seed = Annotated[int, typer.Option(help="public seed, 0 to 2⁶⁴ − 1")]
_SET = "parameter of the program, such as shape=disc or width=[0.1,0.2]"
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=_SET)]


def _make(name: str, resolution: int, channels: str, seed: int, settings: list[str] | None) -> Program:
    from dpsyngen.programs import make_program

    require(channels in ("grey", "rgb"), "--channels", channels, "grey or rgb")
    params = assignments(settings or [], "name=value, such as shape=disc")
    taken = sorted(params.keys() & {"name", "resolution", "channels", "seed"})
    if taken:
        how = "give it as NAME" if taken[0] == "name" else f"use --{taken[0]}"
        raise ConfigError(f"--set {taken[0]}=… is not a parameter of the program: {how}.")
    return make_program(name, resolution=resolution, channels=1 if channels == "grey" else 3, seed=seed, **params)


@app.command("list")
def list_(quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List the programs with their prior tier: how much each assumes about the private images."""
    from dpsyngen.programs import TIERS, program_names
    from dpsyngen.programs.registry import program_class, usual_tier

    rows: list[dict[str, Any]] = []
    lines = [f"{'program':20}tier  draws"]
    for name in program_names():
        cls = program_class(name)
        tier = usual_tier(cls)
        draws = re.split(r"[.;:] |[.;:]?$", (inspect.getdoc(cls) or "").split("\n")[0], maxsplit=1)[0]
        rows.append({"name": name, "tier": tier, "draws": draws})
        lines.append(f"{name:20}{'–' if tier is None else tier:>4}  {draws}")
    tiers = {number: meaning for number, meaning in TIERS.items() if any(row["tier"] == number for row in rows)}
    lines += ["", *(f"tier {number}: {meaning}" for number, meaning in tiers.items())]
    lines += ["tier –: that of the programs in it", "More on one: dpsyngen programs show NAME"]
    Console(quiet, as_json).result({"programs": rows, "tiers": tiers}, lines)


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
    from dpsyngen.programs import TIERS, save_grid
    from dpsyngen.programs.registry import REQUIRED, parameters, program_class, usual_tier

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
    tier, text, own = usual_tier(cls), inspect.getdoc(cls) or "", parameters(cls)
    needed = [key for key, default in own.items() if default is REQUIRED]
    if settings or not needed:
        _make(name, resolution, channels, seed, settings)  # to say what is wrong with them
    defaults = {key: default for key, default in own.items() if default is not REQUIRED}
    shown = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
    shown |= dict.fromkeys(needed, "(to be given)")
    example = "".join(f" --set '{k}={'[dead-leaves, strokes]' if k == 'programs' else 'dead-leaves'}'" for k in needed)
    lines = [f"{name}, tier {'of the programs in it' if tier is None else f'{tier}: {TIERS[tier]}'}", "", text, ""]
    lines.append("Defaults: " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    lines.append(f"See it: dpsyngen programs show {name} --out {name}.png{example}")
    values = {"name": name, "tier": tier, "description": text, "defaults": defaults, "required": needed}
    console.result(values, lines)


@app.command()
def save(
    name: Name,
    out: Annotated[Path, typer.Option(help="folder to make")],
    count: Annotated[int, typer.Option("-n", "--count", help="how many images")],
    format: Annotated[str, typer.Option(help="folder (PNG files) or parquet")] = "folder",
    resolution: Resolution = 32,
    channels: Channels = "rgb",
    seed: Seed = 0,
    start: Annotated[int, typer.Option(help="index of the first image")] = 0,
    shard_size: Annotated[int, typer.Option(help="images written together")] = 1000,
    workers: Annotated[int | None, typer.Option(help="threads; default: one for each core, at most 8")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="taken after an interruption, but not needed: it begins again")
    ] = False,
    settings: Settings = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Save many images, with a manifest.json that says how to draw them again."""
    from dpsyngen.programs.saving import follow_saving, save_images

    console = Console(quiet, as_json)
    try:
        with joined() as ranks:
            if not ranks.main:
                follow_saving(ranks)
                return
            with ranks.leading():
                program = _make(name, resolution, channels, seed, settings)
                if workers is None:
                    workers = min(8, len(os.sched_getaffinity(0))) if ranks.alone else 1
                options: dict[str, Any] = {"format": format, "start": start, "shard_size": shard_size, "ranks": ranks}
                with console.progress(f"drawing {name}", count, "images") as progress:
                    options |= {"workers": workers, "on_progress": progress.update}
                    manifest = save_images(program, out, count, **options)
    except KeyboardInterrupt:
        stopped = f"stopped before all {count:,} images were saved; nothing was kept."
        raise KeyboardInterrupt(f"{stopped}  Start again with the same command.") from None
    console.result(
        {"path": out, "images": count, "manifest": manifest, "program": program.config()},
        [f"{count:,} images of {name} in {out}; how they were drawn is in {manifest}"],
    )
