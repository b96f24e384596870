"""Distillation: any student, any teacher, any weighted sum of losses, as one objective."""

from __future__ import annotations

from compress.train.distill.build import Control, build_objective, does_teacher_help
from compress.train.distill.objective import Distiller, DistillObjective, distiller

__all__ = [
    "Control",
    "DistillObjective",
    "Distiller",
    "build_objective",
    "distiller",
    "does_teacher_help",
]
