"""Upsample, and Resize of opset 10, sample as they did after conversion to a newer opset."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from int8_graphs import run
from onnx import TensorProto, helper, numpy_helper

from compress.graph.preprocess import prepare


@pytest.mark.parametrize("opset", [7, 8, 9, 10])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("scale", [2.0, 1.5])
def test_converted_upsample_computes_the_same(opset, mode, scale):
    node, constants = resize(opset, mode, scale)
    assert_same_after_conversion([node], constants, opset)


@pytest.mark.parametrize("opset", [7, 9, 10])
def test_converted_upsample_inside_a_branch_computes_the_same(opset):
    node, constants = resize(opset, "linear", 1.5)
    branch = helper.make_graph([node], "branch", [], [value("y", None)])
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["is_light"]),
        helper.make_node("If", ["is_light"], ["y"], then_branch=branch, else_branch=branch),
    ]
    assert_same_after_conversion(nodes, constants | {"zero": np.array(0, np.float32)}, opset)


def resize(opset: int, mode: str, scale: float) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    """Return a node that makes "y" of "c", and the constants that it reads."""
    scales = [1.0, 1.0, scale, scale]
    if opset < 9:
        return helper.make_node("Upsample", ["c"], ["y"], mode=mode, scales=scales), {}
    op = "Resize" if opset == 10 else "Upsample"
    constants = {"scales": np.array(scales, np.float32)}
    return helper.make_node(op, ["c", "scales"], ["y"], mode=mode), constants


def value(name: str, dims: list[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def assert_same_after_conversion(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], opset: int
) -> None:
    rng = np.random.default_rng(0)
    constants = constants | {"w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]), *nodes]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    ends = value("x", ["N", 3, 10, 10]), value("y", None)
    graph = helper.make_graph(nodes, "old", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    feed = {"x": rng.normal(size=(2, 3, 10, 10)).astype(np.float32)}
    np.testing.assert_allclose(run(prepare(model), feed)[0], run(model, feed)[0], atol=1e-5)
