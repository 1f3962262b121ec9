"""The command line: parses, calls the library, prints.  Nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsyngen import cli_audit, cli_checks, cli_compare, cli_evaluate, cli_release
from dpsyngen.assignments import assignments
from dpsyngen.cli_options import AsJson, Device, Quiet, RunArgument
from dpsyngen.cli_programs import app as programs_app
from dpsyngen.errors import ConfigError, DpsyngenError
from dpsyngen.version import __version__

if TYPE_CHECKING:
    from dpsyngen.console import Console, Progress
    from dpsyngen.training.pipeline import Training

app = typer.Typer(
    name="dpsyngen",
    help="Train an image generator on private images with a differential-privacy guarantee.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(programs_app, name="programs")
app.add_typer(cli_release.budget_app, name="budget")
app.command()(cli_release.ledger)
app.command()(cli_audit.audit)
app.command()(cli_release.release)
app.command()(cli_release.verify)
app.command()(cli_release.key)
app.command()(cli_compare.compare)
app.command()(cli_evaluate.evaluate)
app.command()(cli_checks.memorisation)
app.command()(cli_checks.doctor)


def _epsilon(text: str) -> float:
    try:
        return float("inf") if text in ("inf", "∞") else float(text)
    except ValueError:
        raise ConfigError(f"--epsilon is {text!r}, but must be a positive number, or inf for no privacy.") from None


def _show_version(value: bool) -> None:
    if value:
        print(f"dpsyngen {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


# ------------------------------------------------------------------------------------------------ train


def _sections(**values: Any) -> dict[str, Any]:
    """``private__steps=3`` -> ``{"private": {"steps": 3}}``, leaving out what was not given."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if value is not None:
            section, name = key.split("__")
            out.setdefault(section, {})[name] = value
    return out


