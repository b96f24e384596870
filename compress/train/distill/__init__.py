"""Distillation: any student, any teacher, any weighted sum of losses, as one objective."""

from __future__ import annotations

from compress.distill.build import build_objective
from compress.distill.control import Control, compare_without_teacher, shortened
from compress.distill.objective import DistillObjective
from compress.distill.own_loop import Distiller, distiller

__all__ = [
    "Control",
    "DistillObjective",
    "Distiller",
    "build_objective",
    "compare_without_teacher",
    "distiller",
    "shortened",
]
