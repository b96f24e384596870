"""Decoupled knowledge distillation (Zhao et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import OfClasses, Softened, Taps


@dataclass(frozen=True)
class Dkd(Softened):
    """Match the teacher on the true class and among the others, each with its own weight.

    Classic distillation couples the two: the surer the teacher, the less its knowledge of the other
    classes counts. Here ``kd = alpha * target + beta * others``.

    Args:
        alpha: Weight of the binary divergence, true class against the rest.
        beta: Weight of the divergence among the other classes.
        temperature: Logits are divided by it.
        standardize: Compare logits of mean 0 and deviation 1 per image.

    Source: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022,
    https://arxiv.org/abs/2203.08679, equations 5 to 7.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    standardize: bool = False

    weight: ClassVar[float] = 1.0
    of_classes: ClassVar[OfClasses] = "image"

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the weighted sum of both divergences times temperature squared, a scalar."""
        logits = self.logits(student.logits, teacher.logits)
        mine, theirs = (F.log_softmax(part / self.temperature, 1) for part in logits)
        true = F.one_hot(target, mine.shape[1]).bool()
        binary = _divergence(_binary(mine, true), _binary(theirs, true))
        others = _divergence(_others(mine, true), _others(theirs, true))
        return (self.alpha * binary + self.beta * others) * self.temperature**2


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _binary(log_p: Tensor, true: Tensor) -> Tensor:
    """Return log-probabilities of the true class and of all others together, (B, 2)."""
    rest = log_p.masked_fill(true, -torch.inf).logsumexp(1)
    return torch.stack([log_p[true], rest], 1)


def _others(log_p: Tensor, true: Tensor) -> Tensor:
    """Return log-probabilities given that the true class is not it, (B, K - 1)."""
    return F.log_softmax(log_p[~true].view(len(log_p), -1), 1)
