"""Graphs and images that cannot be quantized, or in part only, and what is said of it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images

import compress
from compress.errors import CompressError, QuantizationError
from compress.quantize.sessions import sqnr_db, sqnr_each


def two_layers(side=8, **options):
    s = Sketch((3, side, side), **options)
    s.head(s.relu(s.conv("input", "stem", 3, 8, 3)), 8)
    return s


def quantized(model, batches, tmp_path, **options):
    onnx.save(model, tmp_path / "float.onnx")
    return compress.quantize_onnx(tmp_path / "float.onnx", batches, tmp_path / "q.onnx", **options)


def test_an_operator_of_somebodys_own_is_named(tmp_path):
    s = two_layers()
    s.op("Swirl", ["logits"], "swirled", domain="my.ops")
    model = s.model(["swirled"])
    model.opset_import.append(onnx.helper.make_opsetid("my.ops", 1))
    with pytest.raises(CompressError, match=r"no operator my\.ops:Swirl") as caught:
        quantized(model, [images(two_layers().model(), 16)], tmp_path)
    assert "float.onnx" in str(caught.value)
    assert not (tmp_path / "q.onnx").exists()


def test_a_size_that_the_graph_cannot_take_names_node_and_sizes(tmp_path):
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "stem", 3, 8, 3))
    s.op("Reshape", [s.conv(x, "c", 8, 4, 1), s.constant("rows", np.array([-1, 256]))], "logits")
    model = s.model()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"
    batch = np.random.default_rng(0).standard_normal((16, 3, 6, 6)).astype(np.float32)
    with pytest.raises(QuantizationError) as caught:
        quantized(model, [batch], tmp_path)
    message = str(caught.value)
    assert "(Reshape)" in message
    assert "6, 6)" in message
    assert "onnxruntime_src" not in message
    assert "\n" not in message


def test_missing_external_data_is_named(tmp_path):
    model = two_layers().model()
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(model, tmp_path / "external.onnx", **options)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(QuantizationError, match=r"weights\.bin"):
        compress.quantize_onnx(tmp_path / "external.onnx", [], tmp_path / "q.onnx")


@pytest.mark.parametrize("drop", ["shape", "type"])
def test_an_output_without_shape_or_type_is_inferred(drop, tmp_path):
    model = two_layers().model()
    if drop == "shape":
        model.graph.output[0].type.tensor_type.ClearField("shape")
    else:
        model.graph.output[0].ClearField("type")
    plan = quantized(model, [images(two_layers().model(), 16)], tmp_path, method="bias-correction")
    assert plan.activations


def test_an_output_that_is_constant_has_no_sqnr(tmp_path):
    s = two_layers()
    s.op("Mul", ["logits", s.constant("zero", np.float32(0))], "nothing")
    model = s.model(["nothing"])
    plan = quantized(model, [images(two_layers().model(), 16)], tmp_path)
    assert plan.notes[0] == "mse ranges: no SQNR (the same for all these images)"
    s.op("Neg", ["nothing"], "either")
    plan = quantized(s.model(["nothing", "either"]), [images(model, 16)], tmp_path)
    assert plan.notes[0] == "mse ranges: no SQNR (the same for all these images)"
    both = s.model(["logits", "nothing"])
    plan = quantized(both, [images(two_layers().model(), 16)], tmp_path)
    (told,) = [note for note in plan.notes if note.startswith("SQNR by output")]
    assert told.endswith("nothing no SQNR (the same for all these images)")
    assert "300" not in " ".join(plan.notes)


def test_sqnr_counts_only_outputs_that_differ_between_images():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((4, 100))
    noisy = signal + 0.1 * rng.standard_normal((4, 100))
    ones = np.ones((4, 3))
    assert sqnr_db([signal, ones], [noisy, ones + 5]) == sqnr_db([signal], [noisy])
    assert np.isnan(sqnr_each([ones, ones[:1]], [ones, ones[:1]])).all()


def test_few_images_are_said_to_judge_badly(tmp_path):
    model = two_layers().model()
    few = quantized(model, [images(model, 16)], tmp_path)
    assert "judged on 8 images: an SQNR may be some dB off; give 64 or more" in few.notes
    assert not any("judged on" in n for n in quantized(model, [images(model, 64)], tmp_path).notes)


def loop(s, name, start, trips=2):
    value = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "stem_w2"], ["next"], pads=[1] * 4),
            onnx.helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            value("i", onnx.TensorProto.INT64, []),
            value("go", onnx.TensorProto.BOOL, []),
            value("x", 1, None),
        ],
        [value("on", 9, []), value("next", 1, None)],
    )
    s.floats("stem_w2", 8, 8, 3, 3, scale=0.1)
    ends = [s.constant("trips", np.int64(trips)), s.constant("go_on", np.bool_(True)), start]
    return s.op("Loop", ends, name, body=body)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_loop_stays_in_float_and_is_said_to(target, tmp_path):
    """All corrections run through it: the body reads weights of the graph around it."""
    s = Sketch((3, 8, 8))
    x = loop(s, "turned", s.relu(s.conv("input", "stem", 3, 8, 3)))
    s.head(s.relu(s.conv(x, "next", 8, 8, 3)), 8)
    model = s.model()
    for tensor in model.graph.output:
        tensor.type.tensor_type.ClearField("shape")
    plan = quantized(model, [images(model, 16)], tmp_path, target=target)
    assert any("(Loop) stays in float, 1 layers inside" in note for note in plan.notes)


def test_a_loop_without_end_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("compress.quantize.planning_graph.LOOP_SECONDS", 0.3)
    s = Sketch((3, 8, 8))
    x = loop(s, "turned", s.relu(s.conv("input", "stem", 3, 8, 3)), trips=2**62)
    s.head(x, 8)
    model = s.model()
    for tensor in model.graph.output:
        tensor.type.tensor_type.ClearField("shape")
    with pytest.raises(QuantizationError, match="a Loop of the graph does not end"):
        quantized(model, [images(model, 16)], tmp_path)


def test_a_loop_around_nothing_is_a_sentence(tmp_path):
    """ONNX Runtime could not be stopped in it."""
    s = Sketch((3, 8, 8))
    x = loop(s, "turned", s.relu(s.conv("input", "stem", 3, 8, 3)), trips=2**62)
    s.head(x, 8)
    model = s.model()
    (node,) = [node for node in model.graph.node if node.op_type == "Loop"]
    body = node.attribute[0].g
    del body.node[:]
    for output, given in zip(body.output, body.input[1:], strict=True):
        output.name = given.name
    with pytest.raises(QuantizationError, match="nothing in its body"):
        quantized(model, [images(model, 16)], tmp_path)


def test_free_dimensions_written_as_minus_one_are_free(tmp_path):
    """As Paddle writes them; read as a fixed batch of -1, no image was calibrated on at all."""
    model = two_layers().model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    feed = images(two_layers().model(), 16)
    plan = quantized(model, [feed], tmp_path, observer="minmax", method="plain")
    seen = plan.activations["input"]
    assert (seen.low, seen.high) == (feed["input"].min(), feed["input"].max())


@pytest.mark.parametrize("method", ["plain", "auto"])
def test_outputs_that_are_integers_are_judged_by_what_they_are_made_of(method, tmp_path):
    s = two_layers()
    s.op("ArgMax", ["logits"], "class", axis=1)
    model = s.model(["class"])
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    plan = quantized(model, [images(model, 24)], tmp_path, method=method)
    assert any("judged on 12 images" in note for note in plan.notes)
    got = onnx.load(tmp_path / "q.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in got.graph.node)


def test_a_graph_without_a_layer_in_float_is_refused(tmp_path):
    s = Sketch((3, 8, 8))
    s.op("Cast", ["input"], "pixels", to=onnx.TensorProto.INT64)
    s.op("ArgMax", ["pixels"], "brightest", axis=1)
    model = s.model(["brightest"])
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(CompressError) as caught:
        quantized(model, [images(model, 16)], tmp_path)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "q.onnx").exists()
