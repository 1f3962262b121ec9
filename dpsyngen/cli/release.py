"""Commands of the guarantee and of what was released: ledger, budget, release, verify, key, sample, export."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpsyngen.cli.options import AsJson, Count, Device, Guidance, Quiet, RunArgument, Sampler, SamplerSteps
from dpsyngen.console import Console
from dpsyngen.distributed import joined
from dpsyngen.errors import ConfigError, RunError, require
from dpsyngen.files import require_absent_or_empty
from dpsyngen.version import __version__

if TYPE_CHECKING:
    from dpsyngen.privacy.budget import Composition
    from dpsyngen.privacy.ledger import Ledger
    from dpsyngen.release.bundle import Packed
    from dpsyngen.release.place import Exported
    from dpsyngen.training.run import Run

budget_app = typer.Typer(
    help="One ε for all runs on a data set: `train --budget FILE` charges it.", no_args_is_help=True
)


def _numbers(text: str | None, option: str, kind: type, allowed: str) -> list[Any]:
    try:
        return [] if text is None else [kind(t) for t in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}, but must be {allowed}, comma-separated.") from None


def ledger(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="run directories of the same images")],
    delta: Annotated[str | None, typer.Option(help="other δ to state ε at, comma-separated")] = None,
    group_size: Annotated[str | None, typer.Option(help="images of one person, comma-separated")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compute ε again from the ledgers of one or several runs; refuses one that was edited or cut."""
    from dpsyngen.privacy.accounting import LARGEST_GROUP
    from dpsyngen.privacy.budget import Composition
    from dpsyngen.privacy.ledger import Ledger
    from dpsyngen.release.bundle import check_against_ledger
    from dpsyngen.training.run import Run

    deltas = _numbers(delta, "--delta", float, "numbers between 0 and 1")
    groups = _numbers(group_size, "--group-size", int, "whole numbers")
    for d in deltas:
        require(0 < d < 1, "--delta", d, "between 0 and 1")
    for g in groups:
        require(1 <= g <= LARGEST_GROUP, "--group-size", g, f"at least 1 and at most {LARGEST_GROUP}")
    opened = [Run(path) for path in runs]
    ledgers = [Ledger(run.ledger_path) for run in opened]
    if len({x.run for x in ledgers}) != len(ledgers):
        raise ConfigError(
            "a run was named twice, or two of them are copies of each other, with the same steps and noise, which "
            "would count twice: name one."
        )
    by_person = {run.config.privacy.most_per_person is not None for run in opened}
    if len(by_person) > 1:
        raise ConfigError(
            "some of the runs protect persons (--most-per-person), others images: no sum of theirs is a promise to "
            "either.  Name runs of one kind."
        )
    if groups and True in by_person:
        raise ConfigError(
            "--group-size asks about images, and these runs protect persons (--most-per-person).  Leave it out."
        )
    for run in opened:
        if run.complete:
            check_against_ledger(run)
    total = Composition.of(ledgers)
    itself, *others = what_if = total.what_if(
        deltas or [total.delta / 10], groups or ([] if True in by_person else [2, 5])
    )
    Console(quiet, as_json).result(
        {
            "runs": [r.path for r in opened],
            "private": total.secure and not total.non_private,
            **itself,
            "what_if": others,
            "mechanisms": [m.to_dict() for m in total.mechanisms],
            "entries": [[e.to_dict() for e in x.entries] for x in ledgers],
            "heads": [{"lines": x.head.lines, "digest": x.head.digest} for x in ledgers],
        },
        _ledger_lines(list(zip(opened, ledgers, strict=True)), total, what_if),
    )


def _ledger_lines(runs: list[tuple[Run, Ledger]], total: Composition, what_if: list[dict[str, Any]]) -> Iterator[str]:
    from dpsyngen.privacy.certificate import protected

    for run, x in runs:
        anchor = "as its certificate knew it" if run.complete else "not finished, so there is no certificate yet"
        yield f"{run.path}: {x.head.lines} lines, chain and head intact, {anchor}"
        for number, e in enumerate(x.entries, 2):
            m, what = e.mechanism, e.reason
            if m is not None:
                what += f": {m.count:,} × Gaussian, noise {m.noise_multiplier:.5g}, sampling rate {m.sampling_rate:.5g}"
            yield f"{number:>5}  {e.kind:<11}  {what}"
    together = f" of {len(runs)} runs together" if len(runs) > 1 else ""
    unit, _ = protected(total.group_size, runs[0][0].config.privacy.most_per_person is not None)
    yield ""
    yield f"total{together} for {unit}, added or removed; ε by PLD and by Rényi DP, both upper bounds"
    yield f"{'δ':>10} {'images':>7} {'ε PLD':>10} {'ε RDP':>10}"
    for row in what_if:
        # Rounded up, as bounds must be.
        figures = [math.ceil(e * 1e4) / 1e4 if e < math.inf else e for e in (row["epsilon"], row["epsilon_by_rdp"])]
        by_pld, by_rdp = (f"{e:.4f}".replace("inf", "∞") for e in figures)
        note = "  <- the run's" if row is what_if[0] else ""
        yield f"{row['delta']:>10.3g} {row['group_size']:>7} {by_pld:>10} {by_rdp:>10}{note}"
    yield f"ε PLD of the run's by {what_if[0]['accountant']}"
    others = {row["accountant"] for row in what_if if not row["accountant"].startswith("privacy loss distribution")}
    yield from (f"one of the others by {by}" for by in sorted(others - {what_if[0]["accountant"]}))
    if total.non_private:
        yield "NOT PRIVATE: private images were used without noise (ε = ∞)"
    if not total.secure:
        yield "NOT PRIVATE: the noise came from a reproducible seed"


