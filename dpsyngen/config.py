"""One typed, validated configuration.  Presets are YAML files in ``presets/``; options override them.

All is public: chosen without looking at the private images and, but for where these lie, released with the generator.
Bounds are far from anything useful: they keep a slip of the pen (steps = 10^18) or a hostile file from running on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from dpsyngen.errors import ConfigError, printable, require, shown
from dpsyngen.files import read_yaml, read_yaml_file

DEFAULT_PRESET = "cpu-small"
MAX_EPSILON = 10_000.0  # finite; calibrating the noise takes the longer the larger ε is
_MOST_PROBLEMS = 20  # in one message
Variant = Literal["dpdm", "finetune", "cleaning", "coarse", "both", "gaussian", "instant", "residual"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes True for 1, so ``steps: yes`` would train a single step."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        allowed = (annotation, *get_args(annotation))
        if isinstance(value, bool) and bool not in allowed and not any(value is choice for choice in allowed):
            raise ValueError("yes/no (true/false, on/off) is not allowed here; put text in quotes")
        return value


class DataConfig(_Section):
    """The private images."""

    source: str = Field("", max_length=4096, description="folder, file (Parquet, npz, tar, IDX, …) or a named set")
    resolution: int | None = Field(None, ge=8, le=256, description="pixels; None: what the source has")
    channels: Literal["auto", "grey", "rgb"] = "auto"
    labels: bool | str = Field(
        True, description="train class-conditionally where the images have classes; a path: of a table with the labels"
    )
    label_column: str | None = Field(None, max_length=255, description="column of the labels; None: of a usual name")
    skip_bad: bool = Field(False, description="leave out unreadable images instead of stopping")
    value_range: tuple[float, float] | None = Field(
        None, description="values of black and white, as 0,4095, public; None: what files and types say"
    )
    fit: Literal["crop", "pad"] = Field("crop", description="cut images to squares, or add black bars")
    window: tuple[float, float] | None = Field(
        None, description="of DICOM: centre and width, as 40,400, public; None: what each file says"
    )
    frames: Literal["first", "all"] | None = Field(
        None, description="of DICOM files of several: the first, or each as an image; all needs privacy.group_size"
    )
    records: int | None = Field(None, ge=1, le=10**12, description="declared number n, public; None: as found")
    cache: str = Field(
        "auto", min_length=1, max_length=4096, description="folder for decoded images, private; auto: see docs/data.md"
    )
    workers: int | None = Field(None, ge=1, le=1024, description="processes that decode; None: one a core")

    @field_validator("value_range", "window", mode="before")
    @classmethod
    def _two_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and len(parts) != 2:
            example = "40,400" if info.field_name == "window" else "0,4095"
            raise ValueError(f"two numbers are needed, with a comma between, such as {example}")
        return parts


class PrivacyConfig(_Section):
    """The guarantee."""

    epsilon: float = Field(1.0, gt=0, allow_inf_nan=True, description="ε; inf trains without privacy, for reference")
    delta: float | None = Field(None, gt=0, lt=1, description="δ; None: the largest power of ten below 1/n")
    clipping_norm: float = Field(1.0, ge=1e-9, le=1e9, description="C, bound on one image's gradient (L2)")
    insecure_seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="reproducible noise: NOT PRIVATE")
    group_size: int = Field(1, ge=1, le=1000, description="g: ε is for up to g images of one person together")
    groups: str | None = Field(None, max_length=4096, description="table of file names and persons; never released")
    most_per_person: int | None = Field(
        None, ge=1, le=1000, description="m: of each person in groups m images at random are used; group_size is then m"
    )
    budget: str | None = Field(
        None, max_length=4096, description="budget file that all runs on these images share; never released"
    )

    @field_validator("epsilon", mode="before")
    @classmethod
    def _infinite(cls, value: Any) -> Any:
        return math.inf if value == "∞" else value


class StagesConfig(_Section):
    """Who trains what; see :func:`dpsyngen.diffusion.stages.stage_map`."""

    variant: Variant = "both"
    tau_cleaning: float = Field(-3.0, ge=-100, le=100, description="log σ")
    tau_coarse: float | None = Field(None, ge=-100, le=100, description="log σ; None: what suits the variant")
    networks: Literal["experts", "shared"] = "experts"
    pretrain: Literal["matched", True, False, None] = Field(
        None, description="from programs; matched: at its own levels"
    )


class MomentsConfig(_Section):
    """DP moments of the private images; of use to the variants that are named after them (docs/moments.md)."""

    share: float = Field(
        0.8,  # of Fashion-MNIST: docs/quality.md
        gt=0,
        lt=1,
        description="ε of the moments alone over privacy.epsilon; gaussian and instant spend all on them",
    )
    rank: int = Field(100, ge=1, le=4096, description="most directions in which classes have covariances")


class NetworkConfig(_Section):
    """The denoiser."""

    size: str = Field("tiny", max_length=100, description="a preset of dpsyngen.diffusion.unet.SIZES")
    prior: str | None = Field(
        None,
        max_length=4096,
        description="weights that programs trained, which a network on DP moments starts from: 'shipped', or a file; "
        "it brings its size of network, so that of a preset is dropped where network.size is given (docs/prior.md)",
    )
    sigma_data: float = Field(math.sqrt(1 / 3), ge=1e-3, le=1e3, description="σ_d; never measured on private images")
    noise_mean: float = Field(-1.2, ge=-100, le=100, description="P_mean of log σ")
    noise_std: float = Field(1.2, ge=1e-3, le=100, description="P_std of log σ")
    label_dropout: float = Field(0.1, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**63, description="public seed of the initial weights")


class ProgramConfig(_Section):
    """The programmatic images."""

    name: str = Field("dead-leaves", max_length=100)
    seed: int = Field(0, ge=0, lt=2**64, description="public")
    params: dict[str, Any] = Field(default_factory=dict)
    prior_tier: Literal[0, 1, 2] | None = Field(
        None, description="how much the program assumes about private images; None: filled in when the run begins"
    )

    @field_validator("params")
    @classmethod
    def _as_json_has_it(cls, value: dict[str, Any]) -> dict[str, Any]:
        """JSON has no word for infinity and NaN, which would come back as null."""
        try:
            json.dumps(value, allow_nan=False, default=str)
        except (TypeError, ValueError, RecursionError):
            raise ValueError("a parameter is infinite, NaN or contains itself, or a key is no text") from None
        return value


class PublicConfig(_Section):
    """Training on programmatic images; the number of steps is for each public network."""

    steps: int = Field(400, ge=1, le=10**8)
    batch: int = Field(64, ge=1, le=10**6)
    copies: int = Field(2, ge=1, le=10_000, description="K")
    distinct: int | None = Field(
        None, ge=1, le=10**9, description="different images for each network, kept in memory; None: all are fresh"
    )
    learning_rate: float = Field(4e-4, gt=0, le=1e3)
    warmup: int = Field(50, ge=0, le=10**8)
    ema: float = Field(0.999, ge=0, lt=1)
    checkpoint_every: int = Field(200, ge=1, le=10**8, description="steps between checkpoints")


class PrivateConfig(_Section):
    """DP-SGD on private images."""

    steps: int = Field(300, ge=1, le=10**6)
    batch: int = Field(
        512, ge=0, le=10**9, description="expected batch; Poisson sampling at rate batch/records; 0: see largest_batch"
    )
    largest_batch: int = Field(
        1024, ge=1, le=10**9, description="where batch is 0, it is a third of the records, but no more than this"
    )
    copies: int = Field(4, ge=1, le=10_000, description="K, noise multiplicity")
    learning_rate: float = Field(1e-3, gt=0, le=1e3)
    warmup: int = Field(0, ge=0, le=10**6)
    schedule: Literal["constant", "cosine"] = "constant"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, le=1e3)
    ema: float = Field(0.98, ge=0, lt=1)
    clipping: Literal["flat", "per-layer", "automatic"] = Field(
        "flat", description="how one image's gradient is bounded; the sensitivity is privacy.clipping_norm in each"
    )
    noise: Literal["gaussian", "discrete"] = Field(
        "gaussian", description="discrete: whole numbers, hardened against floating-point attacks, slower"
    )
    physical_batch: int | None = Field(
        None, ge=1, le=10**9, description="images in memory at a time; None: what fits; no effect on the guarantee"
    )
    checkpoint_every: int = Field(25, ge=1, le=10**6, description="steps between checkpoints")


class SamplingConfig(_Section):
    """Defaults for drawing images."""

    sampler: Literal["ddim", "heun", "dpmpp"] = "ddim"
    steps: int = Field(50, ge=1, le=10_000)
    sigma_min: float = Field(0.002, ge=1e-6, le=1e6, description="σ of the last step (EDM eq. 5)")
    sigma_max: float = Field(80.0, ge=1e-6, le=1e6, description="σ of the first step")
    rho: float = Field(7.0, ge=0.1, le=1e3, description="how the steps are spread; larger: more at small σ")
    churn: float = Field(0.0, ge=0, le=1e6, description="S_churn of the stochastic heun")
    guidance: float = Field(1.0, ge=0, le=1e6, description="weight of classifier-free guidance; 1 is none")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min = {self.sigma_min:g} must be below sigma_max = {self.sigma_max:g}")
        if (self.sigma_min / self.sigma_max) ** (1 / self.rho) < 1e-12:  # the last levels would all be 0 in fp64
            raise ValueError(
                f"rho = {self.rho:g} is too small for σ from {self.sigma_min:g} to {self.sigma_max:g}: use 7"
            )
        if self.churn and self.sampler != "heun":
            raise ValueError(f"churn needs the sampler 'heun'; given {self.sampler!r}")
        return self


class LoggingConfig(_Section):
    """What a run writes down about itself besides its logs; see docs/logging.md.  Never released."""

    tensorboard: bool = Field(False, description="event files for TensorBoard, in the private half")
    pictures: int | None = Field(None, ge=1, description="steps between pictures in preview.png; None: no pictures")


class ComputeConfig(_Section):
    """How the machine computes: speed and rounding, never the guarantee; the device is an option of each command."""

    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto", description="of a network's products; gradients are clipped and summed in fp32 whatever it is"
    )
    channels_last: Literal["auto", True, False] = Field("auto", description="layout of images in memory")
    compile: Literal["auto", True, False] = Field(
        "auto", description="torch.compile of networks that draw or train on programs; DP-SGD steps are never compiled"
    )


class Config(_Section):
    """All settings of a run."""

    preset: str = Field(DEFAULT_PRESET, max_length=100)
    data: DataConfig = DataConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    stages: StagesConfig = StagesConfig()
    moments: MomentsConfig = MomentsConfig()
    network: NetworkConfig = NetworkConfig()
    program: ProgramConfig = ProgramConfig()
    public: PublicConfig = PublicConfig()
    private: PrivateConfig = PrivateConfig()
    sampling: SamplingConfig = SamplingConfig()
    logging: LoggingConfig = LoggingConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _together(self) -> Config:
        privacy, private = self.privacy, self.private
        reference = math.isinf(privacy.epsilon) or privacy.insecure_seed is not None
        for contradiction, message in (
            (math.isnan(privacy.epsilon), "privacy.epsilon is not a number"),
            (
                self.data.frames == "all" and privacy.model_fields_set.isdisjoint({"group_size", "most_per_person"}),
                "data.frames = all makes an image of each frame: say with privacy.group_size (--group-size) how many "
                "images of one person there are at most, of all files, as they are protected together",
            ),
            (
                "group_size" in privacy.model_fields_set and privacy.most_per_person not in (None, privacy.group_size),
                f"privacy.group_size = {privacy.group_size} is not privacy.most_per_person, which it follows from",
            ),
            (
                MAX_EPSILON < privacy.epsilon < math.inf,
                f"privacy.epsilon = {privacy.epsilon:g} is above {MAX_EPSILON:g}, which protects nobody; say inf to "
                "train without privacy",
            ),
            (
                privacy.budget is not None and reference,
                "privacy.budget goes with runs that are private; without privacy (epsilon = inf) or with "
                "privacy.insecure_seed train without a budget, and never release the result",
            ),
            (
                private.noise == "discrete" and private.clipping != "flat",
                f"private.noise = discrete needs private.clipping = flat, but that is {private.clipping}",
            ),
            (
                private.warmup >= private.steps and private.warmup,
                f"private.warmup = {private.warmup} leaves none of the {private.steps} private steps at the full "
                "learning rate",
            ),
        ):
            if contradiction:
                raise ValueError(message)
        return self

    def to_yaml(self) -> str:
        """All settings as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def with_batch(config: Config, records: int) -> Config:
    """The configuration with an expected batch for `records`, their declared number; one that is given stays.

    A third of the records, at most ``private.largest_batch``.  At one ε the noise in the mean gradient falls with the
    batch, so it is as large as time allows; beyond a third of the records sampling amplifies privacy too little.
    """
    if config.private.batch:
        return config
    batch = max(1, min(config.private.largest_batch, records // 3))
    return config.model_copy(update={"private": config.private.model_copy(update={"batch": batch})})


def default_preset(device: str = "auto") -> str:
    """The preset where none is asked for: "gpu" where `device` is a GPU ("auto": if there is one), else "cpu-small"."""
    import torch

    gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return "gpu" if gpu else DEFAULT_PRESET


def preset_names() -> tuple[str, ...]:
    """Names of the presets that ship with the package."""
    folder = resources.files("dpsyngen") / "presets"
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def merge_settings(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings, those of `over` in force."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge_settings(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return out


def with_options(settings: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """`settings` with the options in force that are not None; ``private__steps`` is the setting private.steps.

    >>> with_options({"private": {"steps": 5}}, private__copies=2, stages__variant=None)
    {'private': {'steps': 5, 'copies': 2}}
    """
    mapping = settings is None or isinstance(settings, Mapping)
    require(mapping, "settings", settings, "a mapping such as {'private': {'steps': 500}}")
    chosen: dict[str, Any] = {}
    for key, value in options.items():
        if value is not None:
            section, name = key.split("__")
            chosen.setdefault(section, {})[name] = value
    return merge_settings(dict(settings or {}), chosen)


def _sections(loaded: Any, name: str) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise ConfigError(f"{printable(name)} must hold a mapping of sections ({', '.join(Config.model_fields)}).")
    return loaded


def load_config(
    overrides: dict[str, Any] | None = None,
    *,
    preset: str | None = None,
    file: Path | None = None,
    device: str = "auto",
) -> Config:
    """The configuration from, in rising order of precedence: defaults, preset, file, overrides.

    Args:
        overrides: nested mapping such as ``{"privacy": {"epsilon": 3}}``.
        preset: a name from :func:`preset_names`; None: what the overrides or the file name, else
            :func:`default_preset`.
        file: a YAML file with any of the sections.
        device: where the run will compute, for the preset.

    ConfigError for an unknown preset or key, or a value that is not allowed; all problems at once.
    """
    given = {} if file is None else _sections(read_yaml_file(file, "the configuration"), str(file))
    asked = (overrides or {}).get("preset")
    require(preset is None or asked in (None, preset), "the preset", asked, f"{preset}, as beside it, or left out")
    names = [name for name in (preset, asked, given.get("preset")) if name is not None]
    name = names[0] if names else default_preset(device)
    require(name in preset_names(), "preset", name, preset_names())
    text = (resources.files("dpsyngen") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    named, given = _sections(read_yaml(text, f"preset {name}"), name), merge_settings(given, overrides or {})
    network = given.get("network")
    if isinstance(network, dict) and "size" in network and "prior" not in network:
        named["network"].pop("prior", None)
    return validate(merge_settings(named, given) | {"preset": name})


def validate(values: dict[str, Any]) -> Config:
    """Turn a nested mapping into a Config, or raise ConfigError that lists every problem (the first 20)."""
    try:
        return Config.model_validate(_sections(values, "the configuration"))
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Every problem of settings (the first 20) with its place, what was given, and what is allowed."""
    lines = []
    problems = error.errors()
    for problem in problems[:_MOST_PROBLEMS]:
        parts = [str(p) for p in problem["loc"]]
        if problem["type"] in ("bool_parsing", "bool_type", "string_type") and parts[-1] in ("bool", "str"):
            parts.pop()  # pydantic's name of one of several types
        place = printable(".".join(parts), 200)
        message = problem["msg"].removeprefix("Value error, ").rstrip(".")
        if problem["type"] == "model_type":  # pydantic names a class of ours
            message = "input should be a mapping of settings to their values"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{place}: there is no such setting{_did_you_mean(problem['loc'], model)}")
        elif place and not message.startswith(f"{place} "):
            # Of a whole section the values say nothing.
            given = "" if isinstance(problem["input"], dict | BaseModel) else f" is {shown(problem['input'])}"
            lines.append(f"{place}{given}: {message[0].lower() + message[1:]}")
        else:
            lines.append(message)
    more = f"; and {len(problems) - len(lines)} more" if len(problems) > len(lines) else ""
    return "; ".join(lines) + more + "."


def _did_you_mean(location: tuple[int | str, ...], section: Any) -> str:
    for part in location[:-1]:
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        section = field.annotation if field else None
    names = list(getattr(section, "model_fields", {}))
    close = get_close_matches(str(location[-1])[:100], names, 1)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(names)})" if names else ""
