"""The widest range whose squared error is near the smallest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compress.quantize.observers import Histogram, Pointwise

_BINS = 2048  # 8 for each of 256 codes
_WIDER = np.linspace(0, 1, 33)  # of the way from the best range to all that was seen
Error = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # of each candidate, (K,) of (K,)


@dataclass(frozen=True)
class Mse:
    """Weigh the error of clipping against that of rounding: nearly least mean squared error.

    Of the ranges whose error is within ``slack`` of the least, the widest: rounding moves values
    up and down and averages out in the next layer, clipping moves all to one side and does not;
    and images that were not seen have larger values. Both ends are searched together, then one
    after the other, on a grid that is refined around the best, with the rounding of scale and zero
    point that the runtime does.

    Args:
        smallest: The least share of the range seen that is tried, in (0, 1).
        steps: Candidates on each grid.
        slack: By how much the error may exceed the least, as a share of it, for a wider range.

    Source: Banner et al., Post-Training 4-bit Quantization of Convolution Networks, NeurIPS 2019,
    https://arxiv.org/abs/1810.05723, section 3; here by search, not for an assumed distribution.
    """

    smallest: float = 0.2
    steps: int = 32
    slack: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.smallest < 1 or self.steps < 3 or not self.slack >= 0:
            raise ValueError("smallest must be in (0, 1), steps at least 3, slack at least 0")

    def __call__(self, seen: Histogram, *, symmetric: bool) -> tuple[float, float]:
        """Return the widest range of nearly least squared error."""
        low, high = seen.trimmed(min(seen.low, 0.0), max(seen.high, 0.0))
        if low == high:
            return low, high
        centers, counts = seen.bins(_BINS)
        noise = Noise(centers, counts, seen.through)
        if symmetric:
            limit = self._search(max(-low, high), noise.symmetric)
            ends = limit + _WIDER * (max(-low, high) - limit)
            limit = float(ends[_farthest(noise.symmetric(ends), self.slack)])
            return -limit, limit
        share = self._search(1.0, lambda s: noise.affine(low * s, high * s))
        bottom, top = low * share, high * share
        for _ in range(3 if low < 0 < high else 0):
            before = bottom, top
            top = self._search(high, partial(noise.affine, bottom))
            bottom = self._search(low, partial(noise.affine, high=top))
            if (bottom, top) == before:
                break
        bottoms, tops = bottom + _WIDER * (low - bottom), top + _WIDER * (high - top)
        at = _farthest(noise.affine(bottoms, tops), self.slack)
        return float(bottoms[at]), float(tops[at])

    def _search(self, end: float, error: Error) -> float:
        """Return what has the least error of [smallest * end, end]."""
        step = (1 - self.smallest) / (self.steps - 1)
        shares = np.linspace(self.smallest, 1, self.steps)
        best = float(shares[np.argmin(error(end * shares))])
        fine = np.clip(best + np.linspace(-step, step, self.steps), self.smallest, 1)
        return float(end * fine[np.argmin(error(end * fine))])


def _farthest(errors: NDArray[np.float64], slack: float) -> int:
    """Return the last of candidates, (K,), whose error is hardly larger than the first's."""
    return int(np.flatnonzero(errors <= (1 + slack) * errors[0])[-1])


@dataclass(frozen=True)
class Noise:
    """The squared error that quantization makes of counted values."""

    centers: NDArray[np.float64]  # values, (N,)
    counts: NDArray[np.float64]  # how often each was seen, (N,)
    # The function behind which the error is taken; None = that of the values
    through: Pointwise | None = None

    def symmetric(self, limits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the summed error, (K,), of int8 with zero point 0 for each limit, (K,)."""
        return self._of(limits / 127, np.zeros(1), -128)

    def affine(
        self, low: NDArray[np.float64] | float, high: NDArray[np.float64] | float
    ) -> NDArray[np.float64]:
        """Return the summed error, (K,), of uint8 between ``low`` and ``high``, (K,) or one."""
        scale = np.atleast_1d((high - low) / 255)
        return self._of(scale, np.rint(-np.atleast_1d(low) / scale), 0)

    def _of(
        self, scale: NDArray[np.float64], zero: NDArray[np.float64], lowest: int
    ) -> NDArray[np.float64]:
        zero, scale = zero[:, None], scale[:, None]
        codes = self.centers / scale
        np.rint(codes, out=codes)  # in place: new memory would cost more than the arithmetic
        codes += zero
        np.clip(codes, lowest, lowest + 255, out=codes)
        if self.through is None:
            codes -= zero
            codes *= scale
            codes -= self.centers
            return np.asarray(np.square(codes, out=codes) @ self.counts)
        # of each code once: there are fewer of them
        values = self.through((np.arange(lowest, lowest + 256) - zero) * scale)
        back = np.take_along_axis(values, (codes - lowest).astype(np.intp), 1)
        return np.asarray(np.square(back - self.through(self.centers)) @ self.counts)
