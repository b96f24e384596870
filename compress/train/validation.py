"""Accuracy on validation images."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from compress import evaluate
from compress.data import Dataset
from compress.modules import evaluating
from compress.modules.outputs import logits_of
from compress.tasks import Task, values_of
from compress.train.context import autocast
from compress.train.distributed import Processes

BATCH_SIZE = 256  # at most


Score = tuple[float, float | None]  # the metric on validation images, and the loss where known


def validate_task(model: nn.Module, dataset: Dataset, task: Task) -> Score | None:
    """Return the task's primary metric on "validation"; None where no images are held back."""
    if not task.kinds or not len(dataset.splits.get("validation", ())):
        return None
    batches = dataset.batches("validation", evaluate.BATCH)
    _, scores = evaluate.predictions_of(model, task, dataset, batches)
    return values_of(task, scores)[task.primary], None


def primary_value(model: nn.Module, dataset: Dataset, task: Task) -> float | None:
    """Return the primary metric on "validation", percent of top-1 where one class is told.

    None where no images are held back, or they have no labels.
    """
    if not task.kinds or not len(dataset.splits.get("validation", ())):
        return None
    if task.tells_classes:
        predictions = evaluate.predict(model, dataset.batches("validation"))
        return float(100 * predictions.correct.mean())
    score = validate_task(model, dataset, task)
    return None if score is None else score[0]


@torch.no_grad()
def validate(
    model: nn.Module, dataset: Dataset, processes: Processes, precision: str, at_once: int
) -> Score | None:
    """Return top-1 in percent and cross-entropy on "validation", shared among the processes.

    The network's modes are left as found. Returns None where no images are held back. At most
    ``at_once`` images are computed together: what training does, validation has memory for.
    """
    images = dataset.splits.get("validation")
    if images is None or not len(images):
        return None
    sums = torch.zeros(2, dtype=torch.float64, device=processes.device)
    with evaluating(model):
        count = min(BATCH_SIZE, at_once)
        starts = range(0, len(images), count)
        for start in list(starts)[processes.rank :: processes.world]:
            indices = np.arange(start, min(start + count, len(images)))
            target = torch.from_numpy(images.labels[indices]).to(processes.device)
            inputs = dataset.normalize(images.take(indices).to(processes.device))
            with autocast(precision, processes.device):
                logits = logits_of(model(inputs)).float()
            right = (logits.argmax(1) == target).sum().double()
            loss = F.cross_entropy(logits, target, reduction="sum").double()
            sums += torch.stack([right, loss])
    correct, total = processes.sum(sums).tolist()
    return 100 * correct / len(images), total / len(images)