def _merge(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    out = dict(a)
    for key, value in b.items():
        out[key] = _merge(out[key], value) if isinstance(out.get(key), dict) and isinstance(value, dict) else value
    return out


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="run directory to make (or, with --resume, to continue)")],
    data: Annotated[
        str | None,
        typer.Option(help="folder (class sub-folders are labels), .npz, .npy, IDX file, or a named set: digits, …"),
    ] = None,
    epsilon: Annotated[str | None, typer.Option(help="ε, the privacy budget; inf trains without privacy")] = None,
    delta: Annotated[float | None, typer.Option(help="δ; default: the largest power of ten below 1/n")] = None,
    preset: Annotated[str | None, typer.Option(help="named settings; default cpu-small")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings")] = None,
    variant: Annotated[str | None, typer.Option(help="dpdm, finetune, cleaning, coarse or both")] = None,
    tau_cleaning: Annotated[float | None, typer.Option(help="log σ below which programs train")] = None,
    tau_coarse: Annotated[float | None, typer.Option(help="log σ above which programs train")] = None,
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
    device: Device = "cpu",
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
    given = _sections(
        data__source=data,
        data__resolution=resolution,
        data__channels=channels,
        data__labels=False if unconditional else None,
        data__records=records,
        data__skip_bad=True if skip_bad else None,
        privacy__epsilon=None if epsilon is None else _epsilon(epsilon),
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
    given = _merge(given, assignments(settings or []))
    if resume:
        extra = [k for k in given if k != "data"] + [k for k in given.get("data", {}) if k != "source"]
        if extra or preset or config:
            raise ConfigError(
                "--resume continues with the settings that the run was started with; leave out everything but --out, "
                "--data (only if the images have moved), --device, --tensorboard and what is about output."
            )
    elif data is None and config is None:
        raise ConfigError("--data is missing: a folder of images, a .npz, .npy or IDX file, or a named set.")
    elif epsilon is None and config is None:
        raise ConfigError("--epsilon is missing: how much privacy to spend (1 is strict, 10 is loose, inf is none).")

    from dpsyngen.api import prepare, prepare_resume
    from dpsyngen.config import load_config

    if resume:
        training = prepare_resume(out, data, device, tensorboard)
    else:
        loaded = load_config(given, preset=preset, file=config)
        training = prepare(loaded, out, device=device)
    with training.run.lock():
        _run_training(training, console)


def _run_training(training: Training, console: Console) -> None:
    import math
    import time

    from dpsyngen.doctor import write_health
    from dpsyngen.training.signals import stop_on_signals

    begun = time.monotonic()
    training.warn = console.warn
    plan, config = training.plan, training.config
    m, n = plan.mechanism, plan.shape
    classes = f", {n.num_classes} classes" if n.num_classes else ", no classes"
    console.note(f"{len(training.dataset):,} images {n.channels}x{n.resolution}x{n.resolution}{classes}")
    for line in training.dataset.skipped:
        console.note(f"  left out: {line}")
    parts = ", ".join(f"{s.name} ({s.trainer})" for s in reversed(plan.stages.stages))
    console.note(
        f"stages, noisy to clean: {parts}{'; pre-trained on programs' if plan.stages.pretrain else ''}; "
        f"{config.network.size} network, {training.parameters:,} parameters"
    )
    if math.isinf(config.privacy.epsilon):
        console.note("NOT PRIVATE: ε = ∞, no clipping, no noise")
    else:
        g = config.privacy.group_size
        unit = "one image" if g == 1 else f"up to {g} images of one person together"
        console.note(
            f"target ε = {config.privacy.epsilon:g} at δ = {plan.delta:.3g} for {unit} (add/remove), "
            f"n = {m.records:,} public: {m.config.steps} steps at sampling rate {m.sampling_rate:.4g}, "
            f"noise multiplier {m.noise_multiplier:.4g}"
        )
    if config.privacy.insecure_seed is not None:
        console.note("NOT PRIVATE: the noise comes from --insecure-seed")
    private_phase = plan.stages.private.name
    with stop_on_signals(training, console.note):
        current: tuple[str, Progress] | None = None
        try:
            for p in training.steps():
                if current is None or current[0] != p.phase:
                    if current:
                        current[1].__exit__(None, None, None)
                    what = "DP-SGD on private images" if p.phase == private_phase else "programmatic images"
                    progress = console.progress(f"{p.phase}: {what}", p.steps, "steps", start=p.step - 1)
                    current = (p.phase, progress.__enter__())
                    for name in training.checkpoints.damaged:
                        console.note(f"  a damaged checkpoint was passed over: {name}")
                # The only private figure that is shown; Console leaves it out of what log collectors get.
                note = f"loss {p.values['loss']:.3f}" + (" (private)" if p.phase == private_phase else "")
                current[1].update(p.step, note)
        finally:
            if current:
                current[1].__exit__(*sys.exc_info())
    if not training.run.complete:
        text = f"interrupted; continue with: dpsyngen train --resume --out {training.run.path}"
        console.result({"error": {"kind": "interrupted", "message": text}}, [text])
        raise typer.Exit(130)
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
            "steps": m.config.steps,
            "sampling_rate": m.sampling_rate,
            "noise_multiplier": m.noise_multiplier,
            "parameters": training.parameters,
            "seconds": round(time.monotonic() - begun, 3),
            "findings": [f.to_dict() for f in findings],
        },
        [
            *cli_checks.health_lines(findings),
            f"{spent}: the generator is in {release} ({release / 'PRIVACY.md'})",
        ],
    )


