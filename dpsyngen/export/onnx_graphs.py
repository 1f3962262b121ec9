"""The denoisers of a generator as ONNX graphs: one file for each network, and one for the DP moments."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpsyngen.diffusion.denoiser import NetworkDenoiser
from dpsyngen.diffusion.residual import ResidualDenoiser
from dpsyngen.diffusion.stages import GAUSSIAN
from dpsyngen.diffusion.start import sampling_start
from dpsyngen.errors import ConfigError
from dpsyngen.export.onnx_gaussian import GaussianGraph
from dpsyngen.files import write_atomically
from dpsyngen.generator import Generator
from dpsyngen.version import __version__

OPSET = 18
"""Of the standard operators; no others are used."""

START = "start.onnx"


def require_onnx() -> None:
    """Raise ConfigError if what the export needs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the format onnx needs onnx and onnxscript, which are not installed: pip install 'dpsyngen[onnx]', or "
            "choose another format."
        ) from None


class _Known(nn.Module):
    """D(x, σ, class) of a network with classes; without if it has none."""

    def __init__(self, denoiser: NetworkDenoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.denoiser(x, sigma, labels)
        return out


class _Residual(nn.Module):
    """:class:`ResidualDenoiser` on a :class:`GaussianGraph`."""

    def __init__(self, denoiser: ResidualDenoiser) -> None:
        super().__init__()
        self.network, self.num_classes = denoiser.network, denoiser.num_classes
        self.pixel_std, self.moments = denoiser.gaussian.pixel_std, GaussianGraph(denoiser.gaussian)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        # Moments of images without classes are those of one class, and a network without classes takes none.
        known = torch.full_like(sigma, self.moments.classes, dtype=torch.long) if labels is None else labels
        base = self.moments(x, sigma, known)
        c_out = self.moments.residual_std(sigma, known).view(-1, 1, 1, 1)
        c_in = (sigma.square() + self.pixel_std**2).rsqrt().view(-1, 1, 1, 1)
        both = torch.cat([c_in * x, base / self.pixel_std], 1)
        out: Tensor = base + c_out * self.network(both, sigma.log() / 4, known if self.num_classes else None)
        return out


class _Moments(nn.Module):
    """The Gaussian's own denoiser."""

    def __init__(self, graph: GaussianGraph) -> None:
        super().__init__()
        self.moments = graph

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        known = torch.full_like(sigma, self.moments.classes, dtype=torch.long) if labels is None else labels
        out: Tensor = self.moments(x, sigma, known)
        return out


class _Start(nn.Module):
    """Noisy images at a fixed σ, drawn from the Gaussian."""

    def __init__(self, graph: GaussianGraph, sigma: float) -> None:
        super().__init__()
        self.moments, self.sigma = graph, sigma

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        known = torch.full_like(noise[:, 0, 0, 0], self.moments.classes, dtype=torch.long) if labels is None else labels
        return self.moments.draw(noise, known, self.sigma)


def write_graphs(generator: Generator, folder: Path, notes: dict[str, str]) -> dict[str, Any]:
    """Write the graphs of a generator to an existing folder.

    Args:
        generator: on the CPU.
        folder: where to.
        notes: metadata of each file.

    Returns:
        what a sampler needs to know of them: ``denoisers`` by name, each with its ``file`` and whether it takes
        ``labels``; and ``start``, None or its ``file``, ``sigma`` and ``labels``.
    """
    shape = (2, generator.channels, generator.resolution, generator.resolution)
    classes = len(generator.class_names)
    x, sigma = torch.zeros(shape), torch.ones(2)
    denoisers: dict[str, dict[str, Any]] = {}

    def write(module: nn.Module, file: str, inputs: dict[str, Tensor], with_labels: bool, output: str) -> None:
        if with_labels:
            inputs = inputs | {"labels": torch.tensor([0, classes])}
        _write(module.eval(), folder / file, inputs, output, notes)

    for name, denoiser in generator.networks.items():
        file, labelled = f"denoiser-{name}.onnx", bool(denoiser.num_classes)
        module = _Residual(denoiser) if isinstance(denoiser, ResidualDenoiser) else _Known(denoiser)
        write(module, file, {"x": x, "sigma": sigma}, labelled, "denoised")
        denoisers[name] = {"file": file, "labels": labelled}
    start = None
    if generator.gaussian is not None:
        graph, labelled = GaussianGraph(generator.gaussian), classes > 0
        file = f"denoiser-{GAUSSIAN}.onnx"
        write(_Moments(graph), file, {"x": x, "sigma": sigma}, labelled, "denoised")
        denoisers[GAUSSIAN] = {"file": file, "labels": labelled}
        d = generator.defaults
        level, draws = sampling_start(generator.stages, generator.gaussian, d["sigma_min"], d["sigma_max"])
        if draws is not None:
            write(_Start(graph, level), START, {"noise": x}, labelled, "x")
            start = {"file": START, "sigma": level, "labels": labelled}
    return {"denoisers": denoisers, "start": start}


def _write(module: nn.Module, path: Path, inputs: dict[str, Tensor], output: str, notes: dict[str, str]) -> None:
    import onnx

    batch = torch.export.Dim("batch", min=1, max=2**20)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    # The exporter falls back to a fixed number of images, silently, where it could not follow a size.
    fixed = [i.name for i in (*model.graph.input, *model.graph.output) if i.type.tensor_type.shape.dim[0].dim_value]
    if fixed:
        raise RuntimeError(
            f"{path.name} takes one number of images only, at {', '.join(fixed)}: a bug, please report it."
        )
    _forget_the_machine(model)
    model.producer_name, model.producer_version = "dpsyngen", __version__
    onnx.helper.set_model_props(model, notes)
    onnx.checker.check_model(model, full_check=True)
    write_atomically(path, lambda temporary: onnx.save_model(model, str(temporary)))


def _forget_the_machine(model: Any) -> None:
    """Remove what the exporter notes of each node: lines of code, with paths of this machine."""
    model.doc_string = ""
    for part in (model.graph, *model.functions):
        part.doc_string = ""
        del part.metadata_props[:]
        for entry in (*part.node, *part.value_info, *getattr(part, "input", ()), *getattr(part, "output", ())):
            if not isinstance(entry, str):
                entry.doc_string = ""
                del entry.metadata_props[:]
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own doings."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
