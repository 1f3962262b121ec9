"""The command `dpsyngen train`."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsyngen.cli.options import AsJson, Device, Quiet, Settings, assignments, epsilon_of, with_assigned
from dpsyngen.console import Console
from dpsyngen.errors import ConfigError, require

if TYPE_CHECKING:
    from dpsyngen.fit import Trained
    from dpsyngen.training.pipeline import Training


prior_app = typer.Typer(
    help="The prior: a network that programs train to denoise any set, given its DP moments.", no_args_is_help=True
)


@prior_app.command("train")
def train_prior(
    out: Annotated[Path, typer.Option(help="file to make; beside it, NAME.part keeps what is done so far")],
    channels: Annotated[str, typer.Option(help="grey or rgb")] = "grey",
    steps: Annotated[int, typer.Option(help="of Muon")] = 3000,
    seed: Annotated[int, typer.Option(help="public; the weights follow from it")] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a prior on programs: families, or scenes for rgb.  No private data can touch it; resumes by itself."""
    require(channels in ("grey", "rgb"), "--channels", channels, "grey or rgb")
    require(out.name and out.parent.is_dir(), "--out", out, "a file, in a folder that exists")
    from dpsyngen.training import prior
    from dpsyngen.training.run import FolderLock

    console, part = Console(quiet, as_json), out.with_name(out.name + ".part")
    settings = prior.PriorSettings(1 if channels == "grey" else 3, seed, steps)

    def tell(step: int, loss: float) -> None:
        console.track("prior", step, steps, "steps", f"loss {loss:.3f}", start=step - 1)

    lock = FolderLock(part.with_name(part.name + ".lock"), out)
    with lock.held():
        try:
            require(not out.exists(), "--out", out, "a file that does not exist yet: nothing is written over")
            made = prior.train_prior(settings, part, tell)
            console.track_ends()
            made.save(out)
            part.unlink(missing_ok=True)
        except KeyboardInterrupt as stop:
            console.track_ends(stop)
            text = f"interrupted; the same command goes on from {part}" if part.exists() else "interrupted at its start"
            raise KeyboardInterrupt(text) from None
        finally:
            if not part.exists():
                lock.path.unlink(missing_ok=True)
    told = made.about["error_over_wiener"]
    lines = [f"squared error over the Wiener filter's, at log σ = {' '.join(f'{v:g}' for v in told['log_sigma'])}:"]
    lines += [
        f"  {name}: {' '.join(f'{v:.2f}' for v in values)}" for name, values in told.items() if name != "log_sigma"
    ]
    console.result(made.about, [*lines, f"the prior is in {out}: use it with --set {quote(f'network.prior={out}')}"])


