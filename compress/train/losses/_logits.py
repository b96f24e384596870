"""What the losses on logits share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def standardized(logits: Tensor) -> Tensor:
    """Return logits with mean 0 and standard deviation 1 per image, (B, K).

    Then only the shape of an answer counts, not its scale.

    Source: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024,
    https://arxiv.org/abs/2403.01427, algorithm 1.
    """
    centred = logits - logits.mean(1, keepdim=True)
    return centred / (logits.std(1, keepdim=True) + 1e-7)


def logit_pair(student: Tensor, teacher: Tensor, standardize: bool) -> tuple[Tensor, Tensor]:
    """Return both logits in float32, standardized where asked for, (B, K) each."""
    student, teacher = student.float(), teacher.float()
    if standardize:
        return standardized(student), standardized(teacher)
    return student, teacher


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) of softened logits times temperature squared, a scalar.

    Args:
        student: Logits, (B, K).
        teacher: Logits, (B, K).
        temperature: What logits are divided by, > 0.
    """
    log_student = F.log_softmax(student / temperature, 1)
    log_teacher = F.log_softmax(teacher / temperature, 1)
    kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return kl * temperature**2


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
