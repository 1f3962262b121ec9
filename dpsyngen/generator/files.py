"""The format of a release: ``generator.json`` and the weights, read as files from a stranger.

Everything is checked before memory is taken for it: the description against the bounds below, the weights file against
the network that the description asks for.  A release needs no trust: nothing in it can run code, and what does not fit
is refused with :class:`RunError`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dpsyngen.config import SamplingConfig, explain
from dpsyngen.data.labels import MAX_CLASSES, check_class_names
from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from dpsyngen.diffusion.prior import SEEN
from dpsyngen.diffusion.stages import GAUSSIAN, Stage, StageMap
from dpsyngen.diffusion.unet import UNet, check_resolution, named_size, shapes_alone
from dpsyngen.errors import ConfigError, DataError, RunError, printable, shown
from dpsyngen.files import NotPlainError, open_plain
from dpsyngen.version import FORMAT, __version__

MAX_RESOLUTION = 1024
MAX_STAGES = 8
MAX_RANK = 4096
MAX_JSON_BYTES = 2**23
MAX_HEADER_BYTES = 2**20  # of a weights file: names, shapes and places of the tensors

# Names of networks become file names.
_Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


@dataclass(frozen=True)
class Place:
    """Where a generator lies: `path` is what loads it again, `release` the folder with its files.

    `run` is its run directory and `bundle` its bundle, where there is one; `scratch` keeps what was unpacked alive.
    """

    path: Path
    release: Path
    run: Path | None = None
    bundle: Path | None = None
    scratch: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def of_release(cls, release: Path) -> Place:
        """The place of a release folder, with its run directory if it is in one."""
        run = release.parent if release.name == "release" and (release.parent / "run.json").is_file() else None
        return cls(run or release, release, run)


class _Part(BaseModel):
    # Unknown keys are ignored: a later version may say more, and what changes the meaning changes the format's number.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class _Stage(_Part):
    """A piece of the log σ axis; None is ∓∞."""

    name: _Name
    log_sigma_low: float | None = Field(ge=-100, le=100)
    log_sigma_high: float | None = Field(ge=-100, le=100)
    trained_by: Literal["public", "private", "moments", "prior"]
    network: _Name


class _Network(_Part):
    size: Annotated[str, Field(max_length=100)]
    sigma_data: float = Field(ge=1e-3, le=1e3)


class _Moments(_Part):
    rank: int = Field(ge=1, le=MAX_RANK)


class GeneratorDescription(_Part):
    """The content of ``generator.json``, validated."""

    resolution: int = Field(ge=1, le=MAX_RESOLUTION)
    channels: Literal[1, 3]
    class_names: list[str] = Field(max_length=MAX_CLASSES)
    stages: list[_Stage] = Field(min_length=1, max_length=MAX_STAGES)
    network: _Network
    conditional: dict[_Name, bool] = Field(max_length=MAX_STAGES)
    sampling: SamplingConfig
    private: bool
    label_dropout: float | None = Field(None, ge=0, le=1)
    moments: _Moments | None = None

    def stage_map(self) -> StageMap:
        """Who answers at which noise level; ConfigError if the pieces do not cover the axis."""
        pieces = []
        for s in self.stages:
            low = -math.inf if s.log_sigma_low is None else s.log_sigma_low
            high = math.inf if s.log_sigma_high is None else s.log_sigma_high
            pieces.append(Stage(s.name, low, high, s.trained_by, s.network))
        return StageMap(tuple(pieces))


def read_description(release: Path) -> tuple[GeneratorDescription, StageMap]:
    """``generator.json`` of a release, with its stages.  RunError if it is missing, a link, too large or damaged."""
    where = printable(release)
    try:
        with open_plain(release / "generator.json", MAX_JSON_BYTES) as file:
            about = json.loads(file.read(MAX_JSON_BYTES + 1), object_pairs_hook=_without_repeats)
    except (NotPlainError, ValueError, RecursionError, OSError) as error:
        raise RunError(
            f"{where} holds no generator (generator.json: {printable(error)}).  Is the training finished?"
        ) from None
    if not isinstance(about, dict) or type(about.get("format")) is not int or about["format"] != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise RunError(
            f"the generator in {where} is of format {shown(found)}, but this is dpsyngen {__version__}, which reads "
            f"format {FORMAT}.  Use the version that made it."
        )
    try:
        description = GeneratorDescription.model_validate(about)
        check_class_names(description.class_names, "generator.json")
        size = named_size(description.network.size)
        stages = description.stage_map()
        if stages.networks:
            check_resolution(size, description.resolution)
        if stages.moments != (description.moments is not None):
            raise ConfigError("its stages and its moments contradict each other")
        missing = [name for name in stages.networks if name not in description.conditional]
        if missing:
            raise ConfigError(f"conditional says nothing of the networks {', '.join(missing)}")
    except ValidationError as error:
        raise RunError(f"the generator in {where} is damaged: {explain(error, GeneratorDescription)}") from None
    except (ConfigError, DataError) as error:
        raise RunError(f"the generator in {where} is damaged: {printable(error)}") from None
    return description, stages


def load_gaussian(release: Path, about: GeneratorDescription, device: str) -> GaussianDenoiser | None:
    """The denoiser of the DP moments of a release; None if there are none.  RunError if the weights are damaged."""
    if about.moments is None:
        return None
    classes, rank, pixels = max(len(about.class_names), 1), about.moments.rank, about.channels * about.resolution**2
    shapes = {
        "means": (classes, pixels),
        "basis": (pixels, rank),
        "covariances": (classes, rank, rank),
        "rest": (pixels,),
        "spectrum": (pixels,),
        "frequencies": (classes,),
    }
    path = release / "weights" / f"{GAUSSIAN}.safetensors"
    tensors = load_weights(path, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    try:
        moments = ClassGaussians.from_tensors(tensors)
    except ConfigError as error:
        raise RunError(f"the weights {printable(path)} are damaged: {error}") from None
    return GaussianDenoiser(moments, (about.channels, about.resolution, about.resolution)).to(device)


def load_network(
    release: Path, about: GeneratorDescription, name: str, gaussian: GaussianDenoiser | None, device: str
) -> NetworkDenoiser:
    """The denoiser of the network `name` of a release, a residual on `gaussian` if that is given.

    RunError if the weights are missing, damaged, or not those of this network.
    """
    classes = len(about.class_names) if about.conditional[name] else 0
    inputs = None if gaussian is None else SEEN * about.channels

    asked = about.network.size, about.resolution, about.channels, classes, inputs
    weights = load_weights(release / "weights" / f"{name}.safetensors", _expected(*asked))
    network = UNet(*asked)
    denoiser = NetworkDenoiser(network, classes, about.network.sigma_data, gaussian)
    denoiser.load_state_dict(weights)
    return denoiser.to(device).eval()


@lru_cache(32)  # shapes alone take three times as long as the network itself
def _expected(size: str, resolution: int, channels: int, classes: int, inputs: int | None) -> Mapping[str, Tensor]:
    """The tensors of a network's weights file, on the meta device; not to be changed."""
    with shapes_alone():
        network = UNet(size, resolution, channels, classes, inputs)
        return MappingProxyType({f"network.{k}": v for k, v in network.state_dict().items()})


