"""Prune a segmentation network of torchvision and compare it with the original, with intervals.

python examples/segmentation.py MASKS OUT
MASKS holds train/images, train/masks and the same in test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import compress
import compress.tasks
from compress.data import Dataset, load_data
from compress.recipe.settings import DataSettings

REFERENCE = "torchvision:lraspp_mobilenet_v3_large"


def fit(model: nn.Module, dataset: Dataset, task: compress.tasks.Task, epochs: int) -> None:
    """Train ``model`` in place with the loss of the task."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        model.train()
        for images, masks in dataset.batches("train", 8):
            loss = task.loss(model, images, masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def main(masks: Path, out: Path, size: int, classes: int, void: int, epochs: int) -> None:
    """Carry it out and print mIoU, and what changed on the same images."""
    torch.manual_seed(0)
    names = [f"class {number}" for number in range(classes)]
    settings = {"root": str(masks), "image_size": size, "calibration": 64}
    dataset = load_data(
        DataSettings(name="masks", options={"void": void, "classes": names}, **settings)
    )
    task = compress.load_task("segmentation", classes=dataset.classes)
    options = {"weights_backbone": None}
    original = compress.load_model(REFERENCE, num_classes=classes, options=options)
    fit(original, dataset, task, epochs)
    shown = list(dataset.batches("calibration", 8))
    small, plan = compress.prune(original, dataset.example, batches=shown, keep_macs=0.5)
    fit(small, dataset, task, epochs)
    compress.save_model(small, out, plan=plan, reference=REFERENCE, options=options)
    before, after = (compress.evaluate(net, dataset, task) for net in (original, small))
    change = compress.tasks.compare_metrics(task, before.scores, after.scores)["miou"]
    print(f"mIoU {before.metrics['miou'].value:.1f} -> {after.metrics['miou'].value:.1f} %")
    print(f"change {change.value:+.1f} (95 % {change.ci95}): {change.verdict}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), size=128, classes=11, void=11, epochs=5)
