"""The command `dpsyngen train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsyngen.cli import checks as cli_checks
from dpsyngen.cli.options import AsJson, Device, Quiet, assignments, epsilon_of
from dpsyngen.errors import ConfigError

if TYPE_CHECKING:
    from dpsyngen.console import Console, Progress
    from dpsyngen.training.pipeline import Training
    from dpsyngen.training.plan import Plan


def _sections(**values: Any) -> dict[str, Any]:
    """``private__steps=3`` -> ``{"private": {"steps": 3}}``, leaving out what was not given."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if value is not None:
            section, name = key.split("__")
            out.setdefault(section, {})[name] = value
    return out


def train(
    out: Annotated[Path, typer.Option(help="run directory to make (or, with --resume, to continue)")],
    data: Annotated[
        str | None,
        typer.Option(
            help="folder (class sub-folders are labels), Parquet, WebDataset, .npz, .npy, IDX, a named set: digits, …"
        ),
    ] = None,
    epsilon: Annotated[str | None, typer.Option(help="ε, the privacy budget; inf trains without privacy")] = None,
    delta: Annotated[float | None, typer.Option(help="δ; default: the largest power of ten below 1/n")] = None,
    preset: Annotated[
        str | None, typer.Option(help="named settings; default: gpu where there is one, else cpu-small")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings")] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="dpdm, finetune, cleaning, coarse, both, gaussian, residual or residual-cleaning"),
    ] = None,
    tau_cleaning: Annotated[float | None, typer.Option(help="log σ below which programs train")] = None,
    tau_coarse: Annotated[float | None, typer.Option(help="log σ above which programs or DP moments answer")] = None,
    networks: Annotated[str | None, typer.Option(help="experts (one a stage) or shared")] = None,
    pretrain: Annotated[
        bool | None, typer.Option("--pretrain/--no-pretrain", help="start from programmatic images")
    ] = None,
    network: Annotated[str | None, typer.Option(help="size: nano, tiny, small, base, large, huge")] = None,
    program: Annotated[str | None, typer.Option(help="programmatic images; see `dpsyngen programs list`")] = None,
    public_steps: Annotated[int | None, typer.Option(help="steps on programs for each public network")] = None,
    steps: Annotated[int | None, typer.Option(help="DP-SGD steps")] = None,
    batch: Annotated[int | None, typer.Option(help="expected batch of private images")] = None,
    copies: Annotated[int | None, typer.Option("-k", "--copies", help="K, noise levels for each image")] = None,
    clip: Annotated[float | None, typer.Option(help="C, clipping norm")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr")] = None,
    physical_batch: Annotated[int | None, typer.Option(help="images in memory at a time; default: what fits")] = None,
    resolution: Annotated[int | None, typer.Option(help="pixels; images are resized and centre-cropped")] = None,
    channels: Annotated[str | None, typer.Option(help="auto, grey or rgb")] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="ignore classes")] = False,
    records: Annotated[int | None, typer.Option(help="declared number of images, public; default: as found")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out unreadable images")] = False,
    group_size: Annotated[
        int | None, typer.Option(help="images of one person at most: ε is then for all of them together")
    ] = None,
    budget: Annotated[
        Path | None, typer.Option(help="budget file of these images, charged by all runs; see `dpsyngen budget`")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.NAME=VALUE", help="any other setting")
    ] = None,
    insecure_seed: Annotated[
        int | None, typer.Option(help="reproducible noise, for tests: stamps the run NOT PRIVATE")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run")] = False,
    tensorboard: Annotated[
        bool | None,
        typer.Option("--tensorboard/--no-tensorboard", help="files for TensorBoard, in the run's private half"),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
    log_format: Annotated[
        str, typer.Option(help="of progress and notes: text, or json for log collectors (no private figures in it)")
    ] = "text",
) -> None:
    """Train a generator; the run directory gets a private and a release half."""
    from dpsyngen.console import LOG_FORMATS, Console

    if log_format not in LOG_FORMATS:
        raise ConfigError(f"--log-format is {log_format!r}, but must be text or json.")
    console = Console(quiet, as_json, log_format)
    from dpsyngen.distributed import device_of, joined

    with joined() as ranks:
        device = device_of(device, ranks)
        if not ranks.main:
            from dpsyngen.fit import follow_training

            follow_training(ranks, data, device)
            return
        with ranks.leading():
            given = _sections(
                data__source=data,
                data__resolution=resolution,
                data__channels=channels,
                data__labels=False if unconditional else None,
                data__records=records,
                data__skip_bad=True if skip_bad else None,
                privacy__epsilon=None if epsilon is None else epsilon_of(epsilon),
                privacy__delta=delta,
                privacy__clipping_norm=clip,
                privacy__insecure_seed=insecure_seed,
                privacy__group_size=group_size,
                privacy__budget=None if budget is None else str(budget),
                stages__variant=variant,
                stages__tau_cleaning=tau_cleaning,
                stages__tau_coarse=tau_coarse,
                stages__networks=networks,
                stages__pretrain=pretrain,
                network__size=network,
                program__name=program,
                public__steps=public_steps,
                private__steps=steps,
                private__batch=batch,
                private__copies=copies,
                private__learning_rate=learning_rate,
                private__physical_batch=physical_batch,
                logging__tensorboard=None if resume else tensorboard,
            )
            from dpsyngen.config import load_config, merge_settings

            given = merge_settings(given, assignments(settings or []))
            if resume:
                extra = [k for k in given if k != "data"] + [k for k in given.get("data", {}) if k != "source"]
                if extra or preset or config:
                    raise ConfigError(
                        "--resume continues with the settings that the run was started with; leave out everything but "
                        "--out, --data (only if the images have moved), --device, --tensorboard and what is about "
                        "output."
                    )
            elif data is None and config is None:
                raise ConfigError("--data is missing: a folder, Parquet, WebDataset, .npz, .npy, IDX, or a named set.")
            elif epsilon is None and config is None:
                raise ConfigError(
                    "--epsilon is missing: how much privacy to spend (1 is strict, 10 is loose, inf is none)."
                )

            from dpsyngen.fit import prepare, prepare_resume
            from dpsyngen.fitting import Reading
            from dpsyngen.training.run import Run

            if resume:
                reading = Reading(console, Run(out).config)
                training = prepare_resume(out, data, device, tensorboard, ranks, reading)
            else:
                loaded = load_config(given, preset=preset, file=config, device=device)
                training = prepare(loaded, out, device=device, ranks=ranks, on_reading=Reading(console, loaded))
            with training.run.lock():
                finished = _run_training(training, console)
    if not finished:
        raise typer.Exit(130)


_TRAINERS = {"public": "programs", "private": "DP-SGD", "moments": "DP moments"}


def _mechanisms(plan: Plan) -> list[str]:
    m, out = plan.mechanism, []
    if plan.moments is not None:
        noises = ", ".join(f"{q.noise_multiplier:.4g}" for q in plan.moments.mechanisms())
        out.append(f"moments at noise multipliers {noises}")
    if plan.steps:
        out.append(
            f"{plan.steps} steps at sampling rate {m.sampling_rate:.4g}, noise multiplier {m.noise_multiplier:.4g}"
        )
    return out


def _run_training(training: Training, console: Console) -> bool:
    """Whether it came to its end; otherwise it was interrupted, and the user knows how to go on."""
    import math
    import time

    from dpsyngen.evaluation.doctor import write_health
    from dpsyngen.training.moments_phase import MOMENTS
    from dpsyngen.training.signals import stop_on_signals

    begun = time.monotonic()
    training.warn, training.tell = console.warn, console.note
    plan, config = training.plan, training.config
    m, n = plan.mechanism, plan.shape
    classes = f", {n.num_classes} classes" if n.num_classes else ", no classes"
    console.note(f"{len(training.dataset):,} images {n.channels}x{n.resolution}x{n.resolution}{classes}")
    if training.dataset.file is not None:
        console.note(f"  read from {training.dataset.file}, which holds them decoded and is PRIVATE")
    for line in training.dataset.skipped:
        console.note(f"  left out: {line}")
    if not training.ranks.alone or training.compute.kind != "cpu":
        count = training.ranks.count
        each = f"{count} processes, each on" if count > 1 else "computing on"
        dp = training.compute.for_dp_steps()
        console.note(
            f"{each} {training.compute.kind}: DP-SGD in {dp.precision}, all else in {training.compute.precision}"
        )
    parts = ", ".join(f"{s.name} ({_TRAINERS[s.trainer]})" for s in reversed(plan.stages.stages))
    network = (
        "no network" if plan.stages.gaussian else f"{config.network.size} network, {training.parameters:,} parameters"
    )
    console.note(
        f"preset {config.preset}; stages, noisy to clean: {parts}"
        f"{'; pre-trained on programs' if plan.stages.pretrain else ''}; {network}"
    )
    if math.isinf(config.privacy.epsilon):
        console.note("NOT PRIVATE: ε = ∞, no clipping, no noise")
    else:
        g = config.privacy.group_size
        unit = "one image" if g == 1 else f"up to {g} images of one person together"
        console.note(
            f"target ε = {config.privacy.epsilon:g} at δ = {plan.delta:.3g} for {unit} (add/remove), "
            f"n = {m.records:,} public: {'; '.join(_mechanisms(plan))}"
        )
    if config.privacy.insecure_seed is not None:
        console.note("NOT PRIVATE: the noise comes from --insecure-seed")
    private_phase = plan.stages.private.name
    with stop_on_signals(training, console.note):
        current: tuple[str, Progress] | None = None
        try:
            for p in training.steps():
                if p.phase == MOMENTS:
                    continue  # it has told what it does
                if current is None or current[0] != p.phase:
                    if current:
                        current[1].__exit__(None, None, None)
                    what = "DP-SGD on private images" if p.phase == private_phase else "programmatic images"
                    progress = console.progress(f"{p.phase}: {what}", p.steps, "steps", start=p.step - 1)
                    current = (p.phase, progress.__enter__())
                    for name in training.checkpoints.damaged:
                        console.note(f"  a damaged checkpoint was passed over: {name}")
                # The only private figure that is shown; Console leaves it out of what log collectors get.
                loss = p.values.get("loss")
                note = "" if loss is None else f"loss {loss:.3f}" + (" (private)" if p.phase == private_phase else "")
                current[1].update(p.step, note)
        finally:
            if current:
                current[1].__exit__(*sys.exc_info())
    if not training.run.complete:
        text = f"interrupted; continue with: dpsyngen train --resume --out {training.run.path}"
        console.result({"error": {"kind": "interrupted", "message": text}}, [text])
        return False
    ledger, release = training.ledger, training.run.release
    epsilon, secure = ledger.epsilon(), training.randomness.secure
    if math.isinf(epsilon):
        spent = "NOT PRIVATE (ε = ∞)"
    else:
        spent = f"ε = {epsilon:.4f} at δ = {ledger.delta:.3g}"
        if not secure:
            spent = f"NOT PRIVATE (reproducible noise); it would be {spent}"
    findings = write_health(training.run, training.device)
    console.result(
        {
            "run": training.run.path,
            "release": release,
            "private": secure and math.isfinite(epsilon),
            "epsilon": epsilon,
            "delta": ledger.delta,
            "group_size": ledger.group_size,
            "records": m.records,
            "steps": plan.steps,
            "sampling_rate": m.sampling_rate if plan.steps else None,
            "noise_multiplier": m.noise_multiplier if plan.steps else None,
            "moments": None if plan.moments is None else [q.noise_multiplier for q in plan.moments.mechanisms()],
            "parameters": training.parameters,
            "seconds": round(time.monotonic() - begun, 3),
            "findings": [f.to_dict() for f in findings],
        },
        [
            *cli_checks.health_lines(findings),
            f"{spent}: the generator is in {release} ({release / 'PRIVACY.md'})",
        ],
    )
    return True
