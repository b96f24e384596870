"""PRelu for ONNX Runtime, whose own kernel is slower than the convolution before it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, run

import compress
from compress.graph.preprocess import prepare
from compress.qdq.rewrite import rewrite_for
from compress.quantize.sessions import sqnr_db

SLOPES = {"below 1": [0.0, 0.25, 1.0, -0.5], "any": [0.0, 0.25, 1.5, -0.5]}


def network(slopes: list[float]) -> onnx.ModelProto:
    s = Sketch((3, 16, 16))
    slope = s.constant("slope", np.array(slopes * 2, np.float32).reshape(8, 1, 1))
    x = s.op("PRelu", [s.conv("input", "stem", 3, 8), slope], "act")
    s.op("Add", [s.conv(x, "c", 8, 8), x], "logits")
    return s.model()


@pytest.mark.parametrize("slopes", SLOPES.values(), ids=SLOPES)
def test_a_prelu_is_written_apart_and_answers_the_same(slopes, tmp_path):
    model = network(slopes)
    feed = images(model, 32)
    apart = rewrite_for(prepare(model), "onnxruntime")
    np.testing.assert_allclose(run(apart, feed)[0], run(model, feed)[0], atol=1e-6)
    path, out = tmp_path / "x.onnx", tmp_path / "int8.onnx"
    onnx.save(model, str(path))
    compress.quantize_onnx(path, [feed["input"]], out, method="plain")
    written = onnx.load(str(out))
    kinds = Counter(node.op_type for node in written.graph.node)
    assert (kinds["PRelu"], kinds["Min"], kinds["Mul"], kinds["Sum"]) == (0, 1, 1, 1)
    rounded = {n.input[0] for n in written.graph.node if n.op_type == "QuantizeLinear"}
    assert rounded - {t.name for t in written.graph.initializer} == {"input", "stem", "act", "c"}
    assert sqnr_db([run(model, feed)[0]], [run(written, feed)[0]]) > 28
    assert compress.lint_onnx(out, target="onnxruntime") == []


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_other_runtimes_fuse_it(target):
    rewritten = rewrite_for(prepare(network(SLOPES["any"])), target)
    assert Counter(node.op_type for node in rewritten.graph.node)["PRelu"] == 1
