"""A test set held back from data without one: by seed, the same in every process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from compress.data._images import LabelledImages, Subset
from compress.errors import DataError

T = TypeVar("T")
EVERY = 10  # every tenth image is a test image where images are listed in files
TEST = 0.2  # share of images that become the test set where data has none


def held_out(labels: Any, share: float, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return positions of training and of test images, each class with its ``share`` of the test.

    Args:
        labels: Class of each image, (N,); labels of another form are drawn without regard to them.
        share: Of the images that become the test set, in (0, 1).
        seed: Of the draw.

    Raises:
        DataError: a class would be without test or without training images.
    """
    random = np.random.default_rng(seed)
    kinds = np.unique(labels) if getattr(labels, "ndim", 0) == 1 else [None]
    test = []
    for kind in kinds:
        own = np.arange(len(labels)) if kind is None else np.flatnonzero(labels == kind)
        count = max(1, round(share * len(own)))
        if count >= len(own):
            raise DataError(
                f"{len(own)} image{'s' * (len(own) != 1)} of class {kind} are too few to hold back "
                "a test set",
                expected="at least two images of each class, or a test set of its own",
            )
        test.append(random.permutation(own)[:count])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def every_fourth_held_out(images: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Return images to take ranges from, and every fourth, at least the last, to test on."""
    is_test = np.arange(len(images)) % 4 == 3
    is_test[-1] |= not is_test.any()
    train, test = (Subset(images, np.flatnonzero(chosen)) for chosen in (~is_test, is_test))
    return train, test


def with_test(
    train: Sequence[T], validation: Sequence[T], test: Sequence[T]
) -> tuple[Sequence[T], Sequence[T], Sequence[T]]:
    """Return the three with a test set: if there is none, validation, or a tenth of train.

    Raises:
        DataError: there are no images to train or to test on.
    """
    if not test and validation:
        test, validation = validation, ()
    elif not test:
        test, train = train[::EVERY], [each for i, each in enumerate(train) if i % EVERY]
    if not train or not test:
        raise DataError("holds no images for training, or none to test on")
    return train, validation, test
