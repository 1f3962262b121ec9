"""Which public image is used when: fresh ones once, a fixed set once a turn, the same after a resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpsyngen.config import load_config
from dpsyngen.errors import ConfigError
from dpsyngen.privacy.randomness import Randomness
from dpsyngen.programs import make_program
from dpsyngen.training.public import PublicImages

PROGRAM = make_program("strokes", resolution=8, channels=1, seed=3)
CPU = torch.device("cpu")


def images(distinct: int | None = None, offset: int = 0, batch: int = 6) -> PublicImages:
    return PublicImages(PROGRAM, batch, offset, distinct, Randomness.from_insecure_seed(1), 2)


def numbers(drawn: torch.Tensor) -> list[int]:
    known = {image.tobytes(): i for i, image in enumerate(PROGRAM.batch(range(300)))}
    return [known[image.numpy().tobytes()] for image in drawn]


def test_fresh_images_are_consecutive() -> None:
    take = images(offset=20)
    assert [n for step in range(4) for n in numbers(take(step, CPU))] == list(range(20, 44))


def test_a_fixed_set_is_gone_through_in_a_new_order_each_turn() -> None:
    take = images(distinct=40, offset=100)
    seen = [n for step in range(20) for n in numbers(take(step, CPU))]
    turns = [seen[k : k + 40] for k in (0, 40, 80)]
    assert all(sorted(turn) == list(range(100, 140)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    assert turns[0] != sorted(turns[0])


def test_a_fixed_set_smaller_than_a_batch() -> None:
    take = images(distinct=4, batch=10)
    seen = [n for step in range(2) for n in numbers(take(step, CPU))]
    assert all(sorted(seen[k : k + 4]) == [0, 1, 2, 3] for k in range(0, 20, 4))


@pytest.mark.parametrize("distinct", [None, 40])
def test_any_step_can_be_the_first(distinct: int | None) -> None:
    """As after a resume, which must not change what is trained on."""
    whole = images(distinct)
    steps = [numbers(whole(step, CPU)) for step in range(18)]
    for step in (17, 3, 9):
        assert numbers(images(distinct)(step, CPU)) == steps[step]
    assert numbers(whole(2, CPU)) == steps[2]  # back, too


def test_drawing_ahead_changes_nothing() -> None:
    """What an accelerator gets; "meta" stands in for one and holds no values, so look at what was drawn."""
    take = images()
    meta = torch.device("meta")
    for step in (0, 1, 2, 5):
        assert take(step, meta).shape == (6, 1, 8, 8)
        ahead = take._ahead
        assert ahead is not None
        assert ahead[0] == step + 1
        assert np.array_equal(ahead[1].result(), PROGRAM.batch(range(6 * step + 6, 6 * step + 12)))


def test_networks_see_the_set_in_different_orders() -> None:
    a, b = images(distinct=40), images(distinct=40, offset=40)
    assert [n + 40 for n in numbers(a(0, CPU))] != numbers(b(0, CPU))


@pytest.mark.parametrize("bad", [0, -3, 1.5, "all"])
def test_bad_number_of_images(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"public.distinct"):
        load_config({"public": {"distinct": bad}})
