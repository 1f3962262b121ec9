"""Threads that share a batch: order, errors, modes and the number of threads inside."""

from __future__ import annotations

import multiprocessing
import threading
import time

import pytest
import torch

from dpsyngen.full_precision import ordinary_modes
from dpsyngen.workers import Workers


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_whoever_is_first(four_threads) -> None:
    workers = Workers(3)

    def slow_first(i: int) -> int:
        time.sleep(0.02 * (5 - i))
        return i * i

    assert workers.map(slow_first, range(5)) == [0, 1, 4, 9, 16]
    assert workers.map(slow_first, []) == []


def test_each_worker_has_its_share_of_the_threads(four_threads) -> None:
    for count, share in ((2, 2), (4, 1), (3, 1), (8, 1)):
        workers = Workers(count)
        seen = workers.map(lambda _: (time.sleep(0.01), torch.get_num_threads())[1], range(2 * count))
        assert seen == [share] * (2 * count)
        assert torch.get_num_threads() == 4


def test_default_is_one_worker_a_thread_and_at_most_eight(four_threads) -> None:
    assert Workers().count == 4
    torch.set_num_threads(1)
    assert Workers().count == 1
    torch.set_num_threads(16)
    assert Workers().count == 8
    with pytest.raises(ValueError, match="at least one worker"):
        Workers(0)


def test_first_error_is_raised_and_the_next_call_works(four_threads) -> None:
    workers = Workers(2)

    def fail(i: int) -> int:
        if i in (1, 2):
            raise RuntimeError(f"item {i}")
        return i

    with pytest.raises(RuntimeError, match="item 1"):
        workers.map(fail, range(4))
    assert torch.get_num_threads() == 4
    assert workers.map(fail, [5, 6]) == [5, 6]


def test_modes_of_the_caller_hold_in_the_threads(four_threads) -> None:
    workers = Workers(2)

    def modes(_: int) -> tuple[bool, bool, torch.dtype]:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), product.dtype

    assert workers.map(modes, range(4)) == [(True, False, torch.float32)] * 4
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert workers.map(modes, range(4)) == [(False, True, torch.bfloat16)] * 4
    assert workers.map(modes, range(4)) == [(True, False, torch.float32)] * 4


def test_alone_or_with_one_item_the_calling_thread_works() -> None:
    me = threading.get_ident()
    assert Workers(1).map(lambda _: threading.get_ident(), range(3)) == [me] * 3
    assert Workers(4).map(lambda _: threading.get_ident(), [0]) == [me]


def test_workers_inside_of_workers_do_not_wait_for_each_other(four_threads) -> None:
    outer, inner = Workers(2), Workers(2)

    def nested(i: int) -> list[int]:
        me = threading.get_ident()
        assert inner.map(lambda _: threading.get_ident(), range(3)) == [me] * 3
        return inner.map(lambda j: 10 * i + j, range(2))

    assert outer.map(nested, range(3)) == [[0, 1], [10, 11], [20, 21]]


def test_in_a_forked_process_threads_are_made_anew(four_threads) -> None:
    """Its parent's are gone: whoever waits for them waits for ever."""
    workers = Workers(2)

    def work(pipe=None) -> list[float]:
        with ordinary_modes():
            x = torch.ones(64, 64)
            found = workers.map(lambda i: float((x @ (x * i)).sum()), [1, 2, 3])
        if pipe is not None:
            pipe.send((found, torch.get_num_threads()))
        return found

    expected = work()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    child.start()
    try:
        assert here.poll(60)
        assert here.recv() == (expected, 1)
    finally:
        child.kill()
        child.join()
