"""Graphs as other exporters write them: quantized for every target, clean for the linter."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, run

import compress
from compress.qdq.graph import BIAS_LIMIT, set_constant
from compress.qdq.plan import TARGETS
from compress.quantize.fidelity import sqnr_db


@pytest.mark.parametrize("value", [np.float32(6), np.float32([6]), np.ones((2, 3), np.float32)])
def test_a_constant_keeps_its_rank(value):
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    for _ in range(2):  # added, then replaced
        set_constant(model, "c", value)
    (stored,) = model.graph.initializer
    assert tuple(stored.dims) == np.shape(value)
    assert np.array_equal(onnx.numpy_helper.to_array(stored), value)


def scalar_arithmetic():
    """Hard-swish written out with scalars, as TorchScript exports it."""
    s = Sketch((3, 16, 16))
    x = s.conv("input", "conv1", 3, 8, 3)
    gate = s.op(
        "Clip",
        [
            s.op("Add", [x, s.constant("three", np.float32(3))], "plus"),
            s.constant("low", np.float32(0)),
            s.constant("high", np.float32(6)),
        ],
        "clip",
    )
    x = s.op("Div", [s.op("Mul", [x, gate], "gated"), s.constant("six", np.float32(6))], "swish")
    s.head(x, 8)
    return s.model()


def shape_arithmetic():
    """x.view(x.size(0), -1): the target shape is computed from scalars."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "conv2", 3, 8, 3))
    batch = s.op("Gather", [s.op("Shape", [x], "shape"), s.constant("zero", np.int64(0))], "batch")
    batch = s.op("Unsqueeze", [batch, s.constant("axis", np.array([0]))], "row")
    wanted = s.op("Concat", [batch, s.constant("rest", np.array([-1]))], "wanted", axis=0)
    x = s.op("Reshape", [x, wanted], "flat")
    s.op("MatMul", [x, s.floats("w", 512, 10, scale=0.1)], "logits")
    return s.model()


def detector_head():
    """Two levels, transposed, reshaped and joined, as SSD-like detectors end."""
    s = Sketch((3, 16, 16))
    x = s.relu(s.conv("input", "conv3", 3, 8, 3))
    pooled = s.op("MaxPool", [x], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    shape = s.constant("shape", np.array([0, -1, 4]))
    levels = []
    for number, level in enumerate((x, pooled)):
        scores = s.conv(level, f"level{number}_conv4", 8, 4, 1)
        scores = s.op("Transpose", [scores], f"last{number}", perm=[0, 2, 3, 1])
        levels.append(s.op("Reshape", [scores, shape], f"rows{number}"))
    s.op("Softmax", [s.op("Concat", levels, "joined", axis=1)], "logits", axis=-1)
    return s.model()


def attention():
    """A product of two activations, one of which a convolution reads as well."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "conv5", 3, 8, 3))
    y = s.op("Sigmoid", [s.conv(x, "conv6", 8, 8, 1)], "gate")
    mixed = s.op("MatMul", [x, s.op("Exp", [y], "exp")], "mixed")
    s.head(s.op("Add", [mixed, s.conv(x, "conv7", 8, 8, 1)], "sum"), 8)
    return s.model()


GRAPHS = [scalar_arithmetic, shape_arithmetic, detector_head, attention]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", GRAPHS, ids=lambda make: make.__name__)
def test_the_linter_accepts_what_the_writer_writes(make, target, tmp_path):
    model = make()
    onnx.save(model, tmp_path / "float.onnx")
    feed = images(model, 32)
    compress.quantize_onnx(
        tmp_path / "float.onnx", [feed], tmp_path / "int8.onnx", target=target, method="plain"
    )
    assert compress.lint_onnx(tmp_path / "int8.onnx", target=target) == []
    written = onnx.load(tmp_path / "int8.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in written.graph.node)
    assert sqnr_db(run(model, feed)[0], run(written, feed)[0]) > 18


def test_a_bias_at_the_limit_of_the_writer_is_no_overflow(tmp_path):
    """The scale of a nearly dead channel is raised until its bias is the largest that fits."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "conv8", 3, 8, 3))
    s.head(s.relu(s.conv(x, "conv9", 8, 8, 3)), 8)
    model = s.model()
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.ndim == 4:
            values[: len(values) // 2] *= 1e-9
        elif values.ndim == 1:
            values[:] = np.linspace(0.3, 3, len(values))
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "float.onnx")
    compress.quantize_onnx(
        tmp_path / "float.onnx", [images(model, 32)], tmp_path / "int8.onnx", method="plain"
    )
    written = onnx.load(tmp_path / "int8.onnx")
    codes = [onnx.numpy_helper.to_array(t) for t in written.graph.initializer]
    largest = max(np.abs(c.astype(np.int64)).max() for c in codes if c.dtype == np.int32)
    assert largest == pytest.approx(BIAS_LIMIT, rel=1e-5)
    assert compress.lint_onnx(tmp_path / "int8.onnx", target="onnxruntime") == []