def train(
    out: Annotated[Path, typer.Option(help="run directory to make (or, with --resume, to continue)")],
    data: Annotated[str | None, typer.Option(help="folder, Parquet, tar, .npz, .npy, IDX, or a named set")] = None,
    epsilon: Annotated[str | None, typer.Option(help="ε, the privacy budget; inf trains without privacy")] = None,
    delta: Annotated[float | None, typer.Option(help="δ; default: the largest power of ten below 1/n")] = None,
    preset: Annotated[str | None, typer.Option(help="named settings; default: gpu on a GPU, else cpu-small")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings")] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="dpdm, finetune, cleaning, coarse, both, gaussian, instant or residual"),
    ] = None,
    instant: Annotated[bool, typer.Option("--instant", help="variant instant: seconds")] = False,
    tau_cleaning: Annotated[float | None, typer.Option(help="log σ below which programs train")] = None,
    tau_coarse: Annotated[float | None, typer.Option(help="log σ above which programs or DP moments answer")] = None,
    networks: Annotated[str | None, typer.Option(help="experts (one a stage) or shared")] = None,
    pretrain: Annotated[bool | None, typer.Option(help="start from programmatic images")] = None,
    network: Annotated[str | None, typer.Option(help="size: nano, tiny, small, base, large, huge")] = None,
    program: Annotated[str | None, typer.Option(help="programmatic images; see `dpsyngen programs list`")] = None,
    public_steps: Annotated[int | None, typer.Option(help="steps on programs for each public network")] = None,
    steps: Annotated[int | None, typer.Option(help="DP-SGD steps")] = None,
    batch: Annotated[int | None, typer.Option(help="expected batch of private images")] = None,
    copies: Annotated[int | None, typer.Option("-k", "--copies", help="K, noise levels for each image")] = None,
    clip: Annotated[float | None, typer.Option(help="C, clipping norm")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr")] = None,
    physical_batch: Annotated[int | None, typer.Option(help="images in memory at a time; default: what fits")] = None,
    resolution: Annotated[int | None, typer.Option(help="pixels to which images are resized")] = None,
    fit: Annotated[str | None, typer.Option(help="of images that are not square: crop (default) or pad")] = None,
    value_range: Annotated[
        str | None,
        typer.Option(metavar="LOW,HIGH", help="values of black and white where files do not say: 0,4095; public"),
    ] = None,
    window: Annotated[str | None, typer.Option(metavar="CENTRE,WIDTH", help="of DICOM; default: the file's")] = None,
    frames: Annotated[str | None, typer.Option(help="of DICOM: first, or all, which needs --group-size")] = None,
    channels: Annotated[str | None, typer.Option(help="auto, grey or rgb")] = None,
    labels: Annotated[str | None, typer.Option(metavar="FILE", help="table of image files and their labels")] = None,
    label_column: Annotated[str | None, typer.Option(help="column or key of labels; default: a usual name")] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="ignore classes")] = False,
    records: Annotated[int | None, typer.Option(help="declared number of images, public; default: as found")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out unreadable images")] = False,
    group_size: Annotated[
        int | None, typer.Option(help="images of one person at most: ε is then for all of them together")
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(help="table of file names and persons, which checks --group-size; stays private")
    ] = None,
    most_per_person: Annotated[
        int | None, typer.Option(help="with --groups: use this many images of each person at most, chosen at random")
    ] = None,
    budget: Annotated[Path | None, typer.Option(help="file charged by all runs on these images")] = None,
    settings: Settings = None,
    insecure_seed: Annotated[int | None, typer.Option(help="reproducible noise: NOT PRIVATE")] = None,
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
    require(log_format in ("text", "json"), "--log-format", log_format, "text or json")
    require(not instant or variant in (None, "instant"), "--variant", variant, "left out, or instant, with --instant")
    for option, value in (("--labels", labels), ("--label-column", label_column)):
        require(value is None or not unconditional, option, value, "left out with --unconditional: it reads no labels")
    from dpsyngen.config import load_config, with_options
    from dpsyngen.fit import Interrupted, prepare, prepare_resume, train_together
    from dpsyngen.training.log import Display

    options = with_options(
        data__source=data,
        data__resolution=resolution,
        data__channels=channels,
        data__fit=fit,
        data__value_range=value_range,
        data__window=window,
        data__frames=frames,
        data__labels=False if unconditional else labels,
        data__label_column=label_column,
        data__records=records,
        data__skip_bad=True if skip_bad else None,
        privacy__epsilon=epsilon_of(epsilon),
        privacy__delta=delta,
        privacy__clipping_norm=clip,
        privacy__insecure_seed=insecure_seed,
        privacy__group_size=group_size,
        privacy__groups=None if groups is None else str(groups),
        privacy__most_per_person=most_per_person,
        privacy__budget=None if budget is None else str(budget),
        stages__variant="instant" if instant else variant,
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

    def begin(**where: Any) -> Training:
        """Make the training; what is wrong with the settings is said here, by the main process alone."""
        if resume:
            moved = {("data", "source"), ("privacy", "groups")}
            moved |= set() if unconditional else {("data", "labels")}
            chosen = {(section, name) for section, names in options.items() for name in names}
            if preset or config or settings or chosen - moved:
                raise ConfigError(
                    "--resume continues with the settings that the run was started with; leave out everything but "
                    "--out, --data, --labels and --groups (only if they have moved), --device, --tensorboard and what "
                    "is about output."
                )
            return prepare_resume(out, data, tensorboard=tensorboard, groups=groups, labels=labels, **where)
        if data is None and config is None:
            raise ConfigError("--data is missing: a folder, Parquet, WebDataset, .npz, .npy, IDX, or a named set.")
        given = with_assigned(options, assignments(settings or []))
        loaded = load_config(given, preset=preset, file=config, device=where["device"])
        if "epsilon" not in loaded.privacy.model_fields_set:  # neither an option nor the file says it
            raise ConfigError(
                "--epsilon is missing: how much privacy to spend (1 is strict, 10 is loose, inf is none)."
            )
        return prepare(loaded, out, given=given, **where)

    console, begun = Console(quiet, as_json, log_format), time.monotonic()
    try:
        with Display(console, private=log_format == "text") as on_event:
            trained = train_together(partial(begin, on_event=on_event), data, device)
    except Interrupted as stop:
        again = f"dpsyngen train --resume --out {quote(str(stop.run.path))}"
        raise KeyboardInterrupt(f"interrupted; continue with: {again}") from None
    if trained is not None:
        _tell(trained, console, time.monotonic() - begun)


def _tell(trained: Trained, console: Console, seconds: float) -> None:
    """What came out, for people and for programs."""
    from dpsyngen.privacy.certificate import number

    t = trained.training
    plan, ledger, release = t.plan, t.ledger, t.run.release
    m, epsilon, secure = plan.mechanism, ledger.epsilon(), t.randomness.secure
    spent = f"ε = {number(epsilon, 5, up=True)} at δ = {ledger.delta:.3g}"
    if math.isinf(epsilon):
        spent = "NOT PRIVATE (ε = ∞)"
    elif not secure:
        spent = f"NOT PRIVATE (reproducible noise); it would be {spent}"
    console.result(
        {
            "run": t.run.path,
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
            "parameters": t.parameters,
            "seconds": round(seconds, 3),
            "findings": [f.to_dict() for f in trained.findings],
        },
        [
            *(
                f"{f.severity.upper()}{' (PRIVATE)' if f.basis == 'private' else ''}: {f.code}: {f.seen}"
                for f in trained.findings
            ),
            f"{spent}: the generator is in {release} ({release / 'PRIVACY.md'})",
        ],
    )
