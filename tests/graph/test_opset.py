"""Graphs of old opsets compute what they did after conversion to a newer one."""

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


SOFT = ("Softmax", "LogSoftmax", "Hardmax")
ZEROS = [0, 0, 1, 2, 0, 0, 2, 1]
POOL = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
DOUBLE = {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
MEANT = [  # first and last opset of this meaning, operator, attributes, constants that it reads
    *((7, 12, op, {}, {}) for op in SOFT),
    *((7, 12, op, {"axis": axis}, {}) for op in SOFT for axis in (1, 2, 3)),
    *((11, 12, op, {"axis": axis}, {}) for op in SOFT for axis in (-1, -2)),
    (7, 10, "Clip", {"min": -0.5, "max": 0.7}, {}),
    (7, 10, "Clip", {"min": -0.5}, {}),
    (11, 12, "Clip", {}, {"low": np.float32(-0.5), "high": np.float32(0.7)}),
    *((7, 10, "Pad", {"mode": mode, "pads": ZEROS}, {}) for mode in ("constant", "edge")),
    (7, 10, "Pad", {"pads": [0, 0, -1, 1, 0, 0, 0, 1], "value": 0.5}, {}),
    (7, 9, "Slice", {"starts": [1, 0], "ends": [3, 1000], "axes": [1, 2]}, {}),
    (7, 9, "Slice", {"starts": [0, 1], "ends": [2, -1]}, {}),
    (7, 12, "Unsqueeze", {"axes": [0, 3]}, {}),
    *((7, 12, f"Reduce{op}", {"axes": [1, 3]}, {}) for op in ("Sum", "Mean", "Max", "L1", "L2")),
    (7, 12, "ReduceSum", {"keepdims": 0}, {}),
    *((7, 12, "AveragePool", POOL | {"count_include_pad": count}, {}) for count in (0, 1)),
    (10, 12, "AveragePool", POOL | {"ceil_mode": 1}, {}),
    (7, 12, "AveragePool", {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}, {}),
    (10, 12, "MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, {}),
    (7, 12, "LpPool", {"kernel_shape": [2, 2], "p": 1}, {}),
    (7, 12, "LRN", {"size": 3, "alpha": 0.1}, {}),
    (7, 12, "DepthToSpace", {"blocksize": 2}, {}),
    (11, 12, "DepthToSpace", {"blocksize": 2, "mode": "CRD"}, {}),
    (7, 12, "Flatten", {"axis": 2}, {}),
    (9, 12, "MeanVarianceNormalization", {}, {}),
    (7, 12, "LpNormalization", {"axis": 1}, {}),
    (7, 12, "PRelu", {}, {"slope": np.linspace(-1, 1, 4, dtype=np.float32).reshape(4, 1, 1)}),
    (7, 12, "Gather", {"axis": 1}, {"index": np.array([3, 0, 2])}),
    (7, 12, "Tile", {}, {"repeats": np.array([1, 2, 1, 2])}),
    (8, 12, "Max", {}, {"other": np.float32(0.1)}),
    (11, 12, "CumSum", {"exclusive": 1}, {"axis": np.array(1)}),
    *(
        (11, 12, "Resize", {"mode": mode, "coordinate_transformation_mode": where}, DOUBLE)
        for mode, where in [("linear", "half_pixel"), ("cubic", "pytorch_half_pixel"),
                            ("linear", "align_corners"), ("nearest", "asymmetric")]
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("opset", "op", "attributes", "constants"),
    [(opset, *rest) for first, last, *rest in MEANT for opset in sorted({first, last})],
)
def test_operators_mean_the_same_after_conversion(opset, op, attributes, constants):
    node = helper.make_node(op, ["c", *constants], ["y"], **attributes)
    assert_same_after_conversion([node], constants, opset)


def test_hardmax_inside_a_branch_means_the_same_after_conversion():
    branch = helper.make_graph(
        [helper.make_node("Hardmax", ["c"], ["y"])], "branch", [], [value("y", None)]
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["is_light"]),
        helper.make_node("If", ["is_light"], ["y"], then_branch=branch, else_branch=branch),
    ]
    assert_same_after_conversion(nodes, {"zero": np.array(0, np.float32)}, 11)


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
