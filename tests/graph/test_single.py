"""Networks in half precision are quantized as what they are in single precision."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, residual, run
from onnx import TensorProto, numpy_helper

import compress
from compress.graph.preprocess import prepare
from compress.quantize.confirm import Confirmation
from compress.quantize.sessions import sqnr_db


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


def doubled(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a network with all its numbers in double precision."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            wide = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return model


def perceptron() -> onnx.ModelProto:
    """Two linear layers, as scikit-learn's converter writes them."""
    s = Sketch((12,))
    x = s.op("MatMul", ["input", s.floats("w1", 12, 24, scale=0.4)], "product")
    x = s.relu(s.op("Add", [x, s.floats("b1", 1, 24)], "sum"))
    s.op("MatMul", [x, s.floats("w2", 24, 3, scale=0.3)], "logits")
    return s.model()


@pytest.mark.parametrize("made", [perceptron, residual])
def test_double_precision_becomes_int8_and_keeps_the_types_of_its_ends(made, tmp_path):
    path, out = tmp_path / "double.onnx", tmp_path / "int8.onnx"
    onnx.save(doubled(made()), str(path))
    feed = images(made(), 64)
    wide = {name: array.astype(np.float64) for name, array in feed.items()}
    compress.quantize_onnx(path, [wide["input"]], out, method="plain")
    (found,) = run(onnx.load(str(out)), wide)
    assert found.dtype == np.float64
    assert sqnr_db([run(made(), feed)[0]], [found.astype(np.float32)]) > 20


def test_sizes_in_double_precision_stay_so_in_a_network_that_is_not():
    s = Sketch((3, 16, 16))
    factor = s.constant("factor", np.float64(1.1))
    s.op("Mul", [s.op("Cast", [s.op("Shape", ["input"], "shape")], "wide", to=11), factor], "size")
    s.conv("input", "logits", 3, 8)
    prepared = prepare(s.model(outputs=["logits", "size"]))
    assert onnx.numpy_helper.to_array(
        next(t for t in prepared.graph.initializer if t.name == "factor")
    ) == np.float64(1.1)
