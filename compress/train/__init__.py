"""The one training loop, whatever the loss: fine-tuning, distillation, quantization-aware."""

from __future__ import annotations

from compress.head import replace_head
from compress.train.loop import TrainResult, train
from compress.train.objective import CrossEntropy, Moment, Objective

__all__ = ["CrossEntropy", "Moment", "Objective", "TrainResult", "replace_head", "train"]
