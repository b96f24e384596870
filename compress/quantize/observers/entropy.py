"""The range that loses least information."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.quantize.observers import Histogram

_BINS = 2048


@dataclass(frozen=True)
class Entropy:
    """Clip magnitudes where the Kullback-Leibler divergence of the quantized histogram is least.

    For each candidate the values outside are put into the last bin, the rest is spread evenly over
    the filled bins of each of 128 codes, and both are compared as distributions. Zeros, which any
    scale represents, do not count. Often clips more than is good for networks with ReLU6.

    Args:
        levels: Codes on one side of zero.
        candidates: Thresholds tried.

    Source: Migacz, 8-bit Inference with TensorRT, GTC 2017, slides 25 to 38.
    """

    levels: int = 128
    candidates: int = 64

    def __post_init__(self) -> None:
        if self.levels < 2 or self.candidates < 2:
            raise ValueError("levels and candidates must be at least 2")

    def __call__(self, seen: Histogram, *, symmetric: bool) -> tuple[float, float]:
        """Return the range."""
        largest = max(-seen.low, seen.high)
        limit = min(self._threshold(seen, largest), largest) if largest > 0 else 0.0
        if symmetric:
            return -limit, limit
        return max(-limit, min(seen.low, 0.0)), min(limit, max(seen.high, 0.0))

    def _threshold(self, seen: Histogram, largest: float) -> float:
        counts, width = seen.magnitudes()
        used = min(int(largest / width) + 1, len(counts))
        step = max(used // _BINS, 1)
        padded = np.zeros(-(-used // step) * step)
        padded[:used] = counts[:used]
        padded[0] = 0  # zeros and what is next to them
        joined = padded.reshape(-1, step).sum(1)
        if len(joined) <= self.levels or not joined.any():
            return largest
        ends = np.unique(np.linspace(self.levels, len(joined), self.candidates).astype(int))
        divergences = [_divergence(joined, int(end), self.levels) for end in ends]
        return float(ends[int(np.argmin(divergences))]) * step * width


def _divergence(counts: NDArray[np.float64], end: int, levels: int) -> float:
    """Return KL(clipped histogram, its quantized form) for a threshold of ``end`` bins."""
    inside = counts[:end]
    reference = inside.copy()
    reference[-1] += counts[end:].sum()
    code = np.arange(end) * levels // end
    filled = inside > 0
    sums = np.bincount(code, weights=inside, minlength=levels)
    holders = np.bincount(code, weights=filled, minlength=levels)
    quantized = np.where(filled, (sums / np.maximum(holders, 1))[code], 0.0)
    if not quantized.any():
        return np.inf
    p, q = reference / reference.sum(), quantized / quantized.sum()
    both = p > 0
    return float(np.sum(p[both] * np.log(p[both] / np.maximum(q[both], 1e-10))))
