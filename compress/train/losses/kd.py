"""Knowledge distillation with softened probabilities (Hinton et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compress.train.losses import OfClasses, Taps, _logits


@dataclass(frozen=True)
class Kd:
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

    def __post_init__(self) -> None:
        _logits.check_temperature(self.temperature)

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return KL(teacher || student) times temperature squared, a scalar."""
        pair = _logits.logit_pair(_rows(student.logits), _rows(teacher.logits), self.standardize)
        return _logits.divergence(*pair, self.temperature)


def _rows(logits: Tensor) -> Tensor:
    """Return logits (B, K, ...) as one row for each place, (B * places, K)."""
    return logits if logits.ndim < 3 else logits.movedim(1, -1).flatten(0, -2)
