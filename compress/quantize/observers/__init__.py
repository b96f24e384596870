"""Observers: from the histogram of a tensor to the range it is quantized to."""

from __future__ import annotations

from typing import Protocol

from compress.quantize.observers._histogram import BINS, ChannelHistogram, Histogram, Pointwise

__all__ = ["BINS", "ChannelHistogram", "Histogram", "Observer", "Pointwise"]


class Observer(Protocol):
    """What a file of this folder holds: a dataclass whose fields are its options."""

    def __call__(self, seen: Histogram, *, symmetric: bool) -> tuple[float, float]:
        """Return the range, low <= 0 <= high, that is kept of a tensor.

        Args:
            seen: The values of the calibration images.
            symmetric: The range must be [-limit, limit], for 127 codes on each side of zero;
                otherwise 256 codes lie between low and high.
        """
