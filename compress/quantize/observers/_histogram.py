"""Running histogram whose bins double in width when a value falls outside; exact in any order."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BINS = 4096  # on each side of zero; at least half of them lie inside the range seen
_TINIEST = -120  # exponent of the bin width while only zeros were seen
_FLAT = 1e-3  # change of a function, as a share of its largest value, that does not matter


Pointwise = Callable[[NDArray[np.float64]], NDArray[np.float64]]


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
        """Count ``values``.

        Args:
            values: (N,), finite; a sample of what was seen, or all of it.
            low: Smallest value of all that was seen, not of the sample.
            high: Largest.
            times: How often each of ``values`` was seen, (N,); once if absent.
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
