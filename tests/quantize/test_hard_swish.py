"""Hard-swish in small steps, as exporters of older opsets write it, is one operator to us."""

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, run

import compress
from compress.qdq import TARGETS, prepare


def clipped(s, x, name):
    limits = [s.constant(f"{name}_{k}", np.float32(k)) for k in (0, 6)]
    plus = s.op("Add", [x, s.constant(f"{name}_3", np.float32([3]))], f"{name}_plus")
    return s.op("Clip", [plus, *limits], f"{name}_clip")


def product_first(s, x, name):
    product = s.op("Mul", [x, clipped(s, x, name)], f"{name}_mul")
    return s.op("Div", [product, s.constant(f"{name}_six", np.float32(6))], f"{name}_end")


def gate_first(s, x, name):
    sixth = s.constant(f"{name}_sixth", np.float32(1 / 6))
    gate = s.op("Mul", [sixth, clipped(s, x, name)], f"{name}_gate")
    return s.op("Mul", [gate, x], f"{name}_end")


def hard_sigmoid(s, x, name):
    gate = s.op("HardSigmoid", [x], f"{name}_gate", alpha=1 / 6)
    return s.op("Mul", [x, gate], f"{name}_end")


def other_numbers(s, x, name):
    product = s.op("Mul", [x, clipped(s, x, name)], f"{name}_mul")
    return s.op("Div", [product, s.constant(f"{name}_six", np.float32(5))], f"{name}_end")


def network(form, opset=17):
    s = Sketch((3, 8, 8))
    x = form(s, s.conv("input", "stem", 3, 8, 3), "a")
    x = form(s, s.conv(x, "next", 8, 8, 3), "b")
    s.head(s.conv(x, "last", 8, 8, 1), 8)
    return s.model(opset=opset)


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("form", [product_first, gate_first, hard_sigmoid, other_numbers])
def test_only_what_is_hard_swish_becomes_one(form, opset):
    model = network(form, opset)
    prepared = prepare(model)
    kinds = [node.op_type for node in prepared.graph.node]
    joined = form is not other_numbers and opset > 13
    assert kinds.count("HardSwish") == (2 if joined else 0)
    assert ("Clip" in kinds) == (form is not hard_sigmoid and not joined)
    feed = images(model, 4)
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_quantized_inside_it(target, tmp_path):
    model = network(product_first)
    onnx.save(model, tmp_path / "float.onnx")
    compress.quantize_onnx(
        tmp_path / "float.onnx", [images(model, 16)], tmp_path / "int8.onnx", target, "plain"
    )
    written = onnx.load(tmp_path / "int8.onnx")
    kinds = [node.op_type for node in written.graph.node]
    assert kinds.count("HardSwish") == 2 and "Clip" not in kinds
    assert compress.lint_onnx(tmp_path / "int8.onnx", target=target) == []
