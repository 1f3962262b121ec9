"""Parameters without a layer of their own, and whole networks built by others, against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsyngen.privacy.per_example import PerExampleGradients, UnsupportedLayer


def weighted(out: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).view_as(out[0])
    return (out * weights).sin().flatten(1).sum(1)


def check(model: nn.Module, x: tuple[Tensor, ...], copies: int, tolerance: float, loss=weighted) -> None:
    """Per-example gradients and the clipped sum against autograd of one example at a time."""
    examples = len(x[0]) // copies
    engine = PerExampleGradients(model, 1.0, workers=1)
    got = engine.per_example(lambda: loss(model(*x)), examples, copies)
    expected = []
    for b in range(examples):
        part = tuple(t[b * copies : (b + 1) * copies] for t in x)
        expected.append(torch.autograd.grad(loss(model(*part)).mean(), engine.parameters))
    norms = torch.stack([torch.cat([e.flatten() for e in each]).norm() for each in expected])
    for b, each in enumerate(expected):
        for g, e, name in zip(got, each, engine.names, strict=True):
            assert (g[b] - e).norm() <= tolerance * max(float(e.norm()), 1e-3 * float(norms[b])), (name, b)
    engine.clipping_norm = float(norms.median())
    clipped = engine(lambda: loss(model(*x)), examples, copies)
    factors = (engine.clipping_norm / norms).clamp_max(1.0)
    for i, total in enumerate(clipped.sums):
        oracle = sum(f * each[i] for f, each in zip(factors, expected, strict=True))
        assert (total - oracle).norm() <= 10 * tolerance * engine.clipping_norm * examples


class Learned(nn.Module):
    """A function of (module, x) with parameters of many shapes."""

    def __init__(self, function, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


V, T = {"p": (4,)}, {"p": (1, 5, 4)}
CONSTANTS = {
    "gain": (lambda m, h: h * m.p, V),
    "gain on the left": (lambda m, h: m.p * h + m.p, V),
    "scalar": (lambda m, h: m.p * h / (2 + m.p.square()) - m.p, {"p": ()}),
    "used thrice": (lambda m, h: torch.tanh(h * m.p) * m.p + m.p, V),
    "shape [1, T, D]": (lambda m, h: h + m.p, T),
    "shape [T, 1]": (lambda m, h: h * m.p, {"p": (5, 1)}),
    "view": (lambda m, h: h * m.p[:, None, None].squeeze()[None, 1:3].reshape(2).repeat_interleave(2), V),
    "exponential": (lambda m, h: h * m.p.exp() + F.softplus(m.p).mean(), V),
    "of two parameters": (lambda m, h: h * (m.p * m.q).sum(), {"p": (4,), "q": (4,)}),
    "with a buffer": (lambda m, h: h * (m.p * m.mask), V),
    "in place": (lambda m, h: h.clone().mul_(m.p).add_(m.p), V),
    "augmented assignment": (lambda m, h: _augmented(h, m.p), V),
    "addcmul and lerp": (lambda m, h: torch.lerp(torch.addcmul(h, m.p, h), h * 2, m.p.sigmoid()), V),
    "where": (lambda m, h: torch.where(h > 0, h, m.p), V),
    "power and right-hand operands": (lambda m, h: (h.square() + 1) ** m.p + (1 - m.p) - h + 1 / (3 + m.p**2), V),
    "class token": (lambda m, h: torch.cat([m.p.expand(len(h), -1, -1), h], 1), {"p": (1, 1, 4)}),
    "class token without batch axis": (lambda m, h: torch.cat([m.p.expand(len(h), 1, 4), h], dim=1), {"p": (1, 4)}),
    "repeated token": (lambda m, h: torch.cat((h, m.p.repeat(len(h), 1, 1)), 1), {"p": (1, 2, 4)}),
    "expanded and added": (lambda m, h: h + m.p.expand_as(h), {"p": (1, 1, 4)}),
    "expanded from a scalar": (lambda m, h: h + m.p.expand(len(h), 5, 4), {"p": ()}),
    "matrix product": (lambda m, h: h @ m.p, {"p": (4, 3)}),
    "matrix product of a view": (lambda m, h: torch.matmul(h, m.p.t()), {"p": (3, 4)}),
    "weight of two": (lambda m, h: F.linear(h, m.p @ m.q, m.q.mean(0)), {"p": (4, 4), "q": (4, 4)}),
    "tied transpose": (lambda m, h: F.linear(h, m.layer.weight.t()), {}),
    "penalty": (lambda m, h: h + m.layer.weight.square().sum(), {}),
}


def _augmented(h: Tensor, p: Tensor) -> Tensor:
    h = h.clone()
    h *= p
    h -= p
    return h


# Four examples and five positions of four features; with 4 and 20 rows, sizes also coincide with the batch on purpose.
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("examples", [4, 5])
@pytest.mark.parametrize("name", CONSTANTS)
def test_learned_constants_equal_the_oracle(name, examples, copies) -> None:
    torch.manual_seed(0)
    function, shapes = CONSTANTS[name]
    model = Learned(function, **shapes).double()
    check(model, (torch.randn(examples * copies, 5, 4, dtype=torch.float64),), copies, 1e-10)


REFUSED = {
    "an entry for each row": (lambda m, h: h * m.p, {"p": (4, 5, 4)}),
    "view with an entry for each row": (lambda m, h: h + m.p[:, None, None].expand(4, 5, 4), V),
    "more axes than the rows": (lambda m, h: h.mean((1, 2)) * m.p, {"p": (1, 4)}),
    "batch not first": (lambda m, h: (h.transpose(0, 1) * m.p).transpose(0, 1), V),
    "joined to the batch": (lambda m, h: torch.cat([h, m.p])[:4], {"p": (1, 5, 4)}),
    "product from the left": (lambda m, h: m.p @ h, {"p": (5, 5)}),
    "stack": (lambda m, h: torch.stack([h, m.p.expand_as(h)], 1), V),
}


@pytest.mark.parametrize("name", REFUSED)
def test_uses_that_would_mix_or_lose_gradients_are_refused(name) -> None:
    function, shapes = REFUSED[name]
    model = Learned(function, **shapes)
    with pytest.raises(UnsupportedLayer):
        PerExampleGradients(model, 1.0).per_example(lambda: weighted(model(torch.randn(4, 5, 4))), 4)


# --------------------------------------------------------------------------------------- attention modules


class Attends(nn.Module):
    def __init__(self, cross: bool = False, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.first, self.cross = options.get("batch_first", False), cross

    def forward(self, x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
        if not self.first:
            x, y = x.transpose(0, 1), y.transpose(0, 1)
        memory = y if self.cross else x
        mask = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
        out, weights = self.attention(x, memory, memory, padding, attn_mask=mask)
        plain, _ = self.attention(x, memory, memory, need_weights=False)
        out = out + plain
        return (out if self.first else out.transpose(0, 1)).flatten(1).sum(1, keepdim=True) + weights.square().sum(2)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"batch_first": True, "bias": False, "cross": True},
        {"batch_first": True, "cross": True, "kdim": 8, "vdim": 8},
    ],
)
def test_multi_head_attention_equals_the_oracle(options, copies) -> None:
    torch.manual_seed(0)
    model = Attends(**options).double()
    rows = 4 * copies
    x, y = (torch.randn(rows, 6, 8, dtype=torch.float64) for _ in range(2))
    padding = torch.zeros(rows, 6, dtype=torch.bool)
    padding[:, 5] = torch.arange(rows) % 2 == 0
    check(model, (x, y, padding), copies, 1e-10)


def test_own_multi_head_attention_is_the_librarys() -> None:
    torch.manual_seed(0)
    model = Attends(batch_first=True, bias=True, cross=True)
    inputs = (torch.randn(4, 6, 8), torch.randn(4, 6, 8), torch.zeros(4, 6, dtype=torch.bool))
    expected, seen = model(*inputs), []

    def loss() -> Tensor:
        seen.append(model(*inputs))
        return weighted(seen[0])

    PerExampleGradients(model, 1.0)(loss, 4)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_rare_attention_options_are_refused_by_name(options) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    x = torch.randn(3, 4, 8)
    with pytest.raises(UnsupportedLayer, match="leave it out"):
        PerExampleGradients(model, 1.0)(lambda: model(x, x, x)[0].flatten(1).sum(1), 3)


@pytest.mark.parametrize("argument", ["query", "key", "attn_mask"])
def test_learned_inputs_of_attention_are_refused_even_where_they_are_used_elsewhere_too(argument) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.p = nn.Parameter(torch.randn(4, 4) if argument == "attn_mask" else torch.randn(1, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.p  # of which the tape knows
            learned = self.p if argument == "attn_mask" else self.p.expand(len(x), -1, -1)
            given = {"query": x, "key": x, "value": x, argument: learned}
            return self.attention(**given, need_weights=False)[0].flatten(1).sum(1)

    model, x = Model(), torch.randn(3, 4, 4)
    with pytest.raises(UnsupportedLayer, match=f"got as its {argument} a tensor whose gradient would be lost"):
        PerExampleGradients(model, 1.0)(lambda: model(x), 3)


# --------------------------------------------------------------------------------------- other people's networks


class Bottleneck(nn.Module):
    """A residual block in the manner of torchvision's ResNets, with GroupNorm."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.GroupNorm(2, width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, groups=2, bias=False),
            nn.GroupNorm(2, width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 1, bias=False),
            nn.GroupNorm(2, 2 * width),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, 2 * width, 1, stride, bias=False), nn.GroupNorm(2, 2 * width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions and encoder layers, in the manner of torchvision's ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], dim=1)
        return self.head(self.encoder(h + self.positions)[:, 0])


class Upsampler(nn.Module):
    """A decoder with transposed convolutions and a fixed resampling filter in a buffer, as in EDM's networks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 4, 2, 1)
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.5))
        self.out = nn.Conv2d(6, 2, 3, padding=1)
        self.register_buffer("resample", torch.tensor([[1.0, 1.0], [1.0, 1.0]])[None, None] / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.up(x)) * self.scale
        h = F.conv2d(h, self.resample.tile(6, 1, 1, 1), stride=2, groups=6)
        return self.out(F.conv_transpose2d(h, self.resample.tile(6, 1, 1, 1) * 4, stride=2, groups=6))


NETWORKS = {
    "resnet": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1), Bottleneck(8, 4, 1), Bottleneck(8, 8, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    ),
    "vision transformer": VisionTransformer,
    "upsampler": Upsampler,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.LazyLinear(2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_other_families_equal_the_oracle(name, copies) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    model(torch.randn(1, 3, 8, 8))
    size = 24 if name == "resnet" else 8
    check(model.double(), (torch.randn(4 * copies, 3, size, size, dtype=torch.float64),), copies, 1e-9)


@pytest.mark.parametrize("copies", [1, 3])
def test_unet_of_diffusers_equals_the_oracle(copies) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'dpsyngen[dev]'")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=3,
    ).double()
    rows = 3 * copies
    x = torch.randn(rows, 2, 8, 8, dtype=torch.float64)
    t, labels = torch.randint(0, 1000, (rows,)), torch.randint(0, 3, (rows,))
    check(model, (x, t, labels), copies, 1e-8, lambda out: weighted(out.sample) if hasattr(out, "sample") else out)
    check(model.float(), (x.float(), t, labels), copies, 1e-4, lambda out: weighted(out.sample))


def test_random_functions_of_parameters_use_one_draw() -> None:
    """A derived parameter goes back through the very values that the forward pass used."""
    torch.manual_seed(0)
    model = Learned(lambda m, h: h * F.dropout(m.p, 0.5), p=(4,)).double()
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    engine = PerExampleGradients(model, 1.0)
    position = engine.names.index("p")
    with torch.no_grad():
        h = model.layer(x)
    seen = []

    def loss() -> Tensor:
        out = model(x)
        seen.append(out.detach())
        return out.flatten(1).sum(1)

    got = engine.per_example(loss, 4)[position]
    kept = torch.where((seen[0] == 0).all(0).all(0), 0.0, 2.0)
    torch.testing.assert_close(got, h.sum(1) * kept)
    assert math.isclose(float(got[:, kept == 0].abs().sum()), 0.0)
