"""The 1,797 handwritten digits that scikit-learn bundles, 8 x 8 pixels, grey."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.data import Source
from compress.data._images import from_array
from compress.data._pictures import ImageSize

TEST_SHARE = 5  # every fifth image is a test image


@dataclass(frozen=True)
class Digits:
    """The 1,797 handwritten digits that scikit-learn bundles: 10 classes, 8 x 8 pixels, grey.

    Every fifth image is a test image. Nothing is downloaded.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """

    image_size: ImageSize | None = None
    channels: int | None = None

    def load(self) -> Source:
        """Return the images, scaled from 0..16 to 0..255."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
        labels = digits.target.astype(np.int64)
        is_test = np.arange(len(labels)) % TEST_SHARE == 0
        train, test = (
            from_array(pixels[chosen], labels[chosen], size=self.image_size, channels=self.channels)
            for chosen in (~is_test, is_test)
        )
        return Source(train, test, tuple(str(c) for c in range(10)), mean=(0.305,), std=(0.376,))
