"""Stages: which network answers at which noise level."""

from __future__ import annotations

import math

import pytest
import torch

from dpsyngen.diffusion.samplers import karras_steps, solved
from dpsyngen.diffusion.stages import GAUSSIAN, USE_MOMENTS, VARIANTS, Stage, StagedDenoiser, StageMap, stage_map
from dpsyngen.diffusion.standalone import SAMPLERS
from dpsyngen.errors import ConfigError

PUBLISHED = [v for v in VARIANTS if v not in USE_MOMENTS]
PUBLIC = {
    "dpdm": set(),
    "finetune": set(),
    "cleaning": {"cleaning"},
    "coarse": {"coarse"},
    "both": {"cleaning", "coarse"},
    "gaussian": set(),
    "instant": set(),
    "residual": set(),
}


def expected_stage(variant: str, log_sigma: float) -> str:
    if log_sigma < -3 and ("cleaning" in PUBLIC[variant] or variant == "residual"):
        return "cleaning"
    if variant == "gaussian":
        return "gaussian"
    if log_sigma > 2 and ("coarse" in PUBLIC[variant] or variant in USE_MOMENTS):
        return "coarse"
    return "context"


@pytest.mark.parametrize("networks", ["experts", "shared"])
@pytest.mark.parametrize("variant", PUBLISHED)
def test_variants_are_values(variant, networks) -> None:
    stages = stage_map(variant, networks=networks)
    assert {s.name for s in stages.public} == PUBLIC[variant]
    assert stages.private.name == "context"
    assert stages.pretrain is (variant == "finetune")
    assert stage_map(variant, networks=networks, pretrain=True).pretrain
    assert stages.networks == (("shared",) if networks == "shared" else (*sorted(PUBLIC[variant]), "context"))


@pytest.mark.parametrize(
    ("variant", "names", "networks", "trainers"),
    [
        ("gaussian", ("gaussian",), (), ("moments",)),
        ("instant", ("context", "coarse"), ("prior",), ("prior", "moments")),
        ("residual", ("cleaning", "context", "coarse"), ("prior", "context"), ("prior", "private", "moments")),
    ],
)
def test_variants_with_moments_are_values(variant, names, networks, trainers) -> None:
    stages = stage_map(variant, tau_coarse=2.0)
    assert tuple(s.name for s in stages.stages) == names
    assert tuple(s.trainer for s in stages.stages) == trainers
    assert stages.networks == networks
    assert stages.moments
    assert not stages.pretrain
    assert stages.gaussian is (variant in ("gaussian", "instant"))
    assert stages.reading == set(networks)
    assert [s.network == GAUSSIAN for s in stages.stages] == [t == "moments" for t in trainers]
    assert stage_map(variant, pretrain=False, tau_coarse=2.0) == stages


def test_without_a_prior_residual_has_no_cleaning_stage() -> None:
    stages = stage_map("residual", prior=False)
    assert [(s.name, s.trainer, s.network) for s in stages.stages] == [
        ("context", "private", "context"),
        ("coarse", "moments", GAUSSIAN),
    ]
    assert stages.reading == {"context"}
    assert stage_map("residual", prior=False, tau_cleaning=9.0) == stages
    assert stage_map("both", prior=False) == stage_map("both")


