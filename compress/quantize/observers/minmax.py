"""The whole range of values."""

from __future__ import annotations

from dataclasses import dataclass

from compress.quantize.observers import Histogram


@dataclass(frozen=True)
class Minmax:
    """Keep all values seen, outliers included; needs no histogram, so it is the cheapest."""

    def __call__(self, seen: Histogram, *, symmetric: bool) -> tuple[float, float]:
        """Return the smallest and the largest value, and zero."""
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        limit = max(-low, high)
        return (-limit, limit) if symmetric else (low, high)
