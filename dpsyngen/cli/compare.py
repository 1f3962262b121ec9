"""The command `dpsyngen compare`."""

from __future__ import annotations

import time
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsyngen.cli.options import AsJson, Device, Quiet
from dpsyngen.console import Console
from dpsyngen.distributed import END, Ranks, joined, numbers
from dpsyngen.errors import ConfigError, DataError, require
from dpsyngen.files import require_absent_or_empty

if TYPE_CHECKING:
    from dpsyngen.experiments.experiment import Experiment, Status
    from dpsyngen.experiments.spec import Job, Spec
    from dpsyngen.training.plan import Shape


def compare(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="YAML file, name that ships, or experiment's folder")],
    out: Annotated[Path | None, typer.Option(help="folder to make or to go on with; all of it is PRIVATE")] = None,
    data: Annotated[str | None, typer.Option(help="private images instead of data.train")] = None,
    test: Annotated[str | None, typer.Option(help="real test images instead of data.test")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done, cost and take")] = False,
    processes: Annotated[int, typer.Option(help="runs at a time, each with its share of the cores")] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="try failed jobs again")] = False,
    tables: Annotated[bool, typer.Option("--tables", help="only write tables and report of what is there")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare variants, ε and settings: a grid of runs with seeds, measured alike, with tables and a report."""
    from dpsyngen.experiments.experiment import Experiment
    from dpsyngen.hardware import choose, device_of

    console = Console(quiet, as_json)
    require(1 <= processes <= 1024, "--processes", processes, "from 1 to 1,024")
    if tables and (data or test or retry or dry_run):
        raise ConfigError("--tables only writes what is there: leave out --data, --test, --retry and --dry-run.")
    if numbers()[1] > 1 and processes != 1:
        raise ConfigError("--processes does not go with torchrun, which starts the processes itself.")
    experiment = None
    with joined() as ranks:
        if ranks.main:
            with ranks.leading():
                device = device_of(device, ranks)
                choose(device)
                chosen, out = _spec(spec, out, data, test)
                if out is not None and not tables and not (out / "experiment.json").exists():
                    require_absent_or_empty(out, "--out")
                if dry_run:
                    _dry_run(console, chosen, out, device, processes)
                    return
                if out is None:
                    raise ConfigError("--out is missing: the folder of the experiment.")
                experiment = _prepare(console, chosen, out, tables)
                if not tables:
                    with ranks.lead("jobs", folder=out.absolute()):
                        ranks.agree(lambda: None)
        else:
            console, device = Console(quiet=True), device_of(device, ranks)
            while (command := ranks.next_command()).name != END:

                def opened(folder: Path = command.values["folder"]) -> Experiment:
                    choose(device)
                    return Experiment(folder)

                experiment = ranks.agree(opened)
    # From here on they meet in the experiment's folder only: no job has to wait for another.
    if experiment is None:
        return
    if not tables:
        _work(console, experiment, processes, device, retry, ranks)
    if ranks.main:
        _finish(console, experiment)


def _spec(given: str, out: Path | None, data: str | None, test: str | None) -> tuple[Spec, Path | None]:
    from dpsyngen.experiments.experiment import Experiment
    from dpsyngen.experiments.spec import load_spec, parse_spec

    if (Path(given) / "experiment.json").exists():
        if out is not None and out != Path(given):
            raise ConfigError(f"{given} is an experiment already: go on with it without --out.")
        spec, out = Experiment(Path(given)).spec, Path(given)
    else:
        spec = load_spec(given)
    if data is None and test is None:
        return spec, out
    values = spec.model_dump(mode="json")
    values["data"] |= {k: v for k, v in (("train", data), ("test", test)) if v is not None}
    if data is not None:
        values["data"]["facts"] = None  # they are of the images that these stand in for
    return parse_spec(values), out


def _prepare(console: Console, spec: Spec, out: Path, tables: bool) -> Experiment:
    from dpsyngen.experiments.experiment import Experiment

    if tables:
        return Experiment(out)
    from dpsyngen.experiments.cost import privacy_cost, require_budget
    from dpsyngen.experiments.runner import Images
    from dpsyngen.experiments.spec import jobs_of

    jobs, images = jobs_of(spec), Images(spec)
    if (out / "work").exists():
        Experiment(out).pin(spec, images.train, images.test)
    shape = images.shape
    cost = privacy_cost(spec, jobs, shape, out)
    require_budget(spec, [job for job in jobs if not (out / "runs" / job.name / "run.json").exists()], shape)
    experiment = Experiment.open_or_create(out, spec)
    experiment.note(privacy=cost.to_dict(), jobs=len(jobs))
    console.note(f"{_count(jobs)} in {out}")
    console.note(cost.note())
    return experiment


def _shape(spec: Spec) -> Shape:
    """Of the images, or what the specification says of them where there are none."""
    from dpsyngen.experiments.runner import Images
    from dpsyngen.training.plan import Shape

    facts = spec.data.facts
    try:
        return Images(spec).shape
    except DataError:
        if facts is None:
            raise
    classes = tuple(f"class {i}" for i in range(facts.classes if spec.data.labels else 0))
    return Shape(facts.resolution, facts.channels, classes, spec.data.records or facts.records)


def _count(jobs: Any) -> str:
    runs = sum(job.kind == "run" for job in jobs)
    return f"{runs:,} runs and {len(jobs) - runs:,} references"


def _work(console: Console, experiment: Experiment, processes: int, device: str, retry: bool, ranks: Ranks) -> None:
    """Do all jobs, or as many as there is time for."""
    from dpsyngen.experiments import pool

    statuses, again = experiment.statuses(), time.time() if retry else 0.0
    latest: Job | None = None
    with console.progress("jobs", len(statuses), "jobs", start=_over(statuses)) as progress:

        def watch(statuses: dict[str, Status]) -> None:
            running = ((name, s) for name, s in statuses.items() if s.state == "running")
            progress.update(_over(statuses), "; ".join(_doing(n, s.doing, s.done, s.total) for n, s in running))

        def tell(job: Job, doing: str, at: int, of: int) -> None:
            nonlocal statuses, latest
            if job != latest:  # so the one before is over
                statuses, latest = experiment.statuses(), job
            progress.update(_over(statuses), _doing(job.name, doing, at, of))

        if processes > 1:
            pool.processes(experiment, processes, device, retry=again, watch=watch)
            return
        complete = pool.work(experiment, device, retry=again, tell=tell)
        if ranks.main and not ranks.alone and complete:
            # The others may still be at theirs.
            while any(s.state in ("running", "waiting") for s in experiment.statuses().values()):
                time.sleep(2)
        progress.update(_over(experiment.statuses()))


def _over(statuses: dict[str, Status]) -> int:
    return sum(s.state in ("done", "failed") for s in statuses.values())


def _doing(job: str, what: str, done: int, total: int) -> str:
    return f"{job}: {what}{f' {done:,}/{total:,}' if total else ''}"


def _finish(console: Console, experiment: Experiment) -> None:
    """Write tables and report of what is there, and say what is not: exit code 4 if jobs failed, 130 if interrupted."""
    from dpsyngen.experiments.measures import View, answers
    from dpsyngen.experiments.tables import print_tables, write_results
    from dpsyngen.report.comparison import write_comparison

    statuses = experiment.statuses()
    failed = {name: s.error for name, s in statuses.items() if s.state == "failed"}
    left = [name for name, s in statuses.items() if s.state not in ("done", "failed")]
    done = len(statuses) - len(failed) - len(left)
    experiment.note(failed=failed, missing=left, seconds=experiment.seconds())
    document: dict[str, Any] = {"path": experiment.path, "jobs": len(statuses), "done": done, "failed": failed}
    document |= {"left": left, "seconds": experiment.seconds(), "report": None, "files": [], "answers": []}
    lines = [f"failed: {name}: {error}" for name, error in failed.items()]
    if done:
        paths = write_results(experiment.path)
        report = write_comparison(experiment.path, console.note)
        document |= {"report": report, "files": paths}
        document["answers"] = [a._asdict() for a in answers(View(experiment.path))]
        if not console.as_json:
            print_tables(experiment.path, console)
        lines += [f"PRIVATE figures: {', '.join(str(p) for p in paths)}", f"PRIVATE report:  {report}"]
    code, again = 4 if failed else 0, f"dpsyngen compare {quote(str(experiment.path))}"
    if left:
        hours = experiment.spec.cost.hours
        used = hours is not None and experiment.seconds() > 3600 * hours
        why = f"cost.hours = {hours:g} are used up" if used else "interrupted"
        rest = f"{len(left):,} of {len(statuses):,} jobs are left"
        lines.append(f"{why}: {rest}; go on with: {again}")
        code = 0 if used else 130
    elif failed:
        lines.append(f"{len(failed):,} jobs failed; try them again with: {again} --retry")
    console.result(document, lines)
    if code:
        raise typer.Exit(code)


def _dry_run(console: Console, spec: Spec, out: Path | None, device: str, processes: int) -> None:
    import torch

    from dpsyngen.experiments.cost import estimate, hours, privacy_cost
    from dpsyngen.experiments.experiment import Experiment
    from dpsyngen.experiments.pool import threads_of
    from dpsyngen.experiments.spec import jobs_of

    jobs, shape = jobs_of(spec), _shape(spec)
    cost = privacy_cost(spec, jobs, shape, out)
    console.note("measuring a few steps of each kind …")
    left = jobs
    if out is not None and (out / "experiment.json").exists():
        done = {name for name, status in Experiment(out).statuses().items() if status.state == "done"}
        left = tuple(job for job in jobs if job.name not in done)
    threads = torch.get_num_threads()
    try:
        if processes > 1:  # two threads of a small network take more core-seconds than one
            torch.set_num_threads(threads_of(processes))
        found = estimate(spec, left, shape, device)
    finally:
        torch.set_num_threads(threads)
    total, core = sum(found.values()), "core-" if device == "cpu" else ""
    parts = ", ".join(f"{part} {hours(seconds, core)}" for part, seconds in found.items())
    images = f"{shape.records:,} images {shape.channels}x{shape.resolution}x{shape.resolution}"
    rows = [
        ("experiment", spec.name),
        ("data", f"{spec.data.train}: {images}, {shape.num_classes or 'no'} classes; test {spec.data.test or 'none'}"),
        ("jobs", f"{_count(jobs)}, {len(jobs) - len(left):,} of them done"),
        ("privacy", cost.note()),
    ]
    if cost.limit is not None:
        rows.append(("", f"within cost.total_epsilon = {cost.limit:g}"))
    rows.append(("time", f"about {hours(total, core)} ({parts}), from steps measured on {device}"))
    rows.append(("", "figures and references come on top"))
    if spec.cost.hours is not None and total > 3600 * spec.cost.hours:
        rows.append(("BEYOND", f"cost.hours = {spec.cost.hours:g}: no run is started after that"))
    document: dict[str, Any] = {"name": spec.name, "privacy": cost.to_dict()}
    document |= {"estimate": {"seconds": found | {"total": total}, "device": device}}
    document |= {"jobs": [job.name for job in jobs], "left": [job.name for job in left]}
    console.result(document, [f"{what:<12} {text}" for what, text in rows])
