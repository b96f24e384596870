"""Rows of positions as short text: ``0-3,5,7-9``."""

from __future__ import annotations

import re

import numpy as np

from compress.errors import PlanError
from compress.groups import Positions

_RUN = re.compile(r"(\d+)(?:-(\d+))?")


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
    runs = []
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = _RUN.fullmatch(part)
        if match is None:
            raise PlanError(f"{text!r} is no row of positions", expected='text like "0-3,5,7-9"')
        runs.append(np.arange(int(match[1]), int(match[2] or match[1]) + 1))
    positions = np.concatenate(runs).astype(np.int64)
    if not len(positions) or (np.diff(positions) <= 0).any() or positions[-1] >= size:
        raise PlanError(f"positions {text!r} are not ascending within 0..{size - 1}")
    return positions
