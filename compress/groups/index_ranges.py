"""Rows of positions as short text: ``0-3,5,7-9``."""

from __future__ import annotations

import re

import numpy as np

from compress.errors import PlanError
from compress.groups import Positions

_RUN = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def to_text(positions: Positions) -> str:
    """Return ascending positions as runs."""
    if not len(positions):
        return ""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    runs = np.split(positions, breaks)
    return ",".join(f"{r[0]}" if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def from_text(text: str, size: int) -> Positions:
    """Return the positions that ``to_text`` wrote.

    Raises:
        PlanError: the text is no such row, is empty, or leaves the range 0..size-1.
    """
    ends = []
    for part in text.split(","):
        match = _RUN.fullmatch(part)
        if match is None:
            raise PlanError(f"{text!r} is no row of positions", expected='text like "0-3,5,7-9"')
        ends += [int(match[1]), int(match[2] or match[1])]
    starts, stops = ends[::2], ends[1::2]
    is_ascending = all(a <= b for a, b in zip(starts, stops, strict=True)) and all(
        a < b for a, b in zip(stops[:-1], starts[1:], strict=True)
    )
    if not is_ascending or stops[-1] >= size:
        raise PlanError(f"positions {text!r} are not ascending within 0..{size - 1}")
    runs = [np.arange(a, b + 1) for a, b in zip(starts, stops, strict=True)]
    return np.concatenate(runs).astype(np.int64)
