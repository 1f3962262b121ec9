"""The command `dpsyngen stages`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsyngen.cli.options import AsJson, Device, Quiet, Settings, assignments, epsilon_of, with_assigned
from dpsyngen.console import Console
from dpsyngen.errors import ConfigError
from dpsyngen.files import read_yaml_file

if TYPE_CHECKING:
    from dpsyngen.thresholds.files import StagesResult
    from dpsyngen.thresholds.run import Stages


def stages(
    out: Annotated[Path, typer.Option(help="folder of the results; the same call again goes on after an interruption")],
    programs: Annotated[str, typer.Option(help="names or YAML files; the first is to train with")],
    proxy: Annotated[str | None, typer.Option(help="images that are PUBLIC and resemble the private ones")] = None,
    data: Annotated[str | None, typer.Option(help="the private images, for an estimate that costs --epsilon")] = None,
    epsilon: Annotated[str | None, typer.Option(help="ε of that estimate")] = None,
    delta: Annotated[float | None, typer.Option(help="δ; default: the largest power of ten below 1/n")] = None,
    budget: Annotated[Path | None, typer.Option(help="budget file of these images; see `dpsyngen budget`")] = None,
    sampling_rate: Annotated[float, typer.Option(help="share of private images used")] = 1.0,
    records: Annotated[int | None, typer.Option(help="declared number of private images; default: as found")] = None,
    group_size: Annotated[int | None, typer.Option(help="images of one person at most")] = None,
    groups: Annotated[Path | None, typer.Option(help="table of file names and persons; as for train")] = None,
    most_per_person: Annotated[int | None, typer.Option(help="images of each person to use; as for train")] = None,
    preset: Annotated[str | None, typer.Option(help="named settings; default: gpu on a GPU, else cpu-small")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings")] = None,
    network: Annotated[str | None, typer.Option(help="size: nano, tiny, small, base, large, huge")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps of each network")] = None,
    seeds: Annotated[int, typer.Option(help="networks of each family")] = 2,
    images: Annotated[int, typer.Option(help="images of each source to measure on")] = 128,
    resolution: Annotated[int | None, typer.Option(help="pixels; default: as the images given, or 32")] = None,
    channels: Annotated[str | None, typer.Option(help="auto, grey or rgb")] = None,
    tolerance: Annotated[float, typer.Option(help="relative gap that a stage of programs may have")] = 0.05,
    method: Annotated[str, typer.Option(help="of the thresholds: tolerance or loss")] = "tolerance",
    spacing: Annotated[float, typer.Option(help="of the noise levels, in log σ")] = 0.5,
    networks: Annotated[Path | None, typer.Option(help="folder of networks; default: in --out")] = None,
    settings: Settings = None,
    insecure_seed: Annotated[int | None, typer.Option(help="reproducible noise: NOT PRIVATE")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Find the noise levels that programs may own, without private images (or paying for them with --epsilon)."""
    console, begun = Console(quiet, as_json), time.monotonic()
    privacy: dict[str, Any] = {
        "epsilon": epsilon_of(epsilon),
        "delta": delta,
        "budget": None if budget is None else str(budget),
        "group_size": group_size,
        "groups": None if groups is None else str(groups),
        "most_per_person": most_per_person,
        "insecure_seed": insecure_seed,
    }
    # An ε that nobody asked for, or an option without effect, is a mistake.
    if data is not None and epsilon is None:
        raise ConfigError("--epsilon is missing: what an estimate on the private images of --data may cost.")
    assigned = assignments(settings or [])
    asked = privacy | {"records": records, "sampling_rate": None if sampling_rate == 1 else sampling_rate}
    asked["set privacy.…"] = assigned.get("privacy")
    if data is None and (without := [name for name, value in asked.items() if value is not None]):
        without_data = ", ".join(f"--{name.replace('_', '-')}" for name in without)
        raise ConfigError(f"{without_data} goes with --data, the private images; none were given.")
    from dpsyngen.config import load_config, merge_settings, with_options
    from dpsyngen.data.load import load_private
    from dpsyngen.hardware import choose
    from dpsyngen.thresholds.run import Stages, StagesOptions, require_usable

    require_usable(out)
    choose(device)
    chosen = with_options(
        data__resolution=resolution, data__channels=channels, network__size=network, public__steps=steps
    )
    # What this call spends is not what a training will spend, so it is not kept.
    once = with_options(chosen, data__records=records, **{f"privacy__{name}": v for name, v in privacy.items()})
    loaded = load_config(with_assigned(once, assigned), preset=preset, file=config, device=device)
    kept = {} if config is None else dict(read_yaml_file(config, "the configuration"))
    given = {k: v for k, v in merge_settings(chosen, assigned).items() if k == "data"}
    kept = merge_settings(kept, {"preset": loaded.preset, **given})
    options = StagesOptions(
        programs=[name.strip() for name in programs.split(",") if name.strip()],
        proxy=proxy,
        seeds=seeds,
        images=images,
        spacing=spacing,
        tolerance=tolerance,
        method=method,
        sampling_rate=sampling_rate,
        networks=networks,
    )
    # As a training reads them, so that the budget knows them again.
    private = None if data is None else load_private(data, loaded, groups=loaded.privacy.groups)
    search = Stages(out, loaded, options, private, kept, device)
    try:
        result, files = _with_progress(search, console)
    except KeyboardInterrupt:
        folder = search.search.networks.folder
        raise KeyboardInterrupt(f"interrupted; the same command goes on, with the networks in {folder}") from None
    _say(console, out, result, files, time.monotonic() - begun)


def _with_progress(search: Stages, console: Console) -> tuple[StagesResult, list[Path]]:
    s, p = search.search, search.estimate
    tiers = ", ".join(f"{f.label} (tier {f.program.prior_tier})" for f in s.all_families if f is not s.proxy)
    told = [f"programs: {tiers}"] if tiers else []
    console.note("; ".join(told if s.proxy is None else [*told, "a proxy that you declare PUBLIC"]))
    if search.note is not None:
        console.note(search.note)
    if p is not None:
        cost = f"ε = {p.privacy.epsilon:g} at δ = {p.delta:.3g}, noise multiplier {p.query.noise_multiplier:.4g}"
        seeded = "" if p.privacy.insecure_seed is None else "; NOT PRIVATE: reproducible noise"
        console.note(f"private images: {p.query.records:,} records, {cost}{seeded}")
    with ExitStack() as stack:
        stack.push(lambda kind, error, trace: console.track_ends(error))
        return search.run(console.track)


def _say(console: Console, out: Path, result: StagesResult, files: list[Path], seconds: float) -> None:
    from dpsyngen.thresholds.files import elbow_rows, prior_line, stage_lines, table, teacher_line

    statement = result.private or {}
    console.markdown(table(result))
    lines = [*stage_lines(result), *filter(None, [prior_line(result), teacher_line(result)])]
    if statement:
        spent = f"ε = {statement['epsilon']:.4f} at δ = {statement['delta']:.3g} of the private images is spent"
        lines.append(spent if statement["private"] else f"NOT PRIVATE (reproducible noise); it would be: {spent}")
    lines.append(f"results: {', '.join(map(str, files))}")
    lines.append(f"train with them: dpsyngen train --config {out / 'stages.yaml'} --data … --epsilon … --out …")
    console.result(
        {
            "path": out,
            "files": files,
            **result.stages(),
            "elbows": elbow_rows(result),
            "private": statement.get("private"),
            "epsilon": statement.get("epsilon", 0.0),
            "delta": statement.get("delta"),
            "seconds": round(seconds, 3),
        },
        lines,
    )
