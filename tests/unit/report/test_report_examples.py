"""The examples in the docstrings of the report's modules are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import bench.report

MODULES = sorted(item.name for item in pkgutil.iter_modules(bench.report.__path__, "bench.report."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
