"""The command line: parses, calls the library, prints.  Nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dpsyngen import cli_audit, cli_checks, cli_release
from dpsyngen.assignments import assignments
from dpsyngen.cli_programs import app as programs_app
from dpsyngen.errors import ConfigError, DpsyngenError
from dpsyngen.version import __version__

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
app.command()(cli_checks.memorisation)
app.command()(cli_checks.doctor)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, made by `dpsyngen train --out`")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="only results and errors")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]


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
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Train a generator; the run directory gets a private and a release half."""
    from dpsyngen.console import Console

    console = Console(quiet)
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
    )
    given = _merge(given, assignments(settings or []))
    if resume:
        extra = [k for k in given if k != "data"] + [k for k in given.get("data", {}) if k != "source"]
        if extra or preset or config:
            raise ConfigError(
                "--resume continues with the settings that the run was started with; leave out everything but --out, "
                "--data (only if the images have moved), --device and --quiet."
            )
    elif data is None and config is None:
        raise ConfigError("--data is missing: a folder of images, a .npz, .npy or IDX file, or a named set.")
    elif epsilon is None and config is None:
        raise ConfigError("--epsilon is missing: how much privacy to spend (1 is strict, 10 is loose, inf is none).")

    from dpsyngen.api import prepare, prepare_resume
    from dpsyngen.config import load_config

    if resume:
        training = prepare_resume(out, data, device)
    else:
        loaded = load_config(given, preset=preset, file=config)
        training = prepare(loaded, out, device=device)
    with training.run.lock():
        _run_training(training, console, resume)


def _run_training(training: Any, console: Any, resumed: bool) -> None:
    import math

    from dpsyngen.doctor import write_health
    from dpsyngen.training.pipeline import stop_on_signals

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
        current: tuple[str, Any] | None = None
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
                note = f"loss {p.values['loss']:.3f}" + (" (private)" if p.phase == private_phase else "")
                current[1].update(p.step, note)
        finally:
            if current:
                current[1].__exit__(*sys.exc_info())
    if not training.run.complete:
        console.line(f"interrupted; continue with: dpsyngen train --resume --out {training.run.path}")
        raise typer.Exit(130)
    ledger = training.ledger
    if math.isinf(ledger.epsilon()):
        spent = "NOT PRIVATE (ε = ∞)"
    else:
        spent = f"ε = {ledger.epsilon():.4f} at δ = {ledger.delta:.3g}"
        if not training.randomness.secure:
            spent = f"NOT PRIVATE (reproducible noise); it would be {spent}"
    for line in cli_checks.health_lines(write_health(training.run, training.device)):
        console.line(line)
    console.line(f"{spent}: the generator is in {training.run.release} ({training.run.release / 'PRIVACY.md'})")


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
) -> None:
    """Draw images from a trained generator; costs no privacy, however many."""
    from dpsyngen.console import Console
    from dpsyngen.samples import check_target, write_samples

    console = Console(quiet)
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
    console.line(f"{count:,} images in {out}" + ("" if generator.private else "  (generator is NOT PRIVATE)"))


# --------------------------------------------------------------------------------------------- evaluate


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Option(help="real training images; default: the run's")] = None,
    test: Annotated[str | None, typer.Option(help="real test images with labels, for the accuracy score")] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="number of generated images")] = 10_000,
    features: Annotated[
        str, typer.Option(help="comma-separated: pixels-pca, efficientnet-lite0, inception")
    ] = "pixels-pca,efficientnet-lite0",
    classifiers: Annotated[str, typer.Option(help="comma-separated: logreg, mlp, cnn")] = "logreg,mlp,cnn",
    inception_weights: Annotated[Path | None, typer.Option(help="weights file for inception")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, heun or dpmpp; default: the run's")] = None,
    steps: Annotated[int | None, typer.Option(help="sampler steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance, 1 is none")] = None,
    seed: Annotated[int, typer.Option(help="seed of the images and the classifiers")] = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Measure a run against real images.  The figures are private: do not publish them."""
    from dpsyngen.console import Console

    console = Console(quiet)
    from dpsyngen import api

    sampling = {"sampler": sampler, "steps": steps, "guidance": guidance}
    result = api.evaluate(
        run,
        data=data,
        test=test,
        images=count,
        features=_names(features),
        classifiers=_names(classifiers),
        inception_weights=inception_weights,
        sampling={k: v for k, v in sampling.items() if v is not None},
        seed=seed,
        device=device,
        on_progress=console.note,
    )
    from dpsyngen.report.tables import metric_rows

    for name, value, note in metric_rows(result):
        console.line(f"{name:<42} {value:>10}   {note}")
    console.line(f"PRIVATE figures, kept in {run / 'private' / 'metrics.json'}: publishing them costs privacy")


@app.command()
def report(run: RunArgument, quiet: Quiet = False) -> None:
    """Write the report: the full one into private/, the publishable one into release/."""
    from dpsyngen import api
    from dpsyngen.console import Console

    console = Console(quiet)
    private, public = api.write_report(run)
    console.line(f"full report, PRIVATE: {private}")
    console.line(f"publishable report:   {public}")


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
) -> None:
    """What a budget buys, before spending it."""
    from dpsyngen.console import Console
    from dpsyngen.privacy.plan import budget_table

    console = Console()
    target = None if epsilon is None else _epsilon(epsilon)
    options: dict[str, Any] = {"noise_multiplier": noise, "delta": delta, "group_size": group_size}
    for line in budget_table(records, batch, steps, epsilon=target, **options):
        console.line(line)


# ------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Run the command line: errors that a user can mend are one message, without a traceback."""
    # With other work on the machine, threads that spin while they wait make each other many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except DpsyngenError as error:
        print(f"dpsyngen: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("dpsyngen: stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        import errno

        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(
                f"dpsyngen: the disk is full{f', at {error.filename}' if error.filename else ''}.  Nothing that was "
                "finished is lost: free some space, then continue (training: --resume).",
                file=sys.stderr,
            )
        elif error.errno == errno.EPIPE:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            print(f"dpsyngen: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
