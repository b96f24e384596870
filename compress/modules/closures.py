"""Variables that functions close over: read, and replaced in a copy of the function."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any


def with_closure(
    function: types.FunctionType, change: Callable[[str, Any], Any]
) -> types.FunctionType:
    """Return a copy of ``function`` with ``change(name, value)`` for each closed-over variable."""
    cells = tuple(
        types.CellType(change(name, value)) if value is not _EMPTY else types.CellType()
        for name, value in closed_over(function)
    )
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


_EMPTY = object()


def closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of the variables that a function closes over."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a cell that was never filled
            yield name, _EMPTY
