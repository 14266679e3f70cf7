"""Importing ColossalAI does not load torch's compiler; what is compiled meanwhile is compiled when it is called."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bench.strategies.colossal import compiling_at_the_first_call

IMPORT = """
import sys, torch
at_once = torch.compile
from bench.strategies.colossal import import_colossalai
import_colossalai()
assert "bitsandbytes" in sys.modules and torch.compile is at_once
print("torch._inductor.compile_fx" in sys.modules)
"""


@pytest.fixture
def compiled(monkeypatch):
    """Functions that torch was really given to compile, each with its options."""
    seen = []

    def compile_it(function, **options):
        seen.append((function.__name__, options))
        return lambda *arguments: ("compiled", *arguments)

    monkeypatch.setattr(torch, "compile", compile_it)
    return seen


def double(value):
    return 2 * value


def test_a_function_is_compiled_once_when_it_is_first_called(compiled):
    with compiling_at_the_first_call():
        later = torch.compile(double, dynamic=False)
    assert (compiled, later.__name__) == ([], "double")
    assert [later(1), later(2)] == [("compiled", 1), ("compiled", 2)]
    assert compiled == [("double", {"dynamic": False})]


def test_the_form_of_a_decorator_waits_too(compiled):
    with compiling_at_the_first_call():
        later = torch.compile(fullgraph=True)(double)
    assert compiled == []
    later(1)
    assert compiled == [("double", {"fullgraph": True})]


def test_afterwards_nothing_waits(compiled):
    with compiling_at_the_first_call():
        pass
    torch.compile(double)
    assert compiled == [("double", {})]


def test_the_import_of_colossalai_leaves_the_compiler_alone():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=300, check=False)
    last = done.stdout.splitlines()[-1:]  # DeepSpeed, where it is installed, prints before
    assert (done.returncode, last) == (0, ["False"]), done.stderr
