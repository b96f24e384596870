"""Observers: from the histogram of a tensor to the range it is quantized to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BINS = 4096  # on each side of zero; at least half of them lie inside the range seen
_TINIEST = -120  # exponent of the bin width while only zeros were seen
_FLAT = 1e-3  # change of a function, as a share of its largest value, that does not matter

Pointwise = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Observer(Protocol):
    """What a file of this folder holds: a dataclass whose fields are its options."""

    def __call__(self, seen: Histogram, *, symmetric: bool) -> tuple[float, float]:
        """Return the range, low <= 0 <= high, that is kept of a tensor.

        Args:
            seen: The values of the calibration images.
            symmetric: The range must be [-limit, limit], for 127 codes on each side of zero;
                otherwise 256 codes lie between low and high.
        """


class Histogram:
    """How often values of one tensor were seen, in bins of width 2**exponent around zero.

    Bin t holds values v with trunc(v / width) = t, so bin 0 is twice as wide, and joining bins 2t
    and 2t + 1 gives exactly the bins of twice the width: the result does not depend on the order in
    which values came. Smallest and largest value are exact.

    Args:
        through: The pointwise function that alone reads the tensor, such as hard-swish: an error
            counts as what the function makes of it. None where values count themselves.
    """

    def __init__(self, through: Pointwise | None = None) -> None:
        self.through = through
        self.counts: NDArray[np.int64] = np.zeros(2 * BINS - 1, np.int64)
        self.exponent = _TINIEST
        self.low, self.high = math.inf, -math.inf

    def add(
        self,
        values: NDArray[np.floating],
        low: float,
        high: float,
        times: NDArray[np.int64] | None = None,
    ) -> None:
        """Count ``values``, (N,), finite, a sample of what was seen or all of it.

        ``low`` and ``high`` are the smallest and largest value of all that was seen. Each value was
        seen ``times`` often, (N,); once if absent.
        """
        self.see(low, high)
        largest = max(-low, high)
        if largest == 0:
            self.counts[BINS - 1] += values.size if times is None else times.sum()
            return
        if largest >= BINS * 2.0**self.exponent:
            self._widen(max(math.frexp(largest / BINS)[1], _TINIEST + 1))
        index = (values * np.float32(2.0**-self.exponent)).astype(np.int64)
        index += BINS - 1
        self.counts += np.bincount(index, times, 2 * BINS - 1).astype(np.int64)

    def see(self, low: float, high: float) -> None:
        """Note the smallest and the largest value of more data, without counting it."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    @property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    def bins(self, count: int | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return centres and counts of the bins that hold values, in rising order.

        Args:
            count: Join neighbours into at most so many of one width; all bins if absent.
        """
        filled = np.flatnonzero(self.counts)
        counts = self.counts[filled].astype(np.float64)
        steps = filled - (BINS - 1)
        width = 2.0**self.exponent
        centers = np.clip((steps + 0.5 * np.sign(steps)) * width, self.low, self.high)
        if count is None or len(filled) <= count:
            return centers, counts
        coarse = (filled - filled[0]) // -(-(filled[-1] - filled[0] + 1) // count)
        edges = np.flatnonzero(np.diff(coarse, prepend=-1))
        joined = np.add.reduceat(counts, edges)
        return np.add.reduceat(centers * counts, edges) / joined, joined

    def trimmed(self, low: float, high: float) -> tuple[float, float]:
        """Return the range without ends at which ``through`` is flat; it still holds zero."""
        if self.through is None or low == high:
            return low, high
        grid = np.linspace(low, high, 2048)
        values = self.through(grid)
        tolerance = _FLAT * np.abs(values).max()
        ends = []
        for points, made in ((grid, values), (grid[::-1], values[::-1])):
            differs = np.abs(made - made[0]) > tolerance
            ends.append(float(points[max(int(np.argmax(differs)) - 1, 0)]))
        return min(ends[0], 0.0), max(ends[1], 0.0)

    def magnitudes(self) -> tuple[NDArray[np.float64], float]:
        """Return counts of absolute values, (BINS,), and the width of a bin."""
        positive = self.counts[BINS - 1 :].astype(np.float64)
        positive[1:] += self.counts[BINS - 2 :: -1]
        return positive, 2.0**self.exponent

    def _widen(self, exponent: int) -> None:
        factor = 2 ** min(exponent - self.exponent, 14)
        if self.exponent == _TINIEST:
            factor = 2**14  # all of it is zero
        steps = np.arange(1 - BINS, BINS)
        joined = np.sign(steps) * (np.abs(steps) // factor) + BINS - 1
        counts = np.bincount(joined, weights=self.counts, minlength=2 * BINS - 1)
        self.counts = counts.astype(np.int64)
        self.exponent = exponent


_CHANNEL_BINS = 128  # on each side of zero; at least half of them lie inside the range seen
_PARTS = 8  # of a bin, over which what it holds is spread


class ChannelHistogram:
    """How often values of each channel were seen, in bins of a width of its own.

    As ``Histogram``, with fewer bins: what a tensor is once its channels are divided by factors
    need not be measured, as it follows from what they were.
    """

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros(
            (channels, 2 * _CHANNEL_BINS - 1), np.uint32
        )  # a kilobyte for each channel
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
        """Count ``values``, (N,), finite, of these channels, (N,): a sample of what was seen.

        ``low`` and ``high``, (C,), are the smallest and largest value of each channel in all of it.
        """
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        wanted = np.frexp(np.maximum(self.largest, 2.0**-100) / _CHANNEL_BINS)[1]
        grown = np.flatnonzero(wanted > self.exponents)
        if grown.size:
            self._widen(grown, wanted[grown])
        width = np.exp2(-self.exponents.astype(np.float32))
        index = (values * width[channels]).astype(np.int64)
        index += channels * self.counts.shape[1] + _CHANNEL_BINS - 1
        found = np.bincount(index, minlength=self.counts.size)
        self.counts += found.reshape(self.counts.shape).astype(np.uint32)

    def divided(self, factors: NDArray[np.float64], through: Pointwise | None = None) -> Histogram:
        """Return the histogram of the tensor, each channel divided by a positive factor, (C,)."""
        found = Histogram(through)
        channels, bins = np.nonzero(self.counts)
        steps, times = bins - (_CHANNEL_BINS - 1), self.counts[channels, bins].astype(np.int64)
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
        steps = np.arange(1 - _CHANNEL_BINS, _CHANNEL_BINS)
        for channel, exponent in zip(channels, exponents, strict=True):
            if self.counts[channel].any():
                factor = 2 ** min(int(exponent) - int(self.exponents[channel]), 8)
                joined = np.sign(steps) * (np.abs(steps) // factor) + _CHANNEL_BINS - 1
                counts = np.bincount(joined, self.counts[channel], len(steps))
                self.counts[channel] = counts.astype(np.uint32)
        self.exponents[channels] = exponents
