"""The range with the smallest squared error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compress.observers import Histogram

_BINS = 2048  # 8 for each of 256 codes
Error = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # of each share, (K,) of (K,)


@dataclass(frozen=True)
class Mse:
    """Weigh the error of clipping against that of rounding: least mean squared error.

    Both ends are searched together, then one after the other, on a grid that is refined around the
    best, with the rounding of scale and zero point that the runtime does.

    Args:
        smallest: The least share of the range seen that is tried, in (0, 1).
        steps: Candidates on each grid.

    Source: Banner et al., Post-Training 4-bit Quantization of Convolution Networks, NeurIPS 2019,
    https://arxiv.org/abs/1810.05723, section 3; here by search, not for an assumed distribution.
    """

    smallest: float = 0.2
    steps: int = 32

    def __post_init__(self) -> None:
        """Refuse a search that has nothing to search."""
        if not 0 < self.smallest < 1 or self.steps < 3:
            raise ValueError("smallest must be in (0, 1) and steps at least 3")

    def __call__(self, seen: Histogram, *, symmetric: bool) -> tuple[float, float]:
        """Return the range of least squared error."""
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        if low == high:
            return low, high
        centers, counts = seen.bins(_BINS)
        if symmetric:
            largest = max(-low, high)
            shares = self._search(lambda s: symmetric_error(centers, counts, largest * s))
            return -largest * shares, largest * shares
        both = self._search(partial(_share_error, centers, counts, low, high))
        share_low, share_high = both, both
        for _ in range(3 if low < 0 < high else 0):
            bottom = low * share_low
            share_high = self._search(partial(_high_error, centers, counts, bottom, high))
            top = high * share_high
            share_low = self._search(partial(_low_error, centers, counts, low, top))
        return low * share_low, high * share_high

    def _search(self, error: Error) -> float:
        """Return the share in [smallest, 1] with the least error."""
        step = (1 - self.smallest) / (self.steps - 1)
        shares = np.linspace(self.smallest, 1, self.steps)
        best = float(shares[np.argmin(error(shares))])
        fine = np.clip(best + np.linspace(-step, step, self.steps), self.smallest, 1)
        return float(fine[np.argmin(error(fine))])


def symmetric_error(
    centers: NDArray[np.float64], counts: NDArray[np.float64], limits: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the summed squared error, (K,), of int8 with zero point 0 for each limit, (K,)."""
    scale = (limits / 127)[:, None]
    back = np.clip(np.rint(centers / scale), -128, 127) * scale
    return np.asarray(((back - centers) ** 2) @ counts)


def affine_error(
    centers: NDArray[np.float64],
    counts: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the summed squared error, (K,), of uint8 between ``low`` and ``high``, (K,)."""
    scale = ((high - low) / 255)[:, None]
    zero = np.rint(-low[:, None] / scale)
    back = (np.clip(np.rint(centers / scale) + zero, 0, 255) - zero) * scale
    return np.asarray(((back - centers) ** 2) @ counts)


def _share_error(
    centers: NDArray[np.float64],
    counts: NDArray[np.float64],
    low: float,
    high: float,
    shares: NDArray[np.float64],
) -> NDArray[np.float64]:
    return affine_error(centers, counts, low * shares, high * shares)


def _high_error(
    centers: NDArray[np.float64],
    counts: NDArray[np.float64],
    low: float,
    high: float,
    shares: NDArray[np.float64],
) -> NDArray[np.float64]:
    return affine_error(centers, counts, np.full_like(shares, low), high * shares)


def _low_error(
    centers: NDArray[np.float64],
    counts: NDArray[np.float64],
    low: float,
    high: float,
    shares: NDArray[np.float64],
) -> NDArray[np.float64]:
    return affine_error(centers, counts, low * shares, np.full_like(shares, high))
