"""The commands that take images or networks out of a generator: sample, export.  Thin: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpsyngen.cli.options import AsJson, Count, Device, Guidance, Quiet, Sampler, SamplerSteps
from dpsyngen.cli.release import claim
from dpsyngen.console import Console
from dpsyngen.errors import require

Source = Annotated[
    Path, typer.Argument(metavar="RUN", help="a run directory, a copy of its release folder, or a bundle (.zip)")
]


def sample(
    run: Source,
    out: Annotated[Path, typer.Option(help="folder for PNGs and metadata.csv, or a .npz or .parquet file")],
    count: Count = 1000,
    classes: Annotated[list[str] | None, typer.Option(help="comma-separated; default: all")] = None,
    sampler: Sampler = None,
    steps: SamplerSteps = None,
    guidance: Guidance = None,
    churn: Annotated[float | None, typer.Option(help="stochasticity of heun")] = None,
    seed: Annotated[int | None, typer.Option(help="public seed; default: a random one, written down")] = None,
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 256,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw images from a trained generator; costs no privacy, however many."""

    from dpsyngen.distributed import joined
    from dpsyngen.generator.classes import from_text
    from dpsyngen.generator.ranks import follow, handlers, open_everywhere, stream
    from dpsyngen.generator.samples import check_target, write_samples
    from dpsyngen.release.place import find
    from dpsyngen.version import __version__

    console = Console(quiet, as_json)
    with joined() as ranks:
        if not ranks.main:
            follow(ranks, handlers(ranks))
            return
        with ranks.leading():
            check_target(out)
            require(batch_size >= 1, "--batch-size", batch_size, "at least 1")
            require(count >= 1, "-n", count, "at least 1")
            place = find(run)
            generator = open_everywhere(ranks, place.release, device)
            labels = generator.labels(count, from_text(classes, generator.class_names) if classes else None)
            settings = generator.settings(seed=seed, sampler=sampler, steps=steps, guidance=guidance, churn=churn)
            about = {"dpsyngen": __version__, "private": generator.private, "count": count, **settings.model_dump()}
            batches = stream(ranks, generator, count, settings, labels=labels, batch_size=batch_size)
            if count <= batch_size * (ranks.count - 1):
                console.note(f"some of the {ranks.count} processes have nothing to do: use a smaller --batch-size")
            with console.progress("sampling", count, "images") as progress:
                write_samples(out, batches, labels, generator.class_names, about, progress.update)
    console.result(
        {"path": out, "images": count, "class_names": generator.class_names, **about},
        [f"{count:,} images in {out}" + ("" if generator.private else "  (generator is NOT PRIVATE)")],
    )


def export(
    run: Source,
    out: Annotated[Path, typer.Option(help="folder to make")],
    format: Annotated[str, typer.Option(help="diffusers")] = "diffusers",
    not_private: Annotated[bool, typer.Option("--not-private", help="export it without a guarantee")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a generator for other tools: a folder for diffusers and the Hub."""
    from dpsyngen.files import require_absent_or_empty
    from dpsyngen.generator.guarantee import Guarantee
    from dpsyngen.release.bundle import check_against_ledger
    from dpsyngen.release.place import export_release, find
    from dpsyngen.training.run import Run

    require(format == "diffusers", "--format", format, "diffusers")
    require_absent_or_empty(out, "--out")
    place = find(run)
    if place.run is not None:
        check_against_ledger(Run(place.run))
    done = export_release(place.release, out, not_private=not_private)
    c = done.certificate
    Console(quiet, as_json).result(
        {
            "path": done.path,
            "format": format,
            "files": done.files,
            **claim(c),
            "certificate_sha256": done.certificate_sha256,
        },
        [
            f"{done.path}: {len(done.files)} files for diffusers",
            Guarantee(c).line,
            "README.md says how to load it; the Python files in it are code, which a stranger should read first",
        ],
    )
