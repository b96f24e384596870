"""Teacher ablation: two short trainings of the student, with the teacher and without."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from compress.errors import TrainingError
from compress.pipeline.context import Job
from compress.recipe.settings import DistillSettings
from compress.train import distill, train


def does_teacher_help(
    job: Job, student: nn.Module, teacher: Any, settings: DistillSettings
) -> distill.Control:
    """Train a copy of the student briefly with the teacher, another without, and compare them.

    Raises:
        TrainingError: there are no validation images to compare them on.
    """
    images = len(job.dataset.splits.get("validation", ()))
    if not images:
        raise TrainingError(
            "without validation images, nothing tells whether the teacher helps",
            where="distill.control",
            fix="Hold some back: data.validation: 0.1",
        )

    def top1_pct(with_teacher: bool, epochs: int) -> float:
        model, short = copy.deepcopy(student), distill.shortened(settings, epochs)
        objective = (
            distill.build_objective(model, teacher, job.dataset, short) if with_teacher else None
        )
        result = train(model, job.dataset, short, objective=objective, seed=job.recipe.seed)
        return float(result.last_top1_pct or 0.0)

    return distill.compare_without_teacher(top1_pct, epochs=settings.epochs, images=images)
