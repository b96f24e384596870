"""All but a small share of the values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.quantize.observers import BINS, Histogram


@dataclass(frozen=True)
class Percentile:
    """Clip the share of values outside a percentile of their magnitudes.

    Args:
        percentile: Of 100, how much is kept; in (50, 100].
    """

    percentile: float = 99.999

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile {self.percentile} is not in (50, 100]")

    def __call__(self, seen: Histogram, *, symmetric: bool) -> tuple[float, float]:
        """Return the range: both tails cut alike where it is symmetric, each by itself if not."""
        share = self.percentile / 100
        if symmetric:
            counts, width = seen.magnitudes()
            largest = max(-seen.low, seen.high)
            wanted = share * counts.sum() * (1 - 1e-12)
            edge = int(np.searchsorted(np.cumsum(counts), wanted))
            limit = min((edge + 1) * width, largest)
            return -limit, limit
        width = 2.0**seen.exponent
        negative, positive = seen.counts[BINS - 1 :: -1], seen.counts[BINS - 1 :]
        outside = (1 - share) * seen.total
        ends = []
        for side, extreme in ((negative, -seen.low), (positive, seen.high)):
            above = np.cumsum(side[::-1])[::-1]  # values at least this far out
            kept = np.flatnonzero(above > outside)
            edge = int(kept[-1]) if len(kept) else 0
            ends.append(max(min((edge + 1) * width, extreme), 0.0))
        return -ends[0], ends[1]
