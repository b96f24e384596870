"""Normalized knowledge distillation (Yang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import OfClasses, Softened, Taps


@dataclass(frozen=True)
class Nkd(Softened):
    """Match the true class's probability, and the others after they are made to sum to 1.

    Args:
        gamma: Weight of the part about the other classes.
        temperature: Logits are divided by it in the part about the other classes.
        standardize: Compare logits of mean 0 and deviation 1 per image.

    Source: Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified
    Approach with Normalized Loss and Customized Soft Labels, ICCV 2023,
    https://arxiv.org/abs/2303.13005, equation 6.
    """

    gamma: float = 1.5
    temperature: float = 1.0
    standardize: bool = False

    weight: ClassVar[float] = 1.0
    of_classes: ClassVar[OfClasses] = "image"

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the cross-entropies of both parts, a scalar."""
        z_student, z_teacher = self.logits(student.logits, teacher.logits)
        rows = target[:, None]
        p_true = F.softmax(z_teacher, 1).gather(1, rows)
        true = -(p_true * F.log_softmax(z_student, 1).gather(1, rows)).mean()
        others = ~F.one_hot(target, z_student.shape[1]).bool()
        count, t = len(target), self.temperature
        log_others = F.log_softmax(z_student[others].view(count, -1) / t, 1)
        p_others = F.softmax(z_teacher[others].view(count, -1) / t, 1)
        cross = -(p_others * log_others).sum(1).mean()
        return true + self.gamma * t**2 * cross
