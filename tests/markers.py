"""Which services and processes a test starts, read from its code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import Any

import pytest

STARTS = {
    "local_ray": "ray",
    "ray": "ray",
    "start_s3": "s3",
    "s3_server": "s3",
    "s3_url": "s3",
    "MlflowClient": "mlflow",
    "on_ranks": "distributed",
    "ProcessPoolExecutor": "process",
    "subprocess": "process",
}
"""A test is marked when its code, its helpers or its fixtures name one of these.

``request.getfixturevalue("s3_url")`` counts as well.
"""
FIXTURES = {"s3_server", "s3_url"}


def markers_of(item: pytest.Function) -> set[str]:
    """The markers of a test: ray, s3, mlflow, distributed and process, as far as they apply."""
    definitions = item._fixtureinfo.name2fixturedefs.values()
    fixtures = [definition.func for found in definitions for definition in found]
    markers = {STARTS[name] for name in names([item.function, *fixtures]) & STARTS.keys()}
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else []
    if "file" in parameters:  # of a test that runs on both kinds of storage
        markers.discard("s3")
    return markers


def names(functions: Iterable[Callable[..., Any]]) -> set[str]:
    """Every name in these functions, and in the functions under ``tests`` that they name."""
    found: set[str] = set()
    seen: set[FunctionType] = set()
    left: list[Any] = list(functions)
    while left:
        function = left.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        here = _names_in(function.__code__)
        found |= here
        values = [function.__globals__[name] for name in here & function.__globals__.keys()]
        left += [
            value for value in values if str(getattr(value, "__module__", "")).startswith("tests")
        ]
        left += [function.__wrapped__] if hasattr(function, "__wrapped__") else []
    return found


def _names_in(code: CodeType) -> set[str]:
    """Names in code, in its lambdas and inner functions, and fixtures that it asks for by name."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    found = set(code.co_names).union(code.co_varnames[: code.co_argcount], *map(_names_in, inner))
    return found | (FIXTURES & set(map(str, code.co_consts)))
