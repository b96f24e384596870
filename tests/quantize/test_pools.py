"""Average pools at the edge of an image: the runtimes' own int8 kernels against the float graph."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import compress
from compress.graph.preprocess import prepare
from compress.quantize.sessions import sqnr_db

POOLS = list(itertools.product((2, 3), (1, 2), (0, 1), (False, True)))


class Pooled(nn.Module):
    """Pools what may be negative: a code of 0 is not a value of 0."""

    def __init__(self, kernel: int, stride: int, padding: int, ceil: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.pool(self.conv(x)))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil"), POOLS)
def test_a_runtime_pools_integers_as_floats(kernel, stride, padding, ceil, target, tmp_path):
    pytest.importorskip(target)
    if (kernel, stride, padding, ceil, target) == (3, 2, 1, True, "openvino"):
        pytest.skip("OpenVINO divides the last windows wrongly in the fp32 graph too")
    torch.manual_seed(0)
    network = Pooled(kernel, stride, padding, ceil).eval()
    x = torch.randn(16, 3, 10, 10)
    path = compress.export_onnx(network, x[:1], tmp_path / "model.onnx")
    out = tmp_path / "int8.onnx"
    plan = compress.quantize_onnx(path, [x.numpy()], out, target=target, method="plain")
    assert not [note for note in plan.notes if "float" in note and "else" in note]  # no remedy
    assert compress.lint_onnx(out, target=target) == []
    with compress.open_session(path) as fp32:
        (want,) = fp32.run(x.numpy())
    built = compress.build_engine(out, tmp_path / "engine.xml", runtime=target)
    with compress.open_session(built, runtime=target) as int8:
        (got,) = int8.run(x.numpy())
    assert sqnr_db([want], [got]) > 28


class Twice(nn.Module):
    """A convolution and its BatchNorm called twice, and the convolution with another BatchNorm."""

    def __init__(self, three: bool) -> None:
        super().__init__()
        self.three = three
        self.conv, self.one, self.other = (
            nn.Conv2d(3, 3, 3, padding=1),
            *map(nn.BatchNorm2d, (3, 3)),
        )
        for norm in (self.one, self.other):
            nn.init.normal_(norm.running_mean, 0, 0.3)
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.one(self.conv(torch.relu(self.one(self.conv(x))))))
        return self.other(self.conv(y)) if self.three else y


@pytest.mark.parametrize("three", [False, True])
def test_batchnorms_behind_a_shared_convolution_are_folded(three, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    path = compress.export_onnx(Twice(three).eval(), x[:1], tmp_path / "model.onnx")
    model = onnx.load(path)
    prepared = prepare(model)
    kinds = [node.op_type for node in prepared.graph.node]
    assert kinds.count("Conv") == 2 + three and "BatchNormalization" not in kinds
    weights = [node.input[1] for node in prepared.graph.node if node.op_type == "Conv"]
    assert weights[0] == weights[1] and len(set(weights)) == 1 + three  # one for each BatchNorm
    onnx.save(prepared, tmp_path / "folded.onnx")
    with compress.open_session(path) as one, compress.open_session(tmp_path / "folded.onnx") as two:
        np.testing.assert_allclose(one.run(x.numpy())[0], two.run(x.numpy())[0], atol=1e-5)
