"""Knowledge distillation with softened probabilities (Hinton et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import OfClasses, Softened, Taps


@dataclass(frozen=True)
class Kd(Softened):
    """Match the teacher's softened class probabilities (the classic).

    The divergence is multiplied by the square of the temperature, so that its gradient stays
    comparable to that of the cross-entropy. Maps of logits (B, K, H, W) are matched pixel by pixel,
    and averaged over the pixels.

    Args:
        temperature: Logits are divided by it; higher shows more of the unlikely classes.
        standardize: Compare logits of mean 0 and deviation 1 per image.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015,
    https://arxiv.org/abs/1503.02531, section 2.
    """

    temperature: float = 4.0
    standardize: bool = False

    weight: ClassVar[float] = 1.0
    of_classes: ClassVar[OfClasses] = "pixel"

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return KL(teacher || student) times temperature squared, a scalar."""
        logits = self.logits(_rows(student.logits), _rows(teacher.logits))
        mine, theirs = (F.log_softmax(part / self.temperature, 1) for part in logits)
        kl = F.kl_div(mine, theirs, reduction="batchmean", log_target=True)
        return kl * self.temperature**2


def _rows(logits: Tensor) -> Tensor:
    """Return logits (B, K, ...) as one row for each place, (B * places, K)."""
    return logits if logits.ndim < 3 else logits.movedim(1, -1).flatten(0, -2)
