"""The run report: of the release half in both copies, of the private half in the private copy alone.

Everything comes from files of the run, and no private image is read here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import yaml
from markupsafe import Markup
from numpy.typing import NDArray

from dpsyngen.config import Config, validate
from dpsyngen.errors import ConfigError, ReleaseError, RunError
from dpsyngen.evaluation.memorisation import PAIRS_FILE
from dpsyngen.evaluation.metrics import METRICS
from dpsyngen.files import read_yaml_file, write_text
from dpsyngen.generator.generator import ReleasedGenerator, SamplerOptions
from dpsyngen.privacy.certificate import number, strength, template
from dpsyngen.privacy.ledger import Ledger, LedgerEntry
from dpsyngen.programs import image_grid, make_program
from dpsyngen.programs.grid import png_url
from dpsyngen.report.charts import Points, line_chart, stage_chart
from dpsyngen.training.log import JsonLines
from dpsyngen.training.run import Run
from dpsyngen.version import __version__

SEED = 0
"""Public, and the same in every report: image i of two runs starts from the same noise, so their grids compare."""
_PER_CLASS = 12  # images in a row
_MOST_CLASSES = 20
_CURVES = (
    ("loss", "Loss", False),
    ("clipped", "Share of clipped gradients", True),
    ("median_norm", "Median gradient norm before clipping", False),
)


def render(name: str, values: dict[str, Any]) -> str:
    """The page that `name`, a file of ``dpsyngen/report/templates``, makes of `values`; see :func:`template`.

    Its list of contents, if it has one, gets all headings of sections.
    """
    page = template(Path(__file__).parent / "templates" / name).render(version=__version__, **values)
    headings = re.findall(r'<h2 id="([^"]+)">(.*?)(?: <span class="tag">|</h2>)', page)
    links = (f'<li><a href="#{anchor}">{title}</a></li>\n' for anchor, title in headings)
    return page.replace("</ul>\n</nav>", f"{''.join(links)}</ul>\n</nav>", 1)


def write_report(run: Run | str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write the report of a finished run, twice: the full one into ``private/``, the publishable into ``release/``.

    The publishable copy is made from files of the release half alone, and is written before any other is opened.

    Returns:
        paths of the private and of the publishable report.

    Raises:
        RunError, LedgerError: the run is not finished, or a file of it is damaged.
    """
    run = run if isinstance(run, Run) else Run(Path(run))
    run.require_complete()
    with run.lock():
        run.finished_ledger()
        values = release_values(run.release)
        private_path, public_path = run.private / "report.html", run.release / "report.html"
        write_text(public_path, render("report.html.j2", values | {"private_half": None}))
        private_half = private_values(run, values["statement"]["public_assumptions"]["class_names"])
        write_text(private_path, render("report.html.j2", values | {"private_half": private_half}), 0o600)
    return private_path, public_path


# ----------------------------------------------------------------- of the release half: opens nothing else


def release_values(release: Path) -> dict[str, Any]:
    """The values of the template that need files of `release` alone, a release half or a copy of it.

    RunError if one of the files is damaged.
    """
    generator, path = ReleasedGenerator(release), release / "privacy.json"
    try:
        statement, path = generator.privacy.to_dict(), release / "config.yaml"
        settings = read_yaml_file(path, "the configuration")
        config = validate(settings)
        if missing := sorted(Config.model_fields.keys() - settings.keys() - {"logging"}):
            raise ConfigError(f"it lacks {', '.join(missing)}.")
    except (ConfigError, ReleaseError) as error:
        raise RunError(f"{path} is missing or damaged: {error}  Put it back from a backup.") from None
    programs, p = None, config.program
    with contextlib.suppress(ConfigError):  # this version may have no such program
        size = {"resolution": generator.resolution, "channels": generator.channels}
        programs = _grid(make_program(p.name, **size, seed=p.seed, **p.params).batch(range(24)))
    epsilon = None if statement["epsilon"] == "inf" else statement["epsilon"]
    return {
        "statement": statement,
        "mechanisms": figure_table([_mechanism(m) for m in statement["mechanisms"]]),
        "epsilon": epsilon,
        "odds": None if epsilon is None else math.exp(min(epsilon, 700)),
        "strength": epsilon and strength(epsilon, statement["delta"], statement["by_person"]),
        "config_yaml": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        "samples": [(name, _grid(drawn)) for name, drawn in class_images(generator, _MOST_CLASSES, _PER_CLASS, SEED)],
        "omitted_classes": max(0, len(generator.class_names) - _MOST_CLASSES),
        "sampling": generator.settings(seed=SEED),
        "trajectory": trajectory_table(generator),
        "programs": programs,
        "stage_chart": stage_chart(statement["stages"], config.network.model_dump(), config.sampling.model_dump()),
        "public_charts": loss_charts(JsonLines(release / "public_training.jsonl", 0o644).read(), "public"),
    }