# ----------------------------------------------------------------------------------------------- sample


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, or a copy of its release folder")],
    out: Annotated[Path, typer.Option(help="folder for PNGs and metadata.csv, or a .npz file")],
    count: Annotated[int, typer.Option("-n", "--count", help="number of images")] = 1000,
    classes: Annotated[
        str | None, typer.Option(help="comma-separated names or numbers; default: all, balanced")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, heun or dpmpp; default: the run's")] = None,
    steps: Annotated[int | None, typer.Option(help="sampler steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance, 1 is none")] = None,
    churn: Annotated[float | None, typer.Option(help="stochasticity of heun")] = None,
    seed: Annotated[int | None, typer.Option(help="public seed; default: a random one, written down")] = None,
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 256,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Draw images from a trained generator; costs no privacy, however many."""
    from dpsyngen.console import Console
    from dpsyngen.samples import check_target, write_samples

    console = Console(quiet, as_json)
    check_target(out)
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}, but must be at least 1.")
    from dataclasses import asdict

    from dpsyngen.api import check_device
    from dpsyngen.generator import Generator
    from dpsyngen.training.run import Run

    check_device(device)
    if (run / "generator.json").exists():
        release = run
    else:
        opened = Run(run)
        opened.require_complete()
        release = opened.release
    generator = Generator(release, device)
    chosen = None if classes is None else [c.strip() for c in classes.split(",") if c.strip()]
    if count < 1:
        raise ConfigError(f"-n is {count}, but must be at least 1.")
    labels = generator.labels(count, chosen)
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    settings = generator.settings(seed=seed, sampler=sampler, steps=steps, guidance=guidance, churn=churn)
    about = {"dpsyngen": __version__, "private": generator.private, "count": count, **asdict(settings)}
    batches = generator.stream(count, settings, labels=labels, batch_size=batch_size)
    with console.progress("sampling", count, "images") as progress:
        write_samples(out, batches, labels, generator.class_names, about, progress.update)
    console.result(
        {"path": out, "images": count, "class_names": generator.class_names, **about},
        [f"{count:,} images in {out}" + ("" if generator.private else "  (generator is NOT PRIVATE)")],
    )


# ----------------------------------------------------------------------------------------------- report


@app.command()
def report(run: RunArgument, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Write the report: the full one into private/, the publishable one into release/."""
    from dpsyngen import api
    from dpsyngen.console import Console

    private, public = api.write_report(run)
    Console(quiet, as_json).result(
        {"private": private, "public": public},
        [f"full report, PRIVATE: {private}", f"publishable report:   {public}"],
    )


# ------------------------------------------------------------------------------------------------- plan


@app.command()
def plan(
    records: Annotated[int, typer.Option(help="number of private images")],
    epsilon: Annotated[str | None, typer.Option(help="ε to spend")] = None,
    noise: Annotated[float | None, typer.Option(help="noise multiplier, instead of --epsilon")] = None,
    batch: Annotated[int, typer.Option(help="expected batch")] = 512,
    steps: Annotated[int, typer.Option(help="DP-SGD steps")] = 300,
    delta: Annotated[float | None, typer.Option(help="δ; default: the largest power of ten below 1/records")] = None,
    group_size: Annotated[int, typer.Option(help="images of one person at most: ε is for all of them together")] = 1,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """What a budget buys, before spending it."""
    from dataclasses import asdict

    from dpsyngen.console import Console
    from dpsyngen.privacy.plan import neighbouring_plans, plan_lines

    target = None if epsilon is None else _epsilon(epsilon)
    options: dict[str, Any] = {"noise_multiplier": noise, "delta": delta, "group_size": group_size}
    delta, rows = neighbouring_plans(records, batch, steps, epsilon=target, **options)
    Console(quiet, as_json).result(
        {"records": records, "group_size": group_size, "delta": delta, "plans": [asdict(r) for r in rows]},
        plan_lines(records, group_size, delta, rows),
    )


# ------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Run the command line: errors that a user can mend are one message, without a traceback."""
    # With other work on the machine, threads that spin while they wait make each other many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dpsyngen.console import Console

    console = Console.asked_for(sys.argv[1:])
    try:
        sys.exit(_run(console))
    except DpsyngenError as error:
        console.error(error.kind, str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.error("interrupted", "stopped")
        sys.exit(130)
    except OSError as error:
        import errno

        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            console.error(
                "disk-full",
                f"the disk is full{f', at {error.filename}' if error.filename else ''}.  Nothing that was finished is "
                "lost: free some space, then continue (training: --resume).",
            )
        elif error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            console.error("system", str(error))
        sys.exit(1)
    except Exception as error:
        if console.as_json:
            console.error("internal", f"{type(error).__name__}: {error}")
        raise


def _run(console: Console) -> int:
    """Run the command; its exit code.  With --json, what typer says about wrong options is an error as all others."""
    if not console.as_json:
        app()
        return 0
    command = typer.main.get_command(app)
    try:
        with command.make_context("dpsyngen", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        # Which class it is depends on the version of typer.
        if not hasattr(error, "format_message"):
            raise
        console.error("usage", error.format_message())
        return int(getattr(error, "exit_code", 2))
    return 0


if __name__ == "__main__":
    main()
