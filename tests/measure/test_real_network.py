"""ResNet-20 on CIFAR-10: the chain from torch to int8 blames the right step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from compress.data import load_data, parse_reference
from compress.export import export_onnx
from compress.measure.compare import compare_artifacts
from compress.models.cifar import CifarResNet
from compress.models.weights import fit, read_weights
from compress.quantize import quantize_onnx

IMAGES = 300
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std it was trained with


@pytest.mark.slow
def test_int8_resnet20_loses_in_quantization_and_not_in_the_engine(tmp_path: Path) -> None:
    root, packed = os.environ.get("COMPRESS_DATA"), os.environ.get("COMPRESS_CIFAR10")
    if not root or not packed:
        pytest.skip("COMPRESS_DATA and COMPRESS_CIFAR10 do not say where the data is")
    data = load_data(parse_reference(f"npz:{packed}", mean=IMAGENET[0], std=IMAGENET[1]))
    model = CifarResNet(20, 10, 3, 16).eval()
    weights = Path(root) / "checkpoints/resnet20-12fca82f.th"
    fit(model, read_weights(weights), where=weights.name)
    fp32 = export_onnx(model, torch.zeros(1, 3, 32, 32), tmp_path / "fp32.onnx")
    images = [batch.numpy() for batch, _ in data.batches("calibration", 64, limit=256)]
    quantize_onnx(fp32, images, tmp_path / "int8.onnx", method="plain")
    found = compare_artifacts(fp32, tmp_path / "int8.onnx", data, bisect=True, limit=IMAGES)
    blame = {link.error: link.added for link in found.steps if link.added is not None}
    assert found.steps[0].worth["top1_pct"] > 88  # 91.73 % on all 10,000
    assert 15 < blame["quantization"].logits.sqnr_db < 60
    assert blame["engine"].logits.sqnr_db > blame["quantization"].logits.sqnr_db
    assert found.answers.agreement_pct > 95
    assert found.bisection is not None
    assert len(found.bisection.tensors) > 20
    whole = compare_artifacts(fp32, fp32, data, bisect=True, limit=IMAGES)
    assert whole.bisection is not None
    assert whole.bisection.first is None