def load_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in names, shapes and types those of `expected` (on the meta device).

    RunError if they are not, a number is not finite, or the file is missing, a link, or damaged.
    """
    size = sum(t.numel() * t.element_size() for t in expected.values())
    try:
        with open_plain(path, 8 + MAX_HEADER_BYTES + size) as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > MAX_HEADER_BYTES:
                raise ValueError("its header is missing or too long")
            header = file.read(length)
            _compare(json.loads(header, object_pairs_hook=_without_repeats), expected)
            tensors = load(start + header + file.read(size + 1))
    except (NotPlainError, ValueError, TypeError, RecursionError, OSError, SafetensorError) as error:
        raise RunError(f"the weights {printable(path)} are damaged: {printable(error)}.") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RunError(f"the weights {printable(path)} are damaged: {name} holds NaN or infinite numbers.")
    return tensors


def _compare(header: Any, expected: Mapping[str, Tensor]) -> None:
    """ValueError unless a safetensors header announces exactly the expected tensors."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    found = {name: about if isinstance(about, dict) else {} for name, about in header.items() if name != "__metadata__"}
    odd = sorted(found.keys() ^ expected.keys())
    if odd:
        raise ValueError(f"{shown(odd[0])} is {'too much' if odd[0] in found else 'missing'} ({len(odd)} such tensors)")
    for name, tensor in expected.items():
        kind, shape = found[name].get("dtype"), found[name].get("shape")
        if kind != "F32":
            raise ValueError(f"{name} is of type {shown(kind)}, not F32")
        if shape != list(tensor.shape):
            raise ValueError(f"{name} has shape {shown(shape)}, not {list(tensor.shape)}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name is given twice in one mapping")
    return out
