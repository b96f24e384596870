"""How good a network is on images held back from training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data import Dataset
from compress.outputs import logits_of
from compress.train.precision import autocast
from compress.train.processes import Processes

BATCH_SIZE = 256  # at most


@dataclass(frozen=True)
class Score:
    """Accuracy and loss on validation images."""

    top1_pct: float
    loss: float
    images: int


@torch.no_grad()
def validate(
    model: nn.Module, dataset: Dataset, processes: Processes, precision: str, at_once: int
) -> Score | None:
    """Return the network's score on "validation", shared among the processes.

    The network's modes are left as found. Returns None where no images are held back. At most
    ``at_once`` images are computed together: what training does, validation has memory for.
    """
    images = dataset.splits.get("validation")
    if images is None or not len(images):
        return None
    modes = {module: module.training for module in model.modules()}
    sums = torch.zeros(2, dtype=torch.float64, device=processes.device)
    try:
        model.eval()
        count = min(BATCH_SIZE, at_once)
        starts = range(0, len(images), count)
        for start in list(starts)[processes.rank :: processes.world]:
            indices = np.arange(start, min(start + count, len(images)))
            target = torch.from_numpy(images.labels[indices]).to(processes.device)
            inputs = dataset.normalize(images.take(indices).to(processes.device))
            with autocast(precision, processes.device):
                logits = logits_of(model(inputs)).float()
            sums += _sums(logits, target)
    finally:
        for module, training in modes.items():
            module.training = training
    right, loss = processes.sum(sums).tolist()
    return Score(100 * right / len(images), loss / len(images), len(images))


def _sums(logits: Tensor, target: Tensor) -> Tensor:
    right = (logits.argmax(1) == target).sum()
    return torch.stack([right.double(), F.cross_entropy(logits, target, reduction="sum").double()])
