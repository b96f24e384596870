"""Files that runtimes take and ONNX's own checker does not."""

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, run
from onnx import helper

import compress
from compress.graph import files
from compress.graph.weightless import check_rules


def normed(op: str, opset: int, parts: int = 0, **attributes) -> onnx.ModelProto:
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "first", 3, 8))
    given = [s.floats(f"of_groups_{i}", parts) for i in range(2 if parts else 0)]
    x = s.op(op, [x, *given], "strange", **attributes)
    s.head(s.relu(s.conv(x, "last", 8, 8)), 8)
    return s.model(opset=opset)


def by_group() -> onnx.ModelProto:
    return normed("GroupNormalization", 18, 4, num_groups=4)


def by_group_inside_a_branch() -> onnx.ModelProto:
    model = by_group()
    index = next(i for i, node in enumerate(model.graph.node) if node.name == "strange")
    inner = onnx.NodeProto()
    inner.CopyFrom(model.graph.node[index])
    inner.output[0] = "inside"
    ends = [helper.make_tensor_value_info("inside", 1, None)]
    branches = {n: helper.make_graph([inner], n, [], ends) for n in ("then_branch", "else_branch")}
    true = onnx.numpy_helper.from_array(np.array(True), "true")
    model.graph.initializer.append(true)
    chosen = helper.make_node("If", ["true"], ["strange"], "strange", **branches)
    model.graph.node[index].CopyFrom(chosen)
    return model


def by_channel() -> onnx.ModelProto:
    return normed("MeanVarianceNormalization", 13)


def without_import() -> onnx.ModelProto:
    return normed("Gelu", 17, domain="com.microsoft")


def weights_are_no_inputs() -> onnx.ModelProto:
    model = normed("Sigmoid", 17)
    model.ir_version = 3
    return model


@pytest.mark.parametrize(
    "make",
    [by_group, by_group_inside_a_branch, by_channel, without_import, weights_are_no_inputs],
)
def test_what_runtimes_take_is_read_as_valid_onnx(make, tmp_path):
    path = tmp_path / "x.onnx"
    onnx.save(make(), path)
    feed = images(make())
    import onnxruntime

    want = onnxruntime.InferenceSession(str(path)).run(None, feed)
    read = files.load(path)
    check_rules(read, full=True)
    np.testing.assert_allclose(run(read, feed)[0], want[0], atol=1e-5)
    compress.lint_onnx(path)
    compress.quantize_onnx(path, [feed], tmp_path / "q.onnx", method="plain")
    assert compress.lint_onnx(tmp_path / "q.onnx", target="onnxruntime") == []
