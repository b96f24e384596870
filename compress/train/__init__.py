"""The one training loop, whatever the loss: fine-tuning, distillation, quantization-aware."""

from __future__ import annotations

from compress.models.classifier import replace_head
from compress.modules.objective import CrossEntropy, Objective, TrainingProgress
from compress.train.batches import shown_batches
from compress.train.distributed import join_processes
from compress.train.loop import train
from compress.train.state import TrainResult

__all__ = [
    "CrossEntropy",
    "Objective",
    "TrainResult",
    "TrainingProgress",
    "join_processes",
    "replace_head",
    "shown_batches",
    "train",
]
