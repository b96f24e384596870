"""Regression of the teacher's raw outputs, whatever they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress.train.losses import Taps


@dataclass(frozen=True)
class Mse:
    """Match the teacher's raw outputs: squared difference over their variance in the batch.

    For outputs that are no logits of one class: restored images, embeddings, several labels. A
    loss of 1 is that of the best constant.

    Source: Ba and Caruana, Do Deep Nets Really Need to be Deep?, NeurIPS 2014,
    https://arxiv.org/abs/1312.6184, equation 3, divided by the variance.
    """

    weight: ClassVar[float] = 1.0

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the relative squared difference, a scalar."""
        mine, theirs = student.logits.float(), teacher.logits.float()
        if mine.shape != theirs.shape:
            raise ValueError(f"outputs of shapes {tuple(mine.shape)} and {tuple(theirs.shape)}")
        spread = theirs.var(correction=0).clamp_min(1e-12)
        return (mine - theirs).square().mean() / spread
