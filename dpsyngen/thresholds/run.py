"""Finding the stages of a data set's diffusion model from public images: one call of ``dpsyngen stages``.

::

    settings.json   what decides the figures; the same call goes on where it was, another one is refused
    networks/       the trained networks (or in another folder, shared by several calls)
    private/, private_gap.json   only with private images: see dpsyngen.thresholds.private
    gap.png, gap.csv, stages.yaml, gap.json            the results, gap.json last
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsyngen.config import Config, ProgramConfig, load_config
from dpsyngen.data import ImageDataset, load_images
from dpsyngen.diffusion.stages import USE_MOMENTS
from dpsyngen.diffusion.unet import check_resolution, named_size
from dpsyngen.errors import ConfigError, DataError, RunError, printable, require
from dpsyngen.files import (
    is_temporary,
    read_yaml_file,
    remove_temporaries,
    require_absent_or_empty,
    require_possible,
    write_json,
)
from dpsyngen.full_precision import ordinary_modes
from dpsyngen.programs import make_program
from dpsyngen.thresholds.denoisers import MOST_PIXELS, Family, PublicDenoisers, split_proxy
from dpsyngen.thresholds.files import StagesResult, write_results
from dpsyngen.thresholds.gap import METHODS, log_sigma_grid
from dpsyngen.thresholds.private import PrivateEstimate
from dpsyngen.thresholds.search import StageSearch, Tell, deciding, stand_in_elbows
from dpsyngen.training.networks import prior_of, with_prior
from dpsyngen.training.plan import Shape, stages_of
from dpsyngen.training.run import FolderLock
from dpsyngen.workers import Workers


@dataclass(frozen=True)
class StagesOptions:
    """What to measure; ConfigError if a number is out of its range, or there is no such method."""

    programs: Sequence[str]  # names, or paths of YAML files with name and params; the first is to train with
    proxy: str | None = None  # public images, as load_images takes them
    seeds: int = 2  # networks of each family
    images: int = 128  # of each source, to measure on
    spacing: float = 0.5  # of the grid in log σ
    tolerance: float = 0.05  # relative gap that programs may cost
    method: str = "tolerance"  # of the elbow that is written into stages.yaml
    replicates: int = 500  # of the bootstrap
    sampling_rate: float = 1.0  # of a private estimate
    networks: Path | None = None  # folder of trained networks; None: the output folder's own

    def __post_init__(self) -> None:
        limits = {"seeds": (1, 100), "images": (8, 100_000), "spacing": (0.05, 2), "tolerance": (1e-4, 1)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            require(low <= value <= high, f"--{name}", value, f"from {low:g} to {high:g}")
        usable = self.networks is None or self.networks.is_dir() or not self.networks.exists()
        require(usable, "--networks", self.networks, "a folder, or one that is to be made")
        if self.networks is not None:
            require_possible(self.networks, "--networks")
        require(self.method in METHODS, "--method", self.method, METHODS)


class Stages:
    """One call, new or going on; :meth:`run` does it.

    Args:
        folder: of the results: absent, empty, or of the same call that was interrupted.
        data: the private images, for a DP estimate; None: none are looked at.
        given: settings that ``stages.yaml`` keeps, besides what is found.

    Raises:
        ConfigError, DataError, RunError, BudgetExceeded: before anything is written or spent.
    """

    @ordinary_modes()
    def __init__(
        self,
        folder: Path,
        config: Config,
        options: StagesOptions,
        data: ImageDataset | None,
        given: dict[str, Any],
        device: str,
    ) -> None:
        self.folder, self.config, self.options, self._given = folder, config, options, given
        if config.stages.variant == "gaussian":
            raise ConfigError("variant 'gaussian' has no stage that programs could own: choose another stages.variant.")
        proxy_images = None if options.proxy is None else _load_proxy(options.proxy, config, data)
        like, d = data or proxy_images, config.data
        shape = Shape(d.resolution or 32, 3 if d.channels == "rgb" else 1, (), 1)
        if like is not None:
            shape = Shape(like.resolution, like.channels, (), len(like))
        trained = with_prior(config)  # what a training with these settings would have
        for c in (config, trained):
            check_resolution(named_size(c.network.size), shape.resolution)
        prior = prior_of(trained, stages_of(trained), shape.channels)
        pixels = shape.channels * shape.resolution**2
        if prior is not None and pixels > MOST_PIXELS:
            raise ConfigError(
                f"images of {shape.channels} x {shape.resolution} x {shape.resolution} have {pixels:,} numbers, and "
                f"moments at most {MOST_PIXELS:,}: choose a smaller --resolution, or --set stages.variant=both."
            )
        self.note: str | None = None
        if prior is None and (variant := config.stages.variant) in USE_MOMENTS:
            self.note = f"variant {variant} without a prior leaves programs no stage: these are of the paper's variants"
        named = [_program(entry, config) for entry in options.programs]
        size = {"resolution": shape.resolution, "channels": shape.channels}
        families = [Family(label, make_program(p.name, **size, seed=p.seed, **p.params)) for label, p in named]
        proxy = None if proxy_images is None else split_proxy(proxy_images.array(), options.images)
        workers = Workers(None if device == "cpu" else 1)
        kept, known = options.networks or folder / "networks", None if prior is None else str(prior.about["sha256"])
        networks = PublicDenoisers(kept, config, shape, device, workers, known)
        grid = log_sigma_grid(options.spacing)
        self.search = StageSearch(families, proxy, networks, seeds=options.seeds, images=options.images, log_sigma=grid)
        self._program = named[0][1]
        self.estimate = None if data is None else PrivateEstimate(folder, config, data, options.sampling_rate)
        self.settings = json.loads(json.dumps(self._settings()))

    @ordinary_modes()
    def run(self, tell: Tell) -> tuple[StagesResult, list[Path]]:
        """Train, measure, write; the result and its files.

        A call that is interrupted at any moment goes on with the same arguments: networks that are trained are read,
        and the private images are never charged twice.
        """
        search, options = self.search, self.options
        self.folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.folder / "lock", self.folder).held():
            require_usable(self.folder)
            remove_temporaries(self.folder)
            self._begin()
            trained = search.train(tell)
            measured = search.measure(trained, tell)
            spent = None
            if self.estimate is not None:
                curve, spent = self.estimate.released(
                    search.compared_on_private(trained),
                    search.log_sigma,
                    measured.clipping_norm,
                    f"stages {self.folder.name}",
                    search.networks.workers,
                    # Not a number of images: how many were sampled is private.
                    lambda done, of: tell("measuring on the private images", 100 * done // of, 100, "%"),
                )
                measured.curves.append(curve)
            found = stand_in_elbows(measured, options.tolerance, options.replicates)
            decided = deciding(found, search.student)
            result = StagesResult(self.settings, measured, found, decided, spent)
            return result, write_results(self.folder, result, self._to_keep())

    def _to_keep(self) -> dict[str, Any]:
        """The settings that ``stages.yaml`` keeps: those given, the program, and the budget that this call charged."""
        keep = self._given | {"program": self._program.model_dump(mode="json", include={"name", "seed", "params"})}
        if self.estimate is not None and (budget := self.estimate.budget) is not None:
            keep["privacy"] = dict(keep.get("privacy", {})) | {"budget": str(budget.path)}
        return keep

    def _settings(self) -> dict[str, Any]:
        """What decides the figures, JSON-able."""
        s, o, c, private = self.search, self.options, self.config, None
        if self.estimate is not None:
            query = self.estimate.query
            private = self.estimate.config.privacy.model_dump(
                mode="json", include={"epsilon", "group_size", "most_per_person", "insecure_seed"}
            )
            private |= {"delta": self.estimate.delta, "records": query.records, "sampling_rate": query.sampling_rate}
        proxy = None if s.proxy is None else s.proxy.program.config() | {"set_aside": len(s.proxy.measuring_images(0))}
        return {
            "programs": {f.label: f.program.config() | {"prior_tier": f.program.prior_tier} for f in s.families},
            "proxy": proxy,
            "student": s.student,
            "teacher": s.teacher.label,
            "resolution": s.networks.shape.resolution,
            "channels": s.networks.shape.channels,
            "network": c.network.model_dump(mode="json", include={"size", "sigma_data"}),
            "public": c.public.model_dump(mode="json", exclude={"checkpoint_every"}),
            "seeds": list(range(o.seeds)),
            "networks": [s.networks.path(f, seed).name for f in s.all_families for seed in range(o.seeds)],
            "log_sigma": list(s.log_sigma),
            **{name: getattr(o, name) for name in ("images", "tolerance", "method", "replicates")},
            "prior": s.networks.prior,
            "private": private,
        }

    def _begin(self) -> None:
        """Write down what decides the figures, or refuse to go on with anything else."""
        path = self.folder / "settings.json"
        if not path.exists():
            write_json(path, self.settings)
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(k for k in before.keys() | self.settings.keys() if before.get(k) != self.settings.get(k))
        except (OSError, ValueError, AttributeError) as error:
            raise RunError(f"{path} is damaged: {error}.  Choose another --out.") from None
        if changed:
            raise RunError(
                f"{self.folder} was begun with other settings ({', '.join(changed)}).  Give the same ones to go on, or "
                f"choose another --out; with --networks {self.folder / 'networks'} networks that fit are used again."
            )


def require_usable(folder: Path) -> None:
    """Raise RunError unless `folder` is absent, empty, or of a call that was interrupted."""
    if (folder / "gap.json").exists():
        raise RunError(f"--out {folder} has results already.  Choose another path, or move it away.")
    if (folder / "settings.json").exists():
        return
    left = [p.name for p in folder.iterdir()] if folder.is_dir() and not folder.is_symlink() else []
    if not left or any(name != "lock" and not is_temporary(name) for name in left):
        require_absent_or_empty(folder, "--out")


def _load_proxy(source: str, config: Config, data: ImageDataset | None) -> ImageDataset:
    d = config.data
    resolution = d.resolution if data is None else data.resolution
    channels: Any = d.channels if data is None else "grey" if data.channels == 1 else "rgb"
    loaded = load_images(source, resolution=resolution, channels=channels, labels=False, skip_bad=d.skip_bad, fit=d.fit)
    without_labels = None if data is None else ImageDataset(data.images, None, (), data.source)
    if without_labels is not None and loaded.fingerprint() == without_labels.fingerprint():
        raise DataError("--proxy and --data are the same images: leave out --data if they are public, else --proxy.")
    return loaded


def _program(entry: str, config: Config) -> tuple[str, ProgramConfig]:
    """Label and settings of a program, given by name or as a YAML file that describes it."""
    if not entry.endswith((".yaml", ".yml")):
        params = config.program.params if entry == config.program.name else {}
        return entry, config.program.model_copy(update={"name": entry, "params": params})
    values = read_yaml_file(Path(entry), "the program")
    if isinstance(values, dict) and set(values) == {"program"}:
        values = values["program"]
    if not isinstance(values, dict) or "name" not in values:
        raise ConfigError(f"{printable(entry)} must hold a program: its name, and params if it has any.")
    return re.sub(r"[^\w.-]", "-", Path(entry).stem), load_config({"program": values}).program
