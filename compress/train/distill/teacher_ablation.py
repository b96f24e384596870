"""Teacher ablation: a short training with the teacher against the same without."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from compress.data import Dataset
from compress.errors import TrainingError
from compress.recipe.settings import DistillSettings
from compress.train import train
from compress.train.distill.build import build_objective

SHARE = 0.2  # of the epochs, for each of the two trainings
CONFIDENCE_Z = 1.96  # 95 %


@dataclass(frozen=True)
class Control:
    """What two short trainings, alike but for the teacher, reached on validation images."""

    with_teacher_top1_pct: float
    without_teacher_top1_pct: float
    images: int  # validation images
    epochs: int  # of each training

    @property
    def difference_ci95(self) -> tuple[float, float]:
        """Interval of what the teacher gains, in points of top-1; unpaired, so rather wide."""
        shares = (self.with_teacher_top1_pct / 100, self.without_teacher_top1_pct / 100)
        error = math.sqrt(sum(p * (1 - p) for p in shares) / self.images)
        gain = 100 * (shares[0] - shares[1])
        return gain - 100 * CONFIDENCE_Z * error, gain + 100 * CONFIDENCE_Z * error

    @property
    def verdict(self) -> str:
        """One of "helps", "hurts" and "no difference seen"."""
        low, high = self.difference_ci95
        if low > 0:
            return "helps"
        return "hurts" if high < 0 else "no difference seen"

    def __str__(self) -> str:
        """Return the finding in one sentence."""
        return (
            f"control of {self.epochs} epochs: {self.with_teacher_top1_pct:.2f} % with the "
            f"teacher, {self.without_teacher_top1_pct:.2f} % without, on {self.images} images: "
            f"{self.verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return this finding as JSON-able data."""
        return {
            **asdict(self),
            "difference_ci95": list(self.difference_ci95),
            "verdict": self.verdict,
        }


def shortened(settings: DistillSettings, epochs: int) -> DistillSettings:
    """Return ``settings`` with their whole schedule squeezed into so many epochs."""
    ratio = epochs / max(1, settings.epochs)
    return settings.model_copy(
        update={
            "epochs": epochs,
            "warmup_epochs": settings.warmup_epochs * ratio,
            "loss_warmup_epochs": settings.loss_warmup_epochs * ratio,
            "step_epochs": tuple(epoch * ratio for epoch in settings.step_epochs),
            "cache_teacher": False,
            "track": None,
        }
    )


def does_teacher_help(
    student: nn.Module, teacher: Any, dataset: Dataset, settings: DistillSettings, *, seed: int = 0
) -> Control:
    """Train a copy of the student briefly with the teacher, another without, and compare them.

    Args:
        student: Not modified.
        teacher: As ``build_objective`` takes it.
        dataset: With validation images, which both are compared on.
        settings: Of the training that is to be judged; its schedule is squeezed.
        seed: Of both trainings.

    Raises:
        TrainingError: there are no validation images to compare them on.
    """
    images = len(dataset.splits.get("validation", ()))
    if not images:
        raise TrainingError(
            "without validation images, nothing tells whether the teacher helps",
            where="distill.control",
            fix="Hold some back: data.validation: 0.1",
        )
    short = shortened(settings, max(1, round(SHARE * settings.epochs)))

    def top1_pct(*, with_teacher: bool) -> float:
        model = copy.deepcopy(student)
        objective = build_objective(model, teacher, dataset, short) if with_teacher else None
        result = train(model, dataset, short, objective=objective, seed=seed)
        return float(result.last_top1_pct or 0.0)

    found = top1_pct(with_teacher=True), top1_pct(with_teacher=False)
    return Control(*found, images, short.epochs)
