"""Running histograms of each channel, from which those of a rescaled tensor follow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compress.quantize.observers._histogram import Histogram, Pointwise

_BINS = 128  # on each side of zero; at least half of them lie inside the range seen
_PARTS = 8  # of a bin, over which what it holds is spread


class ChannelHistogram:
    """How often values of each channel were seen, in bins of a width of its own.

    As ``Histogram``, with fewer bins: what a tensor is once its channels are divided by factors
    need not be measured, as it follows from what they were.

    Args:
        channels: C, their number.
    """

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros((channels, 2 * _BINS - 1), np.uint32)  # a kilobyte for each channel
        self.exponents = np.full(channels, np.iinfo(np.int32).min)
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)

    @property
    def largest(self) -> NDArray[np.float64]:
        """The largest magnitude of each channel, (C,)."""
        return np.asarray(np.maximum(-self.low, self.high))

    def add(
        self,
        values: NDArray[np.float32],
        channels: NDArray[np.int64],
        low: NDArray[np.float32],
        high: NDArray[np.float32],
    ) -> None:
        """Count ``values``.

        Args:
            values: (N,), finite; a sample of what was seen.
            channels: The channel of each, (N,).
            low: Smallest value of each channel in all that was seen, (C,).
            high: Largest, (C,).
        """
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        wanted = np.frexp(np.maximum(self.largest, 2.0**-100) / _BINS)[1]
        grown = np.flatnonzero(wanted > self.exponents)
        if grown.size:
            self._widen(grown, wanted[grown])
        width = np.exp2(-self.exponents.astype(np.float32))
        index = (values * width[channels]).astype(np.int64)
        index += channels * self.counts.shape[1] + _BINS - 1
        found = np.bincount(index, minlength=self.counts.size)
        self.counts += found.reshape(self.counts.shape).astype(np.uint32)

    def divided(self, factors: NDArray[np.float64], through: Pointwise | None = None) -> Histogram:
        """Return the histogram of the tensor with each channel divided by a factor, (C,).

        Args:
            factors: Positive.
            through: As in ``Histogram``.
        """
        found = Histogram(through)
        channels, bins = np.nonzero(self.counts)
        steps, times = bins - (_BINS - 1), self.counts[channels, bins].astype(np.int64)
        inside = (np.arange(_PARTS) + 0.5) / _PARTS
        ends = np.abs(steps)[:, None] + inside * (steps != 0)[:, None]  # what is near zero is zero
        width = np.exp2(self.exponents.astype(np.float64)) / factors
        values = np.sign(steps)[:, None] * ends * width[channels, None]
        low, high = self.low / factors, self.high / factors
        values = np.clip(values, low[channels, None], high[channels, None])
        spread = np.repeat(times, _PARTS)
        found.add(values.reshape(-1), float(low.min()), float(high.max()), spread)
        return found

    def _widen(self, channels: NDArray[np.int64], exponents: NDArray[np.int64]) -> None:
        steps = np.arange(1 - _BINS, _BINS)
        for channel, exponent in zip(channels, exponents, strict=True):
            if self.counts[channel].any():
                factor = 2 ** min(int(exponent) - int(self.exponents[channel]), 8)
                joined = np.sign(steps) * (np.abs(steps) // factor) + _BINS - 1
                counts = np.bincount(joined, self.counts[channel], len(steps))
                self.counts[channel] = counts.astype(np.uint32)
        self.exponents[channels] = exponents
