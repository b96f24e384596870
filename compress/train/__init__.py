"""The one training loop, whatever the loss: fine-tuning, distillation, quantization-aware."""

from __future__ import annotations

from compress.head import replace_head
from compress.objective import CrossEntropy, Moment, Objective
from compress.train.loop import TrainResult, train

__all__ = ["CrossEntropy", "Moment", "Objective", "TrainResult", "replace_head", "train"]