BudgetFile = Annotated[Path, typer.Argument(metavar="FILE", help="budget file")]


@budget_app.command("new")
def budget_new(
    file: BudgetFile,
    epsilon: Annotated[float, typer.Option(help="ε that all runs together may spend")],
    delta: Annotated[float, typer.Option(help="δ for it; below 1/n")],
    group_size: Annotated[int, typer.Option(help="images of one person")] = 1,
    growing: Annotated[bool, typer.Option("--growing", help="allow runs on images that changed since")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make a budget file; keep it with the private images."""
    from dpsyngen.privacy.budget import Budget

    Budget.create(file, epsilon_limit=epsilon, delta=delta, group_size=group_size, growing=growing)
    Console(quiet, as_json).result(
        {"path": file, "epsilon": epsilon, "delta": delta, "group_size": group_size, "growing": growing},
        [f"{file}: ε = {epsilon:g} at δ = {delta:.3g}; charge it with `dpsyngen train --budget {file} …`"],
    )


@budget_app.command("show")
def budget_show(file: BudgetFile, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """What is spent, by whom, and what is left."""
    from dpsyngen.privacy.accounting import epsilon
    from dpsyngen.privacy.budget import Budget
    from dpsyngen.privacy.certificate import number, protected

    b = Budget(file)
    by_pld, by_rdp = b.epsilon(), b.epsilon("rdp")
    shown = [number(e, 5, up=True) for e in (by_pld, by_rdp)]
    alone = {c.run: epsilon(c.mechanisms, b.delta, group_size=b.group_size) for c in b.charges.values()}
    unit = "each person" if b.by_person else protected(b.group_size, False)[0]
    lines = [f"budget: ε = {b.epsilon_limit:g} at δ = {b.delta:.3g} for {unit}"]
    for c in b.charges.values():
        state = "given up" if c.settled else "reserved"
        lines.append(f"  {c.name:<24} {state}  ε = {number(alone[c.run], 5, up=True)} on its own  ({c.run[:12]})")
    lines.append(f"taken by all together: ε = {shown[0]} by PLD, {shown[1]} by Rényi DP")
    Console(quiet, as_json).result(
        {
            "epsilon": b.epsilon_limit,
            "delta": b.delta,
            "group_size": b.group_size,
            "by_person": b.by_person,
            "reserved_epsilon": by_pld,
            "reserved_epsilon_by_rdp": by_rdp,
            "runs": [
                {"run": c.run, "name": c.name, "settled": c.settled, "epsilon_alone": alone[c.run]}
                for c in b.charges.values()
            ],
        },
        lines,
    )


@budget_app.command("settle")
def budget_settle(
    file: BudgetFile,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run that will never be resumed")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Give back what an abandoned run had reserved and not used.  The run can never go on."""
    from dpsyngen.privacy.budget import Budget
    from dpsyngen.privacy.certificate import number
    from dpsyngen.privacy.ledger import Ledger
    from dpsyngen.training.run import Run

    opened = Run(run)
    if opened.complete:
        raise RunError(f"{run} is finished, so it used all that it had reserved; there is nothing to give back.")
    with opened.lock():
        charged = Ledger(opened.ledger_path)
        budget = Budget(file)
        before = budget.epsilon()
        budget.settle(charged.run, charged.mechanisms)
    after, limit = budget.epsilon(), budget.epsilon_limit
    Console(quiet, as_json).result(
        {"path": file, "run": run, "epsilon_before": before, "epsilon_after": after, "epsilon": limit},
        [f"{run} is given up: ε = {number(before, 5, up=True)} -> {number(after, 5, up=True)} taken of {limit:g}"],
    )


def release(
    run: RunArgument,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE.zip", help="file to make")],
    samples: Annotated[int, typer.Option(help="generated images to put in, at most 100,000; costs no privacy")] = 0,
    seed: Annotated[int | None, typer.Option(help="public seed of the samples; default: a random one")] = None,
    sign: Annotated[Path | None, typer.Option(metavar="KEY", help="key, from `dpsyngen key`")] = None,
    not_private: Annotated[bool, typer.Option("--not-private", help="pack it without a guarantee")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Pack what may be published into one zip: generator, certificate, checksums, signature."""
    from dpsyngen.release.bundle import pack, require_ready
    from dpsyngen.report.html import write_report
    from dpsyngen.training.run import Run

    require(seed is None or samples, "--seed", seed, "left out without --samples: it is theirs")
    console, opened = Console(quiet, as_json), Run(run)
    opened.require_complete()
    with opened.lock():
        if not (opened.release / "report.html").exists():
            require_ready(opened, bundle, samples, sign, not_private)  # a refused bundle leaves no report either
            write_report(opened)
        with console.progress("drawing samples", max(samples, 1), "images") as progress:
            told = progress.update
            done = pack(opened, bundle, samples=samples, seed=seed, key=sign, not_private=not_private, on_progress=told)
    for name in done.left_out:
        console.note(f"  left out, as it is no part of a release or was changed by hand: {name}")
    console.result(
        _about(done, "path", "files", "sha256", "signed_by", "left_out"),
        [
            f"{done.path}: {done.files} files, SHA-256 {done.sha256}",
            f"signed by the key {done.signed_by}" if done.signed_by else "not signed (--sign KEY)",
            done.certificate.line,
        ],
    )


def _about(done: Packed | Exported, *written: str) -> dict[str, Any]:
    """What was `written`, and what its certificate claims, for ``--json``."""
    claim = ("private", "not_private_because", "epsilon", "delta", "group_size")
    return {n: getattr(done, n) for n in written} | {n: getattr(done.certificate, n) for n in claim}


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE.zip", help="a bundle, from anybody")],
    public_key: Annotated[Path | None, typer.Option(help="the key that must have signed it (PEM)")] = None,
    all_samples: Annotated[bool, typer.Option("--all-samples", help="draw every sample again")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check a bundle with no private image at hand: checksums, signature, ε, generator."""
    from dpsyngen.release.verify import verify as check_bundle

    require(bundle.is_file(), "the bundle", bundle, "a file, made by `dpsyngen release RUN BUNDLE.zip`")
    verdict = check_bundle(bundle, public_key, all_samples)
    marks = {True: "ok", False: "FAILED", None: "-"}
    lines = [*(f"{marks[c.passed]:<7} {c.name:<13} {c.text}" for c in verdict.checks), ""]
    if verdict.passed:
        lines += [
            "The bundle is sound: its claim follows from the mechanisms that it states.",
            "Not to be seen from a bundle: whether the training did what it states, and how good images are.",
        ]
    else:
        lines.append("The bundle is NOT to be relied on.")
    checks = [{"check": c.name, "passed": c.passed, "text": c.text} for c in verdict.checks]
    Console(quiet, as_json).result({"passed": verdict.passed, "checks": checks}, lines)
    if not verdict.passed:
        raise typer.Exit(6)


def key(
    file: Annotated[Path, typer.Argument(metavar="KEY", help="private key to make; KEY.pub is the public one")],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make a key pair for signing bundles (Ed25519); encrypted if DPSYNGEN_KEY_PASSPHRASE is set."""
    from dpsyngen.release.signing import make_key

    public, print_of_key = make_key(file)
    Console(quiet, as_json).result(
        {"private_key": file, "public_key": public, "fingerprint": print_of_key},
        [
            f"private key: {file} (keep it secret)",
            f"public key:  {public} (give it to those who verify), fingerprint {print_of_key}",
        ],
    )


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
    from dpsyngen.generator.classes import from_text
    from dpsyngen.generator.ranks import follow, open_everywhere, stream
    from dpsyngen.generator.samples import check_target, write_samples
    from dpsyngen.release.place import find

    console = Console(quiet, as_json)
    with joined() as ranks:
        if not ranks.main:
            follow(ranks)
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
    from dpsyngen.release.bundle import check_against_ledger
    from dpsyngen.release.place import export_release, find
    from dpsyngen.training.run import Run

    require(format == "diffusers", "--format", format, "diffusers")
    require_absent_or_empty(out, "--out")
    place = find(run)
    if place.run is not None:
        check_against_ledger(Run(place.run))
    done = export_release(place.release, out, not_private=not_private)
    Console(quiet, as_json).result(
        {"path": done.path, "format": format} | _about(done, "files") | {"certificate_sha256": done.certificate_sha256},
        [
            f"{done.path}: {len(done.files)} files for diffusers",
            done.certificate.line,
            "README.md says how to load it; the Python files in it are code, which a stranger should read first",
        ],
    )
