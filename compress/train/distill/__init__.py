"""Distillation: any student, any teacher, any weighted sum of losses, as one objective."""

from __future__ import annotations

from compress.train.distill.build import build_objective
from compress.train.distill.objective import Distiller, DistillObjective, distiller
from compress.train.distill.teacher_ablation import Control, does_teacher_help

__all__ = [
    "Control",
    "DistillObjective",
    "Distiller",
    "build_objective",
    "distiller",
    "does_teacher_help",
]
