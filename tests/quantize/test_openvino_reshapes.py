"""What OpenVINO answers for heads that view each level by its batch and join them."""

import importlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from openvino_core import compiled

import compress
from compress.qdq.lint import fix_onnx, lint_onnx
from compress.quantize.confirm import Confirmation
from compress.quantize.sessions import sqnr_db

CHANNELS, SIZES = 16, (8, 4)


def head(path, batch="n", other=None):
    """Two convolutions, x.view(x.size(0), C, -1) of each, joined over space; free batch."""
    rng = np.random.default_rng(0)
    constants = {"first": np.int64(0), "axis": [0], "channels": [CHANNELS], "rest": [-1]}
    nodes, inputs = [], []
    for i, size in enumerate(SIZES):
        dims = [other if i and other else batch, CHANNELS, size, size]
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, dims))
        constants[f"w{i}"] = rng.normal(size=(CHANNELS, CHANNELS, 1, 1)).astype(np.float32) / 4
        constants[f"b{i}"] = rng.normal(size=CHANNELS).astype(np.float32)
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [f"y{i}"], f"conv{i}"))
        if i == 0:
            nodes += [
                helper.make_node("Shape", ["y0"], ["shape"]),
                helper.make_node("Gather", ["shape", "first"], ["number"]),
                helper.make_node("Unsqueeze", ["number", "axis"], ["numbers"]),
                helper.make_node("Concat", ["numbers", "channels", "rest"], ["target"], axis=0),
            ]
        nodes.append(helper.make_node("Reshape", [f"y{i}", "target"], [f"r{i}"], f"view{i}"))
    nodes.append(helper.make_node("Concat", ["r0", "r1"], ["joined"], axis=2))
    constants["w"] = rng.normal(size=(CHANNELS, CHANNELS, 1)).astype(np.float32) / 4
    nodes.append(helper.make_node("Conv", ["joined", "w"], ["y"], "last"))
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, CHANNELS, "k"])
    graph = helper.make_graph(nodes, "head", inputs, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def images(count=16):
    rng = np.random.default_rng(1)
    return [
        {
            f"x{i}": rng.normal(size=(4, CHANNELS, s, s)).astype(np.float32)
            for i, s in enumerate(SIZES)
        }
        for _ in range(count // 4)
    ]


def openvino_answer(path, feed):
    found = compiled(path, {"INFERENCE_PRECISION_HINT": "f32"})(feed)
    return [np.asarray(found[0])]


def test_a_head_with_a_free_batch_is_right_in_openvino(tmp_path):
    import onnxruntime

    path = head(tmp_path / "head.onnx")
    compress.quantize_onnx(
        path, images(), tmp_path / "int8.onnx", target="openvino", method="plain"
    )
    feed = images()[0]
    reference = onnxruntime.InferenceSession(str(path)).run(None, feed)
    assert sqnr_db(reference, openvino_answer(tmp_path / "int8.onnx", feed)) > 25
    assert lint_onnx(tmp_path / "int8.onnx", target="openvino") == []


def test_lint_finds_and_mends_what_openvino_computes_wrongly(tmp_path, monkeypatch):
    import onnxruntime

    path = head(tmp_path / "head.onnx")
    module = importlib.import_module("compress.graph.preprocess")
    monkeypatch.setattr(module, "keep_batch", lambda model: None)  # as others write it
    monkeypatch.setattr(
        Confirmation, "losses", lambda self, written, runtime: []
    )  # and hand it over
    compress.quantize_onnx(
        path, images(), tmp_path / "int8.onnx", target="openvino", method="plain"
    )
    feed = images()[0]
    reference = onnxruntime.InferenceSession(str(path)).run(None, feed)
    assert sqnr_db(reference, openvino_answer(tmp_path / "int8.onnx", feed)) < 15
    found = lint_onnx(tmp_path / "int8.onnx", target="openvino")
    assert {(f.rule, f.node, f.fixable) for f in found} == {
        ("computed-batch", "view0", True),
        ("computed-batch", "view1", True),
    }
    assert fix_onnx(tmp_path / "int8.onnx", tmp_path / "fixed.onnx", target="openvino") == []
    assert sqnr_db(reference, openvino_answer(tmp_path / "fixed.onnx", feed)) > 25


def test_a_batch_of_another_input_is_no_constant(tmp_path):
    """The two inputs may hold different numbers of images: only the first Reshape is certain."""
    from compress.graph.rewrites import constant_targets
    from compress.graph.values import EditableGraph

    def targets(path):
        found = constant_targets(EditableGraph(onnx.load(path)))
        return {node.outputs[0].name: target.tolist() for node, target in found.items()}

    wanted = [0, CHANNELS, -1]
    assert targets(head(tmp_path / "same.onnx")) == {"r0": wanted, "r1": wanted}
    assert targets(head(tmp_path / "other.onnx", other="m")) == {"r0": wanted}
