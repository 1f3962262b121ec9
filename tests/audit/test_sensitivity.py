"""The clipping audits on a small network: honest engines pass, three ways to be wrong do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dpsyngen.audit.sensitivity import check_gradients, check_sensitivity, clip_by_hand
from dpsyngen.privacy.per_example import PerExampleGradients, layer_numbers

C, COPIES = 0.5, 3


class Setting:
    def __init__(self, style="flat", scale: float = 30.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2))
        self.x = torch.randn(5, COPIES, 4) * scale ** torch.rand(5, 1, 1)
        self.engine = PerExampleGradients(self.model, C, style=style, workers=1)

    def rows(self, examples: Sequence[int]) -> Tensor:
        return self.model(self.x[list(examples)].flatten(0, 1)).square().sum(1)

    def summed(self, examples: Sequence[int]) -> list[Tensor]:
        return self.engine(lambda: self.rows(examples), len(examples), COPIES).sums

    def reference(self, example: int) -> list[list[Tensor]]:
        return [
            list(torch.autograd.grad(self.rows([example])[k], list(self.model.parameters()))) for k in range(COPIES)
        ]

    def gradients(self, style, summed=None):
        layers = layer_numbers(self.engine.names)
        return check_gradients(summed or self.summed, self.reference, layers, 5, C, style)


@pytest.mark.parametrize("style", ["flat", "per-layer", "automatic"])
def test_the_engine_passes(style) -> None:
    s = Setting(style)
    assert check_sensitivity(s.summed, 5, C).passed
    assert s.gradients(style).passed


def test_a_larger_bound_is_found() -> None:
    s = Setting()
    assert not check_sensitivity(s.summed, 5, C / 1.01).passed


def test_examples_that_are_too_tame_prove_nothing() -> None:
    s = Setting()
    finding = check_sensitivity(lambda e: [t * 0.1 for t in s.summed(e)], 5, C)
    assert not finding.passed
    assert "nothing was shown" in finding.detail


@pytest.mark.parametrize("bad", [[0], [0, 1], [4], [2], [0, 1, 2, 3, 4]])
def test_gradients_that_are_not_numbers_are_found(bad) -> None:
    """Also where only one of the sums is not a number, first or last."""
    s = Setting()

    def summed(examples: Sequence[int]) -> list[Tensor]:
        return [t * float("nan") if list(examples) == bad else t for t in s.summed(examples)]

    assert check_sensitivity(summed, 5, C).passed is (bad == [0, 1])
    assert s.gradients("flat", summed).passed is (len(bad) > 1)


def test_clipping_each_copy_is_found_either_way() -> None:
    s = Setting()

    def of_copies(examples: Sequence[int], averaged: bool) -> list[Tensor]:
        out = s.engine(lambda: s.rows(examples), len(examples) * COPIES, 1)
        return [t / (COPIES if averaged else 1) for t in replace(out).sums]

    assert not check_sensitivity(lambda e: of_copies(e, False), 5, C).passed
    assert not s.gradients("flat", lambda e: of_copies(e, True)).passed


def test_the_hand_written_clipping() -> None:
    gradient = [torch.tensor([3.0, 4.0]), torch.tensor([12.0])]
    assert [t.tolist() for t in clip_by_hand(gradient, [0, 1], 26.0, "flat")] == [[3.0, 4.0], [12.0]]
    assert torch.cat(clip_by_hand(gradient, [0, 1], 6.5, "flat")).tolist() == [1.5, 2.0, 6.0]
    by_layer = clip_by_hand(gradient, [0, 1], 2**0.5, "per-layer")
    assert torch.cat(by_layer).tolist() == pytest.approx([0.6, 0.8, 1.0])
    assert torch.cat(clip_by_hand(gradient, [0, 0], 13.01, "automatic")).tolist() == pytest.approx([3.0, 4.0, 12.0])
    assert layer_numbers(["a.weight", "a.bias", "b.c.weight"]) == [0, 0, 1]
