"""Networks that may be compiled: when they are, and what happens when that fails."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings

import pytest
import torch
from torch import Tensor, nn

from dpsyngen.hardware.compiling import compiled
from dpsyngen.privacy.per_example import PerExampleGradients


class Compiler:
    """Stands in for torch.compile: counts, and can fail, or compute something else."""

    def __init__(self, error: Exception | None = None, wrong=lambda out: out) -> None:
        self.error, self.wrong, self.compiled, self.calls = error, wrong, 0, 0

    def __call__(self, function):
        self.compiled += 1

        def fast(*args, **kwargs):
            self.calls += 1
            if self.error is not None:
                raise self.error
            return self.wrong(function(*args, **kwargs))

        return fast


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(torch, "compile", made)
    return made


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


X = torch.ones(4, 3)


def test_a_module_stays_itself(compiler) -> None:
    plain, made = model(), model()
    assert compiled(made) is made
    assert compiled(made) is made  # once is enough
    assert torch.equal(made(X), plain(X))
    assert compiler.calls == 1
    assert list(made.state_dict()) == list(plain.state_dict())
    assert isinstance(made, nn.Linear)
    made.to(torch.float64)
    assert made(X.double()).dtype is torch.float64


def test_the_first_calls_are_not_worth_compiling_for(compiler) -> None:
    made = compiled(model(), after=3)
    for _ in range(3):
        made(X)
    assert compiler.compiled == 0
    made(X)
    made(X)
    assert (compiler.compiled, compiler.calls) == (1, 2)


def test_functions_are_wrapped(compiler) -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    fast = compiled(double)
    assert torch.equal(fast(X), 2 * X)
    assert compiler.calls == 1
    assert double(X).sum() == 24


def test_failing_to_compile_is_a_warning_said_once(monkeypatch) -> None:
    failing = Compiler(RuntimeError("no compiler here\nand much more"))
    monkeypatch.setattr(torch, "compile", failing)
    made, plain = compiled(model()), model()
    with pytest.warns(UserWarning, match=r"Linear could not be compiled \(RuntimeError: no compiler here\)") as said:
        assert torch.equal(made(X), plain(X))
    assert "compute.compile: false" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(made(X), plain(X))
    assert failing.calls == 1


def test_a_mistake_of_the_caller_is_no_failure_to_compile(compiler) -> None:
    made = compiled(model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            made(torch.ones(4, 5))
        made(X)
        made(X)
    assert compiler.calls == 2


class Zeroed(torch.autograd.Function):
    """The same value with another gradient: what a mistake in a compiler's backward pass looks like."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * torch.tensor([1.0, 0.0])


def test_code_that_computes_something_else_is_not_used(monkeypatch) -> None:
    for wrong, what, gradients in (
        (lambda out: 1.01 * out, "its result is another one", True),
        (lambda out: 1.01 * out, "its result is another one", False),
        (lambda out: out * float("nan"), "its result is another one", False),
        (Zeroed.apply, "its gradients are other ones", True),
    ):
        monkeypatch.setattr(torch, "compile", Compiler(wrong=wrong))
        made, plain = compiled(model()), model()
        with torch.set_grad_enabled(gradients), pytest.warns(UserWarning, match=what):
            first = made(X)
        assert torch.equal(first, plain(X))
        assert torch.equal(made(X), plain(X))
        if gradients:
            first.square().sum().backward()
            plain(X).square().sum().backward()
            assert torch.equal(made.weight.grad, plain.weight.grad)


def test_each_kind_of_call_is_checked_once(monkeypatch, compiler) -> None:
    made = compiled(model())
    checks = []
    real = made.forward._difference
    monkeypatch.setattr(made.forward, "_difference", lambda *a: checks.append(1) or real(*a))
    for x in (X, X, X[:2], X[:2], X):
        made(x)
    assert len(checks) == 2
    with torch.no_grad():
        made(X)
        made(X)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made(X)
    assert len(checks) == 4
    assert compiler.calls == 8


def test_the_engine_of_per_example_gradients_never_sees_compiled_code(compiler) -> None:
    """It learns gradients from the functions that a network calls: compiled code would hide them."""

    def gradients(network: nn.Module) -> list[Tensor]:
        engine = PerExampleGradients(network, 1.0, workers=1)
        return engine(lambda: network(X).square().sum(1), 4).sums

    made, expected = compiled(model()), gradients(model())
    assert all(torch.equal(a, b) for a, b in zip(gradients(made), expected, strict=True))
    assert compiler.calls == 0
    made(X)
    assert compiler.calls == 1


def test_a_copy_computes_with_its_own_weights(compiler) -> None:
    made = compiled(model())
    made(X)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        with torch.no_grad():
            other.weight.zero_()
            other.bias.zero_()
        assert not other(X).any()
        assert made(X).any()
    assert compiler.compiled == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which PyTorch compiles with on a CPU")
def test_the_real_compiler_computes_the_same_forward_and_backward() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))
    made = compiled(copy.deepcopy(plain))
    for network in (plain, made):
        network(X)  # the first compiled call is a check
        network(X).square().sum().backward()
    assert made.forward.fast is not None
    for a, b in zip(made.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