def test_published_variants_take_no_moments() -> None:
    assert not any(stage_map(v).moments or stage_map(v).gaussian for v in PUBLISHED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_where_no_tau_coarse_is_given_it_suits_the_variant(variant) -> None:
    given = {"instant": -0.3, "residual": 1.5}.get(variant, 2.0)
    assert stage_map(variant) == stage_map(variant, tau_coarse=given)


@pytest.mark.parametrize("variant", VARIANTS)
def test_owner_at_and_beside_the_thresholds(variant) -> None:
    stages = stage_map(variant, tau_coarse=2.0)
    for tau in (-3.0, 2.0):
        for log_sigma in (math.nextafter(tau, -9), tau, math.nextafter(tau, 9)):
            assert stages.owner(log_sigma).name == expected_stage(variant, log_sigma), log_sigma
    for log_sigma in (-math.inf, -50, -1, 0, 50, math.inf):
        assert stages.owner(log_sigma).name == expected_stage(variant, log_sigma), log_sigma
    # The thresholds themselves belong to the private stage.
    assert stages.owner(-3.0) is stages.owner(2.0) is stages.private
    assert stages.private.trainer == {"gaussian": "moments", "instant": "prior"}.get(variant, "private")
    with pytest.raises(ValueError, match="not a number"):
        stages.owner(math.nan)


class Fake:
    """A denoiser that remembers which log σ and labels it was asked for."""

    def __init__(self, value: float) -> None:
        self.value, self.log_sigmas, self.labels = value, [], []

    def __call__(self, x, sigma, labels=None):
        self.log_sigmas += sigma.log().tolist()
        self.labels += [None] * len(x) if labels is None else labels.tolist()
        return torch.full_like(x, self.value)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_which_network_answers_during_sampling(variant, sampler) -> None:
    stages = stage_map(variant, tau_coarse=2.0)
    fakes = {s.name: Fake(0.1) for s in stages.stages}
    staged = StagedDenoiser(stages, {s.network: fakes[s.name] for s in stages.stages})
    sigmas = karras_steps(30)
    solved(sampler, staged, torch.randn(2, 1, 4, 4) * 80, sigmas, torch.tensor([4, 5]))
    asked = 0
    for stage in stages.stages:
        fake = fakes[stage.name]
        assert fake.log_sigmas, f"{stage.name} was never asked"
        assert {expected_stage(variant, x) for x in fake.log_sigmas} == {stage.name}
        asked += len(fake.log_sigmas)
        # Labels do not reach the stages of programs, which have none.
        assert set(fake.labels) == ({None} if stage.trainer == "public" else {4, 5})
    assert asked == 2 * (30 if sampler != "heun" else 59)


@pytest.mark.parametrize("networks", ["experts", "shared"])
def test_rows_of_a_mixed_batch_go_to_their_owners(networks) -> None:
    stages = stage_map("both", networks=networks)
    fakes = {n: Fake(float(i)) for i, n in enumerate(stages.networks)}
    log_sigma = torch.tensor([3.0, -5.0, 0.0, 2.5, -3.1, 2.0], dtype=torch.float64)
    labels = torch.arange(6)
    out = StagedDenoiser(stages, fakes)(torch.zeros(6, 1, 2, 2), log_sigma.exp(), labels)
    # The private stage's rows are 0.0 and 2.0 (log σ).  Labels reach no other.
    if networks == "experts":
        for name, rows, seen in (
            ("coarse", [0, 3], [None, None]),
            ("cleaning", [1, 4], [None, None]),
            ("context", [2, 5], [2, 5]),
        ):
            assert out[rows].unique().item() == stages.networks.index(name)
            assert fakes[name].labels == seen
    else:
        assert sorted(fakes["shared"].labels, key=str) == [2, 5, None, None, None, None]


def test_thresholds_move_the_stages() -> None:
    stages = stage_map("both", tau_cleaning=-1.0, tau_coarse=0.5)
    assert [(s.low, s.high) for s in stages.stages] == [(-math.inf, -1.0), (-1.0, 0.5), (0.5, math.inf)]


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "sideways"},
        {"variant": "both", "tau_cleaning": 2.0},
        {"variant": "both", "tau_cleaning": 3.0},
        {"variant": "both", "tau_coarse": math.inf},
        {"variant": "cleaning", "tau_cleaning": math.nan},
        {"variant": "both", "networks": "many"},
        {"variant": "finetune", "pretrain": False},
        {"variant": "residual", "tau_cleaning": 2.0},
        {"variant": "residual", "networks": "shared"},
        {"variant": "gaussian", "pretrain": True},
        {"variant": "residual", "pretrain": True},
    ],
)
def test_bad_options(options) -> None:
    with pytest.raises(ConfigError):
        stage_map(**options)


def test_invariants_of_a_map() -> None:
    inf = math.inf
    for pieces in (
        (),
        (Stage("a", -inf, 0, "private", "n"),),
        (Stage("a", -inf, 0, "private", "n"), Stage("b", 1, inf, "public", "m")),
        (Stage("a", -inf, 0, "private", "n"), Stage("b", 0, inf, "private", "m")),
        (Stage("a", -inf, 0, "public", "n"), Stage("b", 0, inf, "public", "m")),
        (Stage("a", -inf, 0, "private", "n"), Stage("a", 0, inf, "public", "m")),
        (Stage("a", -inf, 0, "moments", GAUSSIAN), Stage("b", 0, inf, "moments", GAUSSIAN)),
        (Stage("a", -inf, 0, "moments", GAUSSIAN), Stage("b", 0, inf, "public", "m")),
        # A file of weights has one name: moments have theirs, and no network may take it.
        (Stage("a", -inf, inf, "moments", "n"),),
        (Stage("a", -inf, 0, "private", GAUSSIAN), Stage("b", 0, inf, "public", "m")),
        (Stage("a", -inf, 0, "private", "n"), Stage("b", 0, inf, "moments", "m")),
    ):
        with pytest.raises(ConfigError):
            StageMap(pieces)
    with pytest.raises(ConfigError, match="no denoiser for"):
        StagedDenoiser(stage_map("both"), {"context": Fake(0.0)})
    with pytest.raises(ConfigError, match="no denoiser for gaussian"):
        StagedDenoiser(stage_map("residual"), {"context": Fake(0.0)})


