"""Images of the report: which of them are explained."""

from __future__ import annotations

import numpy as np
import torch

from compress.evaluate import Predictions
from compress.pipeline.report_images import explained_samples


def predictions(answers, labels, size: float = 2.0) -> Predictions:
    logits = np.zeros((len(answers), 3), np.float32)
    logits[np.arange(len(answers)), answers] = size
    return Predictions(logits, np.array(labels))


class Sixteen:
    """A dataset of sixteen test images whose first pixel is their index."""

    def __init__(self) -> None:
        self.splits = {"test": self}

    def take(self, indices):
        images = torch.zeros(len(indices), 1, 2, 2, dtype=torch.uint8)
        images[:, 0, 0, 0] = torch.as_tensor(np.asarray(indices), dtype=torch.uint8)
        return images

    def normalize(self, images):
        return images.float() / 255


def test_samples_are_flipped_images_first_and_others_spread_over_the_rest():
    before = predictions([0] * 16, [0] * 16)
    after = predictions([0] * 14 + [1, 1], [0] * 16)
    chosen = explained_samples(Sixteen(), before, after, 8)
    assert list(chosen.indices[:2]) == [14, 15]
    assert len(set(chosen.indices)) == 8
    assert min(chosen.indices) == 0
    np.testing.assert_array_equal(chosen.pictures[:, 0, 0, 0], chosen.indices)
    assert chosen.images.shape == (8, 1, 2, 2)


def test_at_most_half_of_the_samples_are_flipped_ones():
    before, after = predictions([0] * 16, [0] * 16), predictions([1] * 16, [0] * 16)
    assert len(explained_samples(Sixteen(), before, after, 6).indices) == 6
    same = explained_samples(Sixteen(), before, before, 99)
    assert list(same.indices) == list(range(16))
