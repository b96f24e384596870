"""Prune a classifier, train it in a plain PyTorch loop with the original as teacher, export, int8.

python examples/plain_loop.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import compress
from compress.data import Dataset, load_data, parse_reference

REFERENCE = "compress.models.cifar:resnet8"
OPTIONS = {"in_channels": 1}
LOSSES = [{"kd": {"temperature": 4.0}}, {"mgd": {"layers": "auto"}}]


def fit(model: nn.Module, dataset: Dataset, epochs: int, taught: Any = None) -> None:
    """Train ``model`` in place, as anybody would; with a distiller, its losses are added."""
    extra = [] if taught is None else list(taught.parameters())
    optimizer = torch.optim.AdamW([*model.parameters(), *extra], lr=3e-3)
    for _ in range(epochs):
        model.train()
        for images, labels in dataset.batches("train", 64):
            loss = F.cross_entropy(model(images), labels)
            if taught is not None:
                loss = loss + taught.loss(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def main(out: Path, data: str, epochs: int) -> None:
    """Carry it out and print the accuracy of each network."""
    dataset = load_data(parse_reference(data))
    original = compress.load_model(REFERENCE, num_classes=10, options=OPTIONS)
    fit(original, dataset, epochs)
    shown = list(dataset.batches("calibration"))
    small, plan = compress.prune(original, dataset.example, batches=shown, keep_macs=0.5)
    with compress.distiller(small, original, LOSSES, example=dataset.example) as taught:
        fit(small, dataset, epochs, taught)
    compress.save_model(small, out / "small", plan=plan, reference=REFERENCE, options=OPTIONS)
    fp32 = compress.export_onnx(small, dataset.example, out / "model.onnx")
    compress.quantize_onnx(fp32, [images.numpy() for images, _ in shown], out / "int8.onnx")
    with compress.open_session(out / "int8.onnx") as session:
        for name, network in (("original", original), ("pruned", small), ("int8", session)):
            found = compress.evaluate(network, dataset, "classification").metrics["top1"]
            print(f"{name}: {found.value:.2f} %, 95 % interval {found.ci95}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "digits", epochs=5)
