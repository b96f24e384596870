"""The one training loop, whatever the loss: fine-tuning, distillation, quantization-aware."""

from __future__ import annotations

from compress.modules.objective import CrossEntropy
from compress.train.batches import shown_batches
from compress.train.loop import train
from compress.train.state import TrainResult

__all__ = ["CrossEntropy", "TrainResult", "shown_batches", "train"]
