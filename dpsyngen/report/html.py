"""Writing the report: everything from files of the run, nothing computed from private images here."""

from __future__ import annotations

import base64
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dpsyngen.certificate import number
from dpsyngen.errors import ConfigError, RunError
from dpsyngen.files import write_text
from dpsyngen.generator import Generator
from dpsyngen.privacy.ledger import Ledger
from dpsyngen.programs import make_program
from dpsyngen.report.plots import COLOURS, loss_curve, png_data, stage_diagram
from dpsyngen.report.tables import memorisation_rows, metric_rows
from dpsyngen.training.run import JsonLines, Run
from dpsyngen.version import __version__

_PER_CLASS = 12
_MOST_CLASSES = 20


def write_reports(run: Run) -> tuple[Path, Path]:
    """Write ``private/report.html`` and ``release/report.html`` of a finished run.

    The publishable copy is made from files of the release half alone.
    """
    public = _public_part(run.release)
    private_path, public_path = run.private / "report.html", run.release / "report.html"
    write_text(public_path, _render(public | {"private_copy": False}))
    write_text(private_path, _render(public | _private_part(run) | {"private_copy": True}), 0o600)
    return private_path, public_path


def _render(values: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dpsyngen.report", "templates"),
        autoescape=True,  # class names come from the user's folders
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bound"] = partial(number, up=True)
    return environment.get_template("report.html.j2").render(**values)


def _public_part(release: Path) -> dict[str, Any]:
    statement = json.loads((release / "privacy.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((release / "config.yaml").read_text(encoding="utf-8"))
    generator = Generator(release)
    scale = max(1, round(56 / generator.resolution))
    shown = generator.class_names[:_MOST_CLASSES]
    rows: list[dict[str, Any]] = []
    settings = generator.settings()
    if shown:
        labels = generator.labels(_PER_CLASS * len(shown), list(range(len(shown))))
        assert labels is not None
        images = generator.sample(len(labels), labels=labels).images
        for number, name in enumerate(shown):
            rows.append({"name": name, "picture": png_data(images[labels == number], _PER_CLASS, scale)})
    else:
        rows.append({"name": "", "picture": png_data(generator.sample(48).images, _PER_CLASS, scale)})
    drawn = _drawn_by_program(config["program"], generator)
    noise = config["network"]
    curves = _curves(JsonLines(release / "public_training.jsonl", 0o644).read())
    epsilon = statement["epsilon"]
    return {
        "version": __version__,
        "statement": statement,
        "epsilon": None if epsilon == "inf" else epsilon,
        "odds": None if epsilon == "inf" else math.exp(min(epsilon, 700)),
        "config_yaml": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "samples": rows,
        "omitted_classes": len(generator.class_names) - len(shown),
        "sampling": settings,
        "programs": None if drawn is None else png_data(drawn, _PER_CLASS, scale),
        "stage_diagram": stage_diagram(
            statement["stages"],
            noise["noise_mean"],
            noise["noise_std"],
            config["sampling"]["sigma_min"],
            config["sampling"]["sigma_max"],
        ),
        "public_curve": loss_curve(curves, COLOURS["public"]) if curves else None,
        "ledger": None,
        "metrics": None,
        "private_curve": None,
        "private_summary": None,
        "protocol": None,
        "memorisation": None,
        "health": None,
    }


def _drawn_by_program(config: dict[str, Any], generator: Generator) -> NDArray[np.uint8] | None:
    """Some of the public images; None where they cannot be drawn, as for lack of the fonts that the run had."""
    try:
        program = make_program(
            config["name"],
            resolution=generator.resolution,
            channels=generator.channels,
            seed=config["seed"],
            **config["params"],
        )
    except ConfigError:
        return None
    return program.batch(range(24))


def _private_part(run: Run) -> dict[str, Any]:
    ledger = Ledger(run.ledger_path)
    log = JsonLines(run.private / "training.jsonl", 0o600).read()
    curves = _curves(log)
    metrics, health = _kept(run.private / "metrics.json"), _kept(run.private / "health.json")
    summary = None
    if log:
        last = log[-max(1, len(log) // 10) :]
        summary = {
            "clipped": sum(v["clipped"] for v in last) / len(last),
            "median_norm": sum(v["median_norm"] for v in last) / len(last),
            "not_finite": sum(v["not_finite"] for v in log),
            "examples": sum(v["examples"] for v in log) / len(log),
        }
    return {
        "ledger": [
            {
                "kind": e.kind,
                "reason": e.reason,
                "mechanism": e.mechanism,
                "details": ", ".join(f"{k} {v}" for k, v in e.details.items()),
            }
            for e in ledger.entries
        ],
        "private_curve": loss_curve(curves, COLOURS["private"]) if curves else None,
        "private_summary": summary,
        "metrics": metric_rows(metrics) if metrics else None,
        "protocol": json.dumps(metrics, indent=1, ensure_ascii=False) if metrics else None,
        "memorisation": _memorisation(run),
        "health": None if health is None else health["findings"],
    }


def _memorisation(run: Run) -> dict[str, Any] | None:
    """The figures and the picture of the last memorisation check; None if there was none."""
    figures, picture = _kept(run.private / "memorisation.json"), run.private / "memorisation.png"
    if figures is None:
        return None
    shown = base64.b64encode(picture.read_bytes()).decode() if picture.exists() else None
    by_class = [
        (name, f"{100 * s['share']:.1f} %", f"{100 * s['expected']:.1f} %", f"{s['p_permutation']:.2g}", s["images"])
        for name, s in figures["by_class"].items()
    ]
    return {
        "conclusion": figures["conclusion"],
        "flagged": figures["flagged"],
        "rows": memorisation_rows(figures),
        "by_class": by_class,
        "picture": shown and f"data:image/png;base64,{shown}",
    }


def _kept(path: Path) -> dict[str, Any] | None:
    """What a command left in the private half; None if it was not run.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}).  Remove it, or run the command that made it again.") from None
    return values


def _curves(log: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    out: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        if math.isfinite(line["loss"]):
            out.setdefault(line["phase"], []).append((line["step"], line["loss"]))
    return {k: v for k, v in out.items() if len(v) > 1}
