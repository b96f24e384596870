"""Distillation: any student, any teacher, any weighted sum of losses, as one objective."""

from __future__ import annotations

from compress.train.distill.build import build_objective
from compress.train.distill.objective import DistillObjective
from compress.train.distill.own_loop import Distiller, distiller
from compress.train.distill.teacher_ablation import Control, compare_without_teacher, shortened

__all__ = [
    "Control",
    "DistillObjective",
    "Distiller",
    "build_objective",
    "compare_without_teacher",
    "distiller",
    "shortened",
]
