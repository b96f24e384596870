"""Real networks as NNCF writes them by default: what is called fixable is fixed."""

from __future__ import annotations

import os
import warnings

import onnx
import pytest
import torch

import compress
from compress.qdq.lint import TARGETS, fix_onnx, load_onnx

SIDE = 96


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """MobileNetV3-small with squeeze-excite and hard-swish, quantized by NNCF's defaults."""
    from torchvision.models import mobilenet_v3_small

    folder = tmp_path_factory.mktemp("nncf")
    torch.manual_seed(0)
    images = torch.randn(16, 1, 3, SIDE, SIDE)
    model = mobilenet_v3_small(weights=None).eval()
    compress.export_onnx(model, images[0], folder / "float.onnx")
    os.environ["NNCF_CI"] = "1"  # no telemetry
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nncf

        data = nncf.Dataset([{"input": each.numpy()} for each in images])
        graph = nncf.quantize(onnx.load(folder / "float.onnx"), data, subset_size=16)
    onnx.save(graph, folder / "int8.onnx")
    return folder / "int8.onnx"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_called_fixable_is_fixed_and_the_rest_says_what_to_do(quantized, target, tmp_path):
    before = compress.lint_onnx(quantized, target=target)
    assert any(finding.fixable for finding in before)
    left = fix_onnx(quantized, tmp_path / "fixed.onnx", target)
    assert [finding for finding in left if finding.fixable] == []
    assert all("quantize again" in finding.message for finding in left), left
    onnx.checker.check_model(load_onnx(tmp_path / "fixed.onnx"))
    if target == "tensorrt":  # NNCF halves the range of the first layer's weights
        assert [finding.rule for finding in left] == ["weight-half-range"]
