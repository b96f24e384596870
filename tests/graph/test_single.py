"""Networks in half precision are quantized as what they are in single precision."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from int8_graphs import images, residual, run
from onnx import TensorProto, numpy_helper

import compress
from compress.graph.preprocess import prepare
from compress.quantize.confirm import Confirmation
from compress.quantize.sqnr import sqnr_db


def halved(*, ends: int) -> onnx.ModelProto:
    """Return a network in half precision, with inputs and outputs of the type ``ends``."""
    model = residual()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            narrow = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = ends
    if ends == TensorProto.FLOAT:  # as converters do that keep the ends
        for node in graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name in ("input", "logits"):
                        names[index] = f"{name}_half"
        cast = onnx.helper.make_node
        graph.node.append(cast("Cast", ["input"], ["input_half"], to=TensorProto.FLOAT16))
        graph.node.insert(0, graph.node.pop())
        graph.node.append(cast("Cast", ["logits_half"], ["logits"], to=TensorProto.FLOAT))
    return model


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("ends", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_half_precision_becomes_int8_and_keeps_the_types_of_its_ends(ends, target, tmp_path):
    model = halved(ends=ends)
    path, out = tmp_path / "half.onnx", tmp_path / "int8.onnx"
    onnx.save(model, str(path))
    kind = onnx.helper.tensor_dtype_to_np_dtype(ends)
    feed = {"input": images(residual(), 16)["input"].astype(kind)}
    compress.quantize_onnx(path, [feed["input"]], out, target=target, method="plain")
    written = onnx.load(str(out))
    types = [v.type.tensor_type.elem_type for v in (*written.graph.input, *written.graph.output)]
    assert types == [ends, ends]
    assert not any(t.data_type == TensorProto.FLOAT16 for t in written.graph.initializer)
    wanted, found = (run(each, feed)[0].astype(np.float64) for each in (model, written))
    assert sqnr_db([wanted], [found]) > 20
    assert compress.lint_onnx(out, target=target) == []


def test_what_a_runtime_answers_in_half_precision_is_checked_too():
    prepared = prepare(halved(ends=TensorProto.FLOAT16))
    feed = {"input": images(residual(), 16)["input"].astype(np.float16)}
    assert Confirmation(prepared, feed, None).names == ["logits"]


def test_nothing_of_it_stays_half_inside():
    prepared = prepare(halved(ends=TensorProto.FLOAT))
    casts = [node.output[0] for node in prepared.graph.node if node.op_type == "Cast"]
    assert casts == ["logits"]  # from float to float: the output keeps its name
    assert not any(t.data_type == TensorProto.FLOAT16 for t in prepared.graph.initializer)
