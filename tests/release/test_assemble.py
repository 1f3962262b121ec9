"""The code of a release is ours, whole, and needs nothing that is not there."""

from __future__ import annotations

import ast
import inspect
import sys

import pytest

from dpsyngen.diffusion import samplers, unet
from dpsyngen.release.companions import DENOISER, PIPELINE, code
from dpsyngen.release.hub import assemble as module
from dpsyngen.release.hub.assemble import NotSelfContained, assemble

MAY_IMPORT = {"diffusers", "numpy", "PIL", "safetensors", "torch"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [DENOISER, PIPELINE])
def test_the_code_of_a_release_imports_no_dpsyngen(name) -> None:
    tree = ast.parse(code()[name])
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {i.split(".")[0] for i in imported} <= MAY_IMPORT
    assert not any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(tree))


def test_every_name_in_the_code_of_the_denoiser_is_defined_there() -> None:
    tree = ast.parse(code()[DENOISER])
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    defined |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    defined |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(a.asname or a.name).split(".")[0] for a in node.names}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    builtins = set(dir(__builtins__)) | set(vars(sys.modules["builtins"]))
    assert used - defined - builtins == set()


def test_our_definitions_stand_there_word_for_word() -> None:
    text = code()[DENOISER]
    for thing in (samplers.sample_batches, samplers.heun, unet.UNet, unet._Attention):
        assert inspect.getsource(thing) in text + "\n"
    # And nothing that it does not need.
    assert "evenly_in_log" not in text
    assert "def stage_map" not in text


def test_the_same_text_again() -> None:
    assert assemble("dpsyngen.release.hub.denoiser", "x") == assemble("dpsyngen.release.hub.denoiser", "x")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"a": "from dpsyngen.b import f\ndef g(): return f() + _h()\ndef _h(): return 1",
          "b": "def f(): return _h()\ndef _h(): return 2"}, "_h is defined in two modules"),
        ({"a": "def g():\n    from dpsyngen.b import f\n    return f()",
          "b": "def f(): return 1"}, "inside a function"),
        ({"a": "from dpsyngen.b import f as k\ndef g(): return k()", "b": "def f(): return 1"}, "another name"),
        ({"a": "import numpy as x\nfrom dpsyngen.b import f\ndef g(): return x, f()",
          "b": "import torch as x\ndef f(): return x"}, "imported in two ways"),
    ],
)  # fmt: skip
def test_what_cannot_be_put_together_is_refused(files, why, monkeypatch) -> None:
    monkeypatch.setattr(module, "_text", lambda name: files[name.split(".")[1]])
    with pytest.raises(NotSelfContained, match=why):
        assemble("dpsyngen.a", "x")


def test_only_what_is_needed_is_taken_in_an_order_that_runs(monkeypatch) -> None:
    files = {
        "a": "from dpsyngen.b import f, LIMIT\nfrom dpsyngen.c import Base\n\nclass A(Base):\n    x = f(LIMIT)\n",
        "b": "import math\n\n# Why.\nLIMIT = 4\n'''What it is.'''\n\nUNUSED = math.nope\n\n"
        "def f(x):\n    return _g(x)\n\ndef _g(x):\n    return math.sqrt(x)\n",
        "c": "from dpsyngen.b import LIMIT\n\nclass Base:\n    y = LIMIT\n",
    }
    monkeypatch.setattr(module, "_text", lambda name: files[name.split(".")[1]])
    text = assemble("dpsyngen.a", "Heading.")
    scope: dict = {}
    exec(compile(text, "a.py", "exec"), scope)
    assert (scope["A"].x, scope["A"].y) == (2.0, 4)
    assert "# Why.\nLIMIT = 4\n'''What it is.'''" in text
    assert "UNUSED" not in text
    assert text.startswith('"""Heading."""')