@pytest.mark.parametrize("variant", PUBLISHED)
def test_one_shared_network_answers_everywhere_with_labels_in_the_middle(variant) -> None:
    stages = stage_map(variant, networks="shared")
    shared = Fake(0.1)
    staged = StagedDenoiser(stages, {"shared": shared}).guided(2.0)
    solved("ddim", staged, torch.randn(1, 1, 4, 4) * 80, karras_steps(30), torch.tensor([6]))
    expected = []
    for log_sigma in karras_steps(30)[:-1].log().tolist():
        # Guidance asks twice, with the class and without.
        labels = [6, None] if expected_stage(variant, log_sigma) == "context" else [None]
        expected += [(pytest.approx(log_sigma), label) for label in labels]
    assert list(zip(shared.log_sigmas, shared.labels, strict=True)) == expected


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("networks", ["experts", "shared"])
def test_without_a_denoiser_of_its_own_the_private_stage_uses_its_network(variant, networks) -> None:
    stages = stage_map(variant, networks=networks)
    fakes = {n: Fake(float(i)) for i, n in enumerate(stages.networks)}
    log_sigmas = [-7.0, -3.0, 0.0, 2.0, 4.3]
    sigma = torch.tensor(log_sigmas, dtype=torch.float64).exp()
    # exp and log of a threshold may round to its other side; set these rows right at it.
    sigma[1], sigma[3] = math.exp(-3) * (1 + 1e-12), math.exp(2) * (1 - 1e-12)
    out = StagedDenoiser(stages, fakes)(torch.zeros(5, 1, 1, 1), sigma, torch.arange(5)).flatten().tolist()
    for value, x in zip(out, log_sigmas, strict=True):
        stage = expected_stage(variant, x)
        assert value == stages.networks.index("shared" if networks == "shared" else stage)


def test_an_answer_depends_on_its_own_row_alone() -> None:
    stages = stage_map("both")
    scales = {"coarse": 2.0, "context": 3.0, "cleaning": 5.0}
    staged = StagedDenoiser(
        stages, {n: lambda x, s, y=None, k=k: x * k + s.view(-1, 1, 1, 1) for n, k in scales.items()}
    )
    x = torch.randn(8, 2, 3, 3, dtype=torch.float64)
    sigma = torch.tensor([3.0, -5, 0, 4, -4, 1, -1, 2.5], dtype=torch.float64).exp()
    whole = staged(x, sigma)
    for i in range(8):
        assert torch.equal(staged(x[i : i + 1], sigma[i : i + 1]), whole[i : i + 1])
    order = torch.tensor([7, 3, 0, 1, 6, 2, 5, 4])
    assert torch.equal(staged(x[order], sigma[order]), whole[order])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stage_map_is_a_partition(variant) -> None:
    stages = stage_map(variant, tau_cleaning=-2.5, tau_coarse=1.5)
    for log_sigma in torch.linspace(-9, 6, 301).tolist():
        owner = stages.owner(log_sigma)
        assert owner in stages.stages
        assert owner.low <= log_sigma <= owner.high
    assert stages.networks[-1:] == (() if variant == "gaussian" else (stages.private.network,))
    others = [s for s in stages.stages if s.trainer != "public"]
    assert len(others) == {"instant": 2, "residual": 3}.get(variant, 1)


def test_one_threshold_alone_may_lie_anywhere() -> None:
    # τ_coarse means nothing to Cleaning, so the two need no order there.
    assert stage_map("cleaning", tau_cleaning=3.0).private.low == 3.0
    assert stage_map("coarse", tau_coarse=-4.0).private.high == -4.0
    assert stage_map("dpdm", tau_cleaning=3.0).private.low == -math.inf


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="dpdm, finetune, cleaning, coarse, both"):
        stage_map("sideways")
    with pytest.raises(ConfigError, match=r"tau_cleaning = 3.0 must be below tau_coarse = 2.0"):
        stage_map("both", tau_cleaning=3.0)
    with pytest.raises(ConfigError, match="no denoiser for cleaning, coarse; given: context"):
        StagedDenoiser(stage_map("both"), {"context": Fake(0.0)})
