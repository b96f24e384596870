"""Transposes around layers meet their inverse and go; the graph computes what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, run

from compress.graph.transposes import cancel_transposes
from compress.graph.values import EditableGraph
from compress.qdq import prepare

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def channels_last(between: Callable[[Sketch, str], str], end: bool = True) -> onnx.ModelProto:
    """Two layers as keras writes them, each between two transposes, and what is between them."""
    s = Sketch((8, 8, 3))
    x = s.op("Transpose", ["input"], "to_first", perm=FIRST)
    x = s.op("Transpose", [s.conv(x, "one", 3, 8)], "to_last", perm=LAST)
    x = between(s, x)
    if end:
        x = s.conv(s.op("Transpose", [x], "first_again", perm=FIRST), "two", 8, 8)
        s.op("Transpose", [x], "logits", perm=LAST)
    return s.model()


def norm_and_activation(s: Sketch, x: str) -> str:
    x = s.op("Sub", [x, s.floats("mean", 8)], "less")
    x = s.op("Mul", [s.floats("factor", 1, 1, 8), x], "times")
    return s.relu6(s.op("Add", [x, s.floats("offset", 8)], "plus"))


def gate(s: Sketch, x: str) -> str:
    axes = s.constant("space", np.array([1, 2]))
    pooled = s.op("ReduceMean", [x, axes], "pooled", keepdims=1)
    return s.op("Mul", [x, s.op("Sigmoid", [pooled], "gate")], "gated")


def residual(s: Sketch, x: str) -> str:
    y = s.op("Transpose", [x], "inner", perm=FIRST)
    y = s.op("Transpose", [s.conv(y, "side", 8, 8)], "outer", perm=LAST)
    return s.op("Add", [x, s.op("LeakyRelu", [y], "leaky")], "sum")


def padded(s: Sketch, x: str) -> str:
    return s.op("Pad", [x, s.constant("pads", np.array([0, 1, 2, 0, 0, 3, 0, 0]))], "padded")


def joined(s: Sketch, x: str) -> str:
    y = s.op("Concat", [x, s.op("Abs", [x], "size")], "joined", axis=3)
    y = s.op("Transpose", [y], "wide", perm=FIRST)
    return s.op("Transpose", [s.conv(y, "narrow", 16, 8)], "narrow_last", perm=LAST)


def read_as_output(s: Sketch, x: str) -> str:
    return s.op("Relu", [x], "seen")


CASES = [norm_and_activation, gate, residual, padded, joined, read_as_output]


@pytest.mark.parametrize("between", CASES)
def test_transposes_between_layers_are_gone(between):
    model = channels_last(between)
    if between is read_as_output:
        model.graph.output.append(onnx.helper.make_tensor_value_info("seen", 1, None))
    model.opset_import[0].version = 18  # of which ReduceMean takes its axes as an input
    graph = EditableGraph(model)
    graph.infer_shapes()
    cancel_transposes(graph)
    moved = graph.to_model()
    onnx.checker.check_model(moved, full_check=True)
    left = sum(node.op_type == "Transpose" for node in moved.graph.node)
    assert left == 2 + (between is read_as_output)  # at the input and at the output
    feed = images(model)
    for got, want in zip(run(moved, feed), run(model, feed), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_layers_as_keras_writes_them_hold_their_batchnorm_and_touch_their_activation():
    model = channels_last(norm_and_activation)
    prepared, feed = prepare(model), images(model)
    kinds = [node.op_type for node in prepared.graph.node]
    assert kinds == ["Transpose", "Conv", "Clip", "Conv", "Transpose"]
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], atol=1e-5)


def test_a_mean_over_space_takes_the_transpose_before_it():
    def mean(s: Sketch, x: str) -> str:
        return s.op("ReduceMean", [s.relu(x)], "logits", axes=[1, 2], keepdims=0)

    model = channels_last(mean, end=False)
    prepared, feed = prepare(model), images(model)
    assert Counter(node.op_type for node in prepared.graph.node)["Transpose"] == 1
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], atol=1e-5)


def test_a_graph_that_would_have_as_many_transposes_stays_as_it_is():
    def alone(s: Sketch, x: str) -> str:
        return s.op("Softmax", [s.relu(x)], "logits", axis=3)

    model = channels_last(alone, end=False)
    graph = EditableGraph(model)
    cancel_transposes(graph)
    assert [node.name for node in graph.nodes] == [node.name for node in model.graph.node]
    assert [list(n.input) for n in graph.to_model().graph.node] == [
        list(node.input) for node in model.graph.node
    ]
