"""Correlation with the teacher within images and within classes (Huang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import OfClasses, Softened, Taps


@dataclass(frozen=True)
class Dist(Softened):
    """Match the teacher's preferences among classes and among images, not its probabilities.

    One minus Pearson's correlation, over the classes of each image and over the images of each
    class; strong teachers, whose probabilities a small student cannot reach, hurt less.

    Args:
        beta: Weight of the correlation over classes, within an image.
        gamma: Weight of the correlation over images, within a class.
        temperature: Logits are divided by it.
        standardize: Compare logits of mean 0 and deviation 1 per image.

    Source: Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022,
    https://arxiv.org/abs/2205.10536, equations 6 to 9.
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0
    standardize: bool = False

    weight: ClassVar[float] = 2.0
    of_classes: ClassVar[OfClasses] = "image"
    relational: ClassVar[bool] = True

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the weighted sum of both distances times temperature squared, a scalar."""
        logits = self.logits(student.logits, teacher.logits)
        p, q = (F.softmax(part / self.temperature, 1) for part in logits)
        within_images = (1 - _correlation(p, q)).mean()
        within_classes = (1 - _correlation(p.T, q.T)).mean()
        total = self.beta * within_images + self.gamma * within_classes
        return total * self.temperature**2


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of ``a`` with that of ``b``, (rows,)."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)
