"""Upsample, and Resize of opset 10, sample as they did after conversion to a newer opset."""

import numpy as np
import pytest
from int8_graphs import run
from onnx import TensorProto, helper, numpy_helper

from compress.graph.preprocess import prepare


@pytest.mark.parametrize("opset", [7, 8, 9, 10])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("scale", [2.0, 1.5])
def test_converted_upsample_computes_the_same(opset, mode, scale):
    rng = np.random.default_rng(0)
    scales = [1.0, 1.0, scale, scale]
    constants = {"w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32)}
    options, inputs = {"mode": mode}, ["c"]
    if opset < 9:
        options["scales"] = scales
    else:
        constants["scales"] = np.array(scales, np.float32)
        inputs.append("scales")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3]),
        helper.make_node("Resize" if opset == 10 else "Upsample", inputs, ["y"], **options),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, d)
        for n, d in (("x", ["N", 3, 10, 10]), ("y", None))
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "old", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    feed = {"x": rng.normal(size=(2, 3, 10, 10)).astype(np.float32)}
    np.testing.assert_allclose(run(prepare(model), feed)[0], run(model, feed)[0], atol=1e-5)