def _mechanism(m: dict[str, Any]) -> dict[str, str]:
    """A row of a table; a mechanism without noise has no rate."""
    rate, noise, bound = (m.get(name) for name in ("sampling_rate", "noise_multiplier", "l2_sensitivity"))
    return {
        "mechanism": m["mechanism"],
        "runs": f"{m.get('count') or m.get('steps') or 1:,}",
        "sampling rate": "–" if rate is None else number(rate),
        "noise multiplier": "no noise" if noise is None else number(noise),
        # That of the last query of DP moments follows from the answers to the others; its reason says it by direction.
        "sensitivity": "by direction" if bound is None else number(bound) if isinstance(bound, float) else bound,
        "what for": m["reason"],
    }


def class_images(
    generator: ReleasedGenerator, most: int, each: int, seed: int, **sampling: Any
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Names of the first `most` classes and `each` images of each; "" and four times as many without classes."""
    shown = generator.class_names[:most]
    if not shown:
        return [("", generator.sample(4 * each, seed=seed, **sampling).images)]
    labels = generator.labels(each * len(shown), list(range(len(shown))))
    assert labels is not None
    images = generator.sample(len(labels), labels=labels, seed=seed, **sampling).images
    return [(name, images[labels == i]) for i, name in enumerate(shown)]


def _grid(images: NDArray[np.uint8]) -> str:
    return png_url(image_grid(images, _PER_CLASS, scale=max(1, round(66 / images.shape[-1])), pad=3))


def trajectory_table(generator: ReleasedGenerator, **sampling: Unpack[SamplerOptions]) -> dict[str, Any]:
    """The images with which the class rows of the report begin, at nine steps that are even in log σ.

    `sampling` is as for :meth:`ReleasedGenerator.settings`; the seed is the report's where none is given.

    Returns:
        ``columns``: σ and trainer of each; ``stages``: name, trainer and number of columns of each run of columns that
        one stage owns; ``rows``: names and pictures of x for the first image, and of D(x; σ) for each; all end with
        the image.
    """
    given: SamplerOptions = {"seed": SEED, **sampling}
    found = generator.trajectory(min(6, len(generator.class_names)) or 4, 9, **given)
    images, labels = found.samples.images, found.samples.labels
    names = [f"image {i + 1}" if labels is None else generator.class_names[labels[i]] for i in range(len(images))]
    ways = [(f"noisy x of {names[0]}", found.noisy[:, 0], images[0])]
    ways += zip(names, found.denoised.swapaxes(0, 1), images, strict=True)
    # Two digits, without an exponent where that is short.
    sigmas = [f"{float(f'{s:.2g}'):g}" if s >= 1e-4 else f"{s:.1e}" for s in found.sigmas]
    return {
        "columns": [(sigma, stage.trainer) for sigma, stage in zip(sigmas, found.stages, strict=True)],
        "stages": [(stage.name, stage.trainer, len(list(run))) for stage, run in itertools.groupby(found.stages)],
        "rows": [(name, _grid(np.stack([*way, image]))) for name, way, image in ways],
    }


def curves(log: Iterable[Mapping[str, Any]], name: str) -> dict[str, Points]:
    """(step, value) of a figure, such as "loss", of each phase of a log; without values that are not finite."""
    out: dict[str, list[tuple[float, float]]] = {}
    for line in log:
        value = line.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            out.setdefault(str(line["phase"]), []).append((line["step"], float(value)))
    return {phase: sorted(points) for phase, points in out.items()}


def loss_charts(log: Iterable[Mapping[str, Any]], tone: str) -> dict[str, Markup]:
    """The loss of each phase of a log that has two steps at least; `tone` as for :func:`line_chart`."""
    charts = ((name, line_chart({name: p}, f"Loss of {name}", tone)) for name, p in curves(log, "loss").items())
    return {name: chart for name, chart in charts if chart is not None}


# ------------------------------------------------------------------------------------ of the private half


def private_values(run: Run, class_names: Sequence[str]) -> dict[str, Any]:
    """The values of the template that the publishable copy must not have."""
    log = JsonLines(run.private / "training.jsonl", 0o600).read()
    charts = {title: line_chart(curves(log, name), title, "private", percent=p) for name, title, p in _CURVES}

    def evaluated(metrics: dict[str, Any]) -> dict[str, Any]:
        # Short lists on one line.
        text = yaml.safe_dump(metrics, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
        rows, classes = figure_table(metric_rows(metrics)), class_accuracy(metrics, class_names)
        return {"metrics": rows, "classes": classes, "protocol": text}

    return {
        "ledger": figure_table(ledger_rows(Ledger(run.ledger_path).entries)),
        "charts": {title: chart for title, chart in charts.items() if chart is not None},
        "summary": _summary(log),
        **(_kept(run.private / "metrics.json", evaluated) or {"metrics": None}),
        "memorisation": _kept(run.private / "memorisation.json", _memorisation),
        "pairs": _kept(run.private / PAIRS_FILE, dict),
        "health": _kept(run.private / "health.json", itemgetter("findings")),
    }


def measured(run: Run) -> list[FigureRow]:
    """The figures of the last evaluation of a run, none if there was none; RunError if they are damaged."""
    return _kept(run.private / "metrics.json", metric_rows) or []


def copied(run: Run) -> tuple[str, list[FigureRow]]:
    """The conclusion and the figures of the last memorisation check of a run; empty if there was none."""
    path = run.private / "memorisation.json"
    return _kept(path, lambda found: (str(found["conclusion"]), memorisation_rows(found))) or ("", [])


def _kept(path: Path, read: Callable[[dict[str, Any]], Any]) -> Any:
    """What `read` makes of what a command left in the private half; None if it was not run."""
    if not path.exists():
        return None
    kept = path.read_bytes()  # a file that may not be read is not damaged
    try:
        return read(json.loads(kept))
    except Exception as error:  # nearly anything, where values are missing or of another kind
        why = f"{path} is damaged ({error!r})"
        raise RunError(f"{why}.  Remove it, or run the command that made it again.") from error


def _summary(log: list[dict[str, Any]]) -> dict[str, float] | None:
    if not log:
        return None
    last = log[-max(1, len(log) // 10) :]
    return {
        "clipped": sum(v["clipped"] for v in last) / len(last),
        "median_norm": sum(v["median_norm"] for v in last) / len(last),
        "not_finite": sum(v["not_finite"] for v in log),
        "examples": sum(v["examples"] for v in log) / len(log),
    }


def _memorisation(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a memorisation check."""
    everything = next(iter(figures["spaces"].values()))["everything"]
    return {
        "conclusion": figures["conclusion"],
        "flagged": figures["flagged"],
        "rows": figure_table(memorisation_rows(figures)),
        "expected": None if everything is None else f"{100 * everything['expected']:.0f} %",
    }


def class_accuracy(metrics: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any] | None:
    """Accuracy by class, and which classes were mistaken for which; None if no classifier was scored.

    Returns:
        ``classifiers``: names; ``rows``: of each class its name and, for each classifier, the accuracy in percent (None
        where the class has no test image); ``confusion``: None, or a classifier and for each real class its name and
        how many of its images were taken for each class.
    """
    scored = {name: c for name, c in metrics.get("cas", {}).items() if c.get("per_class_accuracy")}
    if not scored:
        return None
    percents = ([None if a is None else round(100 * a, 1) for a in c["per_class_accuracy"]] for c in scored.values())
    rows = list(zip(class_names, zip(*percents, strict=True), strict=True))
    chosen = metrics.get("cas_chosen") if metrics.get("cas_chosen") in scored else next(iter(scored))
    counts, confusion = scored[chosen].get("confusion"), None
    if counts and len(counts) == len(class_names) <= _MOST_CLASSES:
        confusion = chosen, list(zip(class_names, counts, strict=True))
    return {"classifiers": list(scored), "rows": rows, "confusion": confusion}


def ledger_rows(entries: Sequence[LedgerEntry]) -> list[dict[str, str]]:
    """Rows of texts: ``entry`` (its number, from 1), ``kind``, ``reason``, ``runs``, ``rate``, ``noise``."""
    rows = []
    for place, entry in enumerate(entries, 1):
        m = entry.mechanism
        about = ("", "", "") if m is None else (f"{m.count:,}", number(m.sampling_rate), number(m.noise_multiplier))
        row = {"entry": str(place), "kind": entry.kind, "reason": entry.reason}
        rows.append(row | dict(zip(("runs", "rate", "noise"), about, strict=True)))
    return rows


# --------------------------------------------------------------- rows of figures, for the terminal too

_WORDS = {"name": "figure", "note": "how to read it", "interval": "95 % interval"}


class FigureRow(NamedTuple):
    """A figure as a line of a table; what it lacks is an empty text."""

    name: str
    value: str
    interval: str = ""
    floor: str = ""
    ceiling: str = ""
    note: str = ""


def figure_table(rows: Sequence[FigureRow | Mapping[str, str]]) -> dict[str, Any]:
    """Figures for a template: ``columns``, headings, and ``rows``, a text for each column; without empty columns."""
    named = [row._asdict() if isinstance(row, FigureRow) else row for row in rows]
    used = [name for name in (named[0] if named else ()) if any(row[name] for row in named)]
    return {
        "columns": [_WORDS.get(name, name) for name in used],
        "rows": [[row[name] for name in used] for row in named],
    }


def metric_rows(metrics: dict[str, Any]) -> list[FigureRow]:
    """A row for each figure of :func:`dpsyngen.evaluate`."""
    rows = [FigureRow("READ FIRST", "–", note=note) for note in metrics.get("notes", ())]
    most = metrics.get("protocol", {}).get("cas", {}).get("most_frequent_class")
    usual = "" if most is None else f"; {100 * most:.1f} % of them are of the most frequent class"
    for name, c in metrics["cas"].items():
        note = (
            f"trained on {c['n_train']:,} generated images, {c['chosen']} chosen on {c['n_validation']:,} held-out "
            f"generated ones ({100 * c['validation_accuracy']:.1f} %), scored once on {c['n_test']:,} real test images"
            f"{usual}"
        )
        star = " (chosen by validation)" if name == metrics.get("cas_chosen") else ""
        interval = f"{100 * c['accuracy_low']:.2f} to {100 * c['accuracy_high']:.2f} %"
        rows.append(FigureRow(f"CAS, {name}{star}", f"{100 * c['accuracy']:.2f} %", interval, note=note))
    for features, f in metrics.get("features", {}).items():
        counts = f"{f['generated_images']:,} generated against {f['real_images']:,} real training images"
        for what, key in (("floor", "floor_images"), ("ceiling", "ceiling_images")):
            # Most figures depend on the number of images, so bounds of fewer are not bounds of the same figure.
            if f[key] is not None and f[key] != f["generated_images"]:
                counts += f", {what} of {f[key]:,}"
        for name, m in f["metrics"].items():
            flag = f"{'DOUBTFUL' if m['value'] is not None else 'NOT MEASURED'}: {m['flag']}; " if m.get("flag") else ""
            value, low, high, floor, ceiling = (
                "" if m[key] is None else f"{m[key]:.4g}" for key in ("value", "low", "high", "floor", "ceiling")
            )
            title = f"{METRICS[name].title if name in METRICS else name}, {features}"
            note = f"{flag}{m['better']} is better; {counts}; {m['protocol']}"
            rows.append(FigureRow(title, value or "–", f"{low} to {high}" if low else "", floor, ceiling, note))
    return rows


def memorisation_rows(figures: dict[str, Any]) -> list[FigureRow]:
    """A row for each figure of a memorisation check, ``private/memorisation.json``."""
    rows: list[FigureRow] = []

    def add(name: str, value: str, note: str) -> None:
        rows.append(FigureRow(name, value, note=note))

    for features, space in figures["spaces"].items():
        about, everything, few = (space[k] for k in ("features", "everything", "nearest_few"))
        real = "training" if everything is None else "held-out"
        if everything is None:
            note = f"nothing to compare it with: there are no held-out images; {about['unit']}"
            add(f"median distance to a training image, {features}", f"{space['median_private']:.3g}", note)
        else:
            note = f"{_percent(everything['expected'])} if not memorised; {about['private_images']:,} training and "
            note += f"{about['held_out_images']:,} held-out images; 95 % interval {100 * everything['low']:.1f} to "
            note += f"{_percent(everything['high'])}; permutation test p = {everything['p_permutation']:.2g}"
            add(f"nearest to a training image, {features}", _percent(everything["share"]), note)
            note = f"{_percent(few['expected'])} if not memorised; permutation test p = {few['p_permutation']:.2g}"
            add(f"the same for the {few['images']:,} nearest images, {features}", _percent(few["share"]), note)
            note = f"1 if not memorised; medians {space['median_private']:.3g} and {space['median_held_out']:.3g}, "
            note += f"real sets of {space['size']:,} images each; {about['unit']}"
            ratio = "–" if space["ratio"] is None else f"{space['ratio']:.3f}"
            add(f"distance to training over held-out images, {features}", ratio, note)
        if space["closer"] is None:
            note = f"NOT MEASURED: {_percent(space['copies'])} of the {real} images are copies of training images"
        else:
            note = f"nearer to a training image than 99 % of the {real} images are to another "
            note += f"({space['threshold']:.3g}); 95 % interval {100 * space['closer_low']:.1f} to "
            note += _percent(space["closer_high"])
        closer = "–" if space["closer"] is None else _percent(space["closer"])
        add(f"closer than real images are, {features}", closer, note)
    note = "generated images that equal a training image in every pixel"
    if figures["duplicates_held_out"] is not None:
        note += f"; {figures['duplicates_held_out']:,} equal a held-out image"
    add("exact copies", f"{figures['duplicates']:,}", note)
    if repeated := figures["held_out_in_training"]:
        add("held-out images that are training images", f"{repeated:,}", "no control, and counted for neither side")
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
