"""Graphs as other exporters write them: quantized for every target, clean for the linter."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, norm, run
from onnx.reference import ReferenceEvaluator

import compress
from compress.errors import CompressError, QuantizationError
from compress.graph.model import BIAS_LIMIT, GraphIndex
from compress.graph.values import EditableGraph, constant
from compress.qdq import prepare
from compress.qdq.placement import place
from compress.qdq.plan import TARGETS
from compress.quantize.confirm import check_prepared
from compress.quantize.planning_graph import judged_tensors
from compress.quantize.sessions import answers, sqnr_db, with_outputs


@pytest.mark.parametrize("value", [np.float32(6), np.float32([6]), np.ones((2, 3), np.float32)])
def test_a_constant_keeps_its_rank(value):
    graph = EditableGraph(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])))
    added = graph.add_constant("c", value)
    for _ in range(2):  # added, then replaced
        stored = constant(added)
        assert stored is not None
        assert stored.shape == np.shape(value)
        assert np.array_equal(stored, value)
        graph.set_constant(added, value)


def test_casts_that_change_no_type_are_gone():
    """As converters between frameworks write them, one after every operator."""
    s = Sketch((3, 8, 8))
    x = s.op("Cast", [s.conv("input", "conv", 3, 8, 3)], "same", to=onnx.TensorProto.FLOAT)
    whole = s.op("Cast", [s.relu(x)], "whole", to=onnx.TensorProto.INT32)
    s.head(s.op("Cast", [whole], "real", to=onnx.TensorProto.FLOAT), 8)
    model = s.model()
    prepared = prepare(model)
    assert [n.name for n in prepared.graph.node if n.op_type == "Cast"] == ["whole", "real"]
    feed = images(model)
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], atol=1e-5)


def test_zeros_of_the_type_of_an_image_are_a_constant():
    """So PyTorch's exporter fills in a bias; BatchNorm stayed outside of the layer for it."""
    s = Sketch((3, 8, 8))
    zero = s.op("CastLike", [s.constant("zero", np.float32(0)), "input"], "typed")
    bias = s.op("Expand", [zero, s.constant("count", np.array([8]))], "zeros")
    x = s.conv("input", "conv", 3, 8, 3)
    s.nodes[-1].input[2] = bias
    s.head(s.relu(norm(s, x, "bn", 8)), 8)
    model = s.model()
    prepared = prepare(model)
    kinds = {node.op_type for node in prepared.graph.node}
    assert not kinds & {"CastLike", "Cast", "Expand", "BatchNormalization"}
    feed = images(model)
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], atol=1e-5)


def test_a_constant_that_cannot_be_computed_here_is_left_to_the_runtime():
    """ONNX's reference evaluator takes no vector of one number for the depth of a OneHot."""
    s = Sketch((3, 8, 8))
    which, depth = s.constant("which", np.array([1])), s.constant("depth", np.array([8]))
    values = s.constant("values", np.array([0, 1], np.float32))
    mask = s.op("OneHot", [which, depth, values], "mask")
    shape = s.constant("shape", np.array([1, 8, 1, 1]))
    x = s.relu(s.conv("input", "conv", 3, 8, 3))
    s.head(s.op("Mul", [x, s.op("Reshape", [mask, shape], "gate")], "gated"), 8)
    model = s.model()
    feed = images(model)
    np.testing.assert_allclose(run(prepare(model), feed)[0], run(model, feed)[0], atol=1e-5)


def scalar_arithmetic():
    """Hard-swish written out with scalars, as TorchScript exports it."""
    s = Sketch((3, 16, 16))
    x = s.conv("input", "conv1", 3, 8, 3)
    gate = s.op(
        "Clip",
        [
            s.op("Add", [x, s.constant("three", np.float32(3))], "plus"),
            s.constant("low", np.float32(0)),
            s.constant("high", np.float32(6)),
        ],
        "clip",
    )
    x = s.op("Div", [s.op("Mul", [x, gate], "gated"), s.constant("six", np.float32(6))], "swish")
    s.head(x, 8)
    return s.model()


def shape_arithmetic():
    """x.view(x.size(0), -1): the target shape is computed from scalars."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "conv2", 3, 8, 3))
    batch = s.op("Gather", [s.op("Shape", [x], "shape"), s.constant("zero", np.int64(0))], "batch")
    batch = s.op("Unsqueeze", [batch, s.constant("axis", np.array([0]))], "row")
    wanted = s.op("Concat", [batch, s.constant("rest", np.array([-1]))], "wanted", axis=0)
    x = s.op("Reshape", [x, wanted], "flat")
    s.op("MatMul", [x, s.floats("w", 512, 10, scale=0.1)], "logits")
    return s.model()


def detector_head():
    """Two levels, transposed, reshaped and joined, as SSD-like detectors end."""
    s = Sketch((3, 16, 16))
    x = s.relu(s.conv("input", "conv3", 3, 8, 3))
    pooled = s.op("MaxPool", [x], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    shape = s.constant("shape", np.array([0, -1, 4]))
    levels = []
    for number, level in enumerate((x, pooled)):
        scores = s.conv(level, f"level{number}_conv4", 8, 4, 1)
        scores = s.op("Transpose", [scores], f"last{number}", perm=[0, 2, 3, 1])
        levels.append(s.op("Reshape", [scores, shape], f"rows{number}"))
    s.op("Softmax", [s.op("Concat", levels, "joined", axis=1)], "logits", axis=-1)
    return s.model()


def attention():
    """A product of two activations, one of which a convolution reads as well."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "conv5", 3, 8, 3))
    y = s.op("Sigmoid", [s.conv(x, "conv6", 8, 8, 1)], "gate")
    mixed = s.op("MatMul", [x, s.op("Exp", [y], "exp")], "mixed")
    s.head(s.op("Add", [mixed, s.conv(x, "conv7", 8, 8, 1)], "sum"), 8)
    return s.model()


def attention_with_positions():
    """As in YOLO11: of what one layer makes, queries are scaled and a layer reads the values."""
    s = Sketch((3, 8, 8))
    whole = s.conv(s.relu(s.conv("input", "stem", 3, 8, 3)), "qkv", 8, 24, 1)
    flat = s.op("Reshape", [whole, s.constant("rows", np.array([0, 24, 64]))], "columns")
    s.op("Split", [flat, s.constant("thirds", np.array([8, 8, 8]))], "part", outputs=3, axis=1)
    q = s.op("Mul", ["part_0", s.constant("root", np.float32(0.35))], "scaled")
    q = s.op("Transpose", [q], "queries", perm=[0, 2, 1])
    weights = s.op("Softmax", [s.op("MatMul", [q, "part_1"], "product")], "weights", axis=-1)
    turned = s.op("Transpose", [weights], "turned", perm=[0, 2, 1])
    square = s.constant("square", np.array([0, 8, 8, 8]))
    x = s.op("Reshape", [s.op("MatMul", ["part_2", turned], "mixed"), square], "image")
    positions = s.conv(s.op("Reshape", ["part_2", square], "values"), "positions", 8, 8, 3)
    s.head(s.conv(s.op("Add", [x, positions], "sum"), "last", 8, 8, 1), 8)
    return s.model()


def attention_of_slices():
    """Attention on a feature map: of its two products one has a scaled query, in float."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "conv1", 3, 8, 3))
    flat = s.op("Reshape", [x, s.constant("rows", np.array([0, 8, -1]))], "flat")
    x = s.op("Transpose", [flat], "tokens", perm=[0, 2, 1])
    s.floats("w", 8, 24, scale=0.3)
    x = s.op("MatMul", [x, "w"], "qkv")
    parts = []
    for k in range(3):
        ends = [
            s.constant(f"{n}{k}", np.array([v]))
            for n, v in zip("abc", (8 * k, 8 * k + 8, 2), strict=True)
        ]
        parts.append(s.op("Slice", [x, *ends], f"part{k}"))
    q = s.op("Mul", [parts[0], s.constant("scale", np.float32(0.35))], "scaled")
    k = s.op("Transpose", [parts[1]], "keys", perm=[0, 2, 1])
    weights = s.op("Softmax", [s.op("MatMul", [q, k], "product")], "weights", axis=-1)
    x = s.op("MatMul", [weights, parts[2]], "mixed")
    s.floats("w2", 8, 10, scale=0.3)
    s.op("MatMul", [x, "w2"], "logits")
    return s.model()


def wrongly_annotated():
    """A file whose output and inner shapes are of another rank than what its nodes make."""
    model = scalar_arithmetic()
    wrong = onnx.helper.make_tensor_value_info
    model.graph.value_info.append(wrong("plus", onnx.TensorProto.FLOAT, [1, 8]))
    name = model.graph.output[0].name
    del model.graph.output[:]
    model.graph.output.append(wrong(name, onnx.TensorProto.FLOAT, ["n", 2, 5]))
    return model


def wrongly_annotated_branch():
    """As paddle2onnx writes them: a branch that says its values are of another rank."""
    s = Sketch((3, 16, 16))
    x = s.relu(s.conv("input", "conv", 3, 8, 3))
    value = onnx.helper.make_tensor_value_info
    zero, one = s.constant("zero", np.float32(0)), s.constant("one", np.ones(1, np.float32))
    branch = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Neg", [one], ["turned"]),
            onnx.helper.make_node("Neg", ["turned"], ["factor"]),
        ],
        "branch",
        [],
        [value("factor", onnx.TensorProto.FLOAT, [])],
    )
    branch.value_info.append(value("turned", onnx.TensorProto.FLOAT, []))
    gate = s.op("Greater", [s.op("ReduceMax", [x], "top", keepdims=0), zero], "gate")
    factor = s.op("If", [gate], "chosen", then_branch=branch, else_branch=branch)
    s.head(s.conv(s.op("Mul", [x, factor], "scaled"), "last", 8, 8, 3), 8)
    return s.model()


def gated_features():
    """A gate joined with larger features and read by a layer: scores in form, not in use."""
    s = Sketch((3, 16, 16))
    large = s.op(
        "Mul", [s.relu(s.conv("input", "conv1", 3, 8, 3)), s.constant("k", np.float32(40))], "large"
    )
    gate = s.op("Sigmoid", [s.conv("input", "conv2", 3, 8, 3)], "gate")
    x = s.relu(s.conv(s.op("Concat", [gate, large], "both", axis=1), "conv3", 16, 8, 3))
    s.head(x, 8)
    return s.model()


GRAPHS = [
    *(scalar_arithmetic, shape_arithmetic, detector_head, attention),
    *(
        attention_of_slices,
        attention_with_positions,
        wrongly_annotated,
        wrongly_annotated_branch,
        gated_features,
    ),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", GRAPHS, ids=lambda make: make.__name__)
def test_the_linter_accepts_what_the_writer_writes(make, target, tmp_path):
    model = make()
    onnx.save(model, tmp_path / "float.onnx")
    feed = images(model, 32)
    compress.quantize_onnx(
        tmp_path / "float.onnx", [feed], tmp_path / "int8.onnx", target=target, method="plain"
    )
    assert compress.lint_onnx(tmp_path / "int8.onnx", target=target) == []
    written = onnx.load(tmp_path / "int8.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in written.graph.node)
    assert sqnr_db(run(model, feed)[0], run(written, feed, plain=True)[0]) > 18


def test_a_bias_at_the_limit_of_the_writer_is_no_overflow(tmp_path):
    """The scale of a nearly dead channel is raised until its bias is the largest that fits."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "conv8", 3, 8, 3))
    s.head(s.relu(s.conv(x, "conv9", 8, 8, 3)), 8)
    model = s.model()
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.ndim == 4:
            values[: len(values) // 2] *= 1e-9
        elif values.ndim == 1:
            values[:] = np.linspace(0.3, 3, len(values))
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "float.onnx")
    compress.quantize_onnx(
        tmp_path / "float.onnx", [images(model, 32)], tmp_path / "int8.onnx", method="plain"
    )
    written = onnx.load(tmp_path / "int8.onnx")
    codes = [onnx.numpy_helper.to_array(t) for t in written.graph.initializer]
    largest = max(np.abs(c.astype(np.int64)).max() for c in codes if c.dtype == np.int32)
    assert largest == pytest.approx(BIAS_LIMIT, rel=1e-5)
    assert compress.lint_onnx(tmp_path / "int8.onnx", target="onnxruntime") == []


def judged(model, batches, tmp_path, target="onnxruntime", method="auto", **options):
    """Return the plan and the written model."""
    onnx.save(model, tmp_path / "float.onnx")
    out = tmp_path / "int8.onnx"
    plan = compress.quantize_onnx(
        tmp_path / "float.onnx", batches, out, target=target, method=method, **options
    )
    return plan, onnx.load(out)


@pytest.mark.parametrize("target", TARGETS)
def test_a_network_of_one_layer_has_only_its_input_to_observe(target, tmp_path):
    s = Sketch((3, 8, 8))
    s.conv("input", "logits", 3, 4, 3)
    model = s.model()
    feed = images(model, 32)
    _, written = judged(model, [feed], tmp_path, target)
    assert sqnr_db(run(model, feed), run(written, feed, plain=True)) > 25


def test_sizes_from_before_a_layer_are_known_behind_it(tmp_path):
    """As PyTorch writes interpolate(y, x.shape[2:]): ONNX Runtime infers the sizes of a Resize.

    Layer by layer the height and width come from before the layer, the rest from its output.
    """
    s = Sketch((3, 16, 16))
    x = s.relu(s.conv("input", "first", 3, 8, 3))
    ends = {n: s.constant(f"at_{n}", np.array([n])) for n in (0, 2, 4)}
    sides = s.op("Slice", [s.op("Shape", [x], "shape"), ends[2], ends[4]], "sides")
    y = s.conv(x, "second", 8, 8, 3, strides=[2, 2])
    rest = s.op("Slice", [s.op("Shape", [y], "small"), ends[0], ends[2]], "rest")
    sizes = s.op("Concat", [rest, sides], "sizes", axis=0)
    none = s.constant("none", np.zeros(0, np.float32))
    s.head(s.relu(s.conv(s.op("Resize", [y, none, none, sizes], "up"), "third", 8, 8, 3)), 8)
    model = s.model()
    plan, _ = judged(model, [images(model, 16)], tmp_path, method="bias-correction")
    assert plan.biases.keys() >= {"second", "third"}


def nms_inside():
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "stem", 3, 8, 3))
    boxes = s.op("Reshape", [s.conv(x, "b", 8, 4, 1), s.constant("bs", np.array([0, 4, -1]))], "b2")
    boxes = s.op("Transpose", [boxes], "boxes", perm=[0, 2, 1])
    scores = s.op("Sigmoid", [s.conv(x, "s", 8, 2, 1)], "gate")
    scores = s.op("Reshape", [scores, s.constant("ss", np.array([0, 2, -1]))], "scores")
    limits = [("most", np.int64(1000)), ("iou", np.float32(0.9)), ("least", np.float32(0.5))]
    limits = [s.constant(name, np.reshape(value, 1)) for name, value in limits]
    s.op("NonMaxSuppression", [boxes, scores, *limits], "logits")
    model = s.model()
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    return model


def top_scores():
    s = Sketch((3, 8, 8))
    s.head(s.relu(s.conv("input", "stem", 3, 8, 3)), 8)
    s.op("TopK", ["logits", s.constant("k", np.array([3]))], "top", outputs=2)
    model = s.model(["top_0", "top_1"])
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    return model


def winners():
    s = Sketch((3, 8, 8))
    s.head(s.relu(s.conv("input", "stem", 3, 8, 3)), 8)
    s.op("ArgMax", ["logits"], "winner", axis=1)
    model = s.model(["winner"])
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    return model


def decoder():
    """A loop that writes a row for each step, and ends when the sum of logits says so."""
    s = Sketch((3, 8, 8))
    s.head(s.relu(s.conv("input", "stem", 3, 8, 3)), 8)
    start = s.op("ReduceL2", ["logits"], "start", keepdims=0)
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    body = onnx.helper.make_graph(
        [
            node("Add", ["x", "growth"], ["next"]),
            node("Less", ["next", "end"], ["on"]),
            node("Mul", ["logits", "next"], ["row"]),
        ],
        "body",
        [value("i", 7, []), value("go", 9, []), value("x", 1, [])],
        [value("on", 9, []), value("next", 1, []), value("row", 1, None)],
    )
    s.constant("growth", np.float32(0.05)), s.constant("end", np.float32(20))
    ends = [s.constant("trips", np.int64(500)), s.constant("go_on", np.bool_(True)), start]
    s.nodes.append(node("Loop", ends, ["last", "rows"], name="loop", body=body))
    return s.model(["rows"])


@pytest.mark.parametrize(
    ("make", "compared"),
    [
        *((nms_inside, {"boxes", "scores"}), (top_scores, {"logits"}), (winners, {"logits"})),
        (decoder, {"logits", "start"}),
    ],
    ids=["NonMaxSuppression", "TopK", "only positions", "a loop that ends by a value"],
)
def test_answers_are_compared_before_they_are_sorted_or_selected(make, compared, tmp_path):
    """Rows of different objects would be compared after it, or no numbers at all."""
    model = make()
    assert set(judged_tensors(prepare(model))) == compared
    plan, _ = judged(model, [images(model, 32)], tmp_path)
    noted = re.search(r"(?:weakest output |: )(-?[\d.]+)", plan.notes[0])
    assert noted is not None
    assert float(noted[1]) > 15


@pytest.mark.parametrize("as_stream", [False, True], ids=["list", "stream"])
def test_images_of_different_sizes_calibrate_a_graph_of_free_size(as_stream, tmp_path):
    s = Sketch((3, 8, 8))
    s.head(s.relu(s.conv("input", "stem", 3, 8, 3)), 8)
    model = s.model()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"
    rng = np.random.default_rng(0)
    sizes = [(2, 3, side, side) for side in (8, 8, 12, 8, 16, 8, 12, 8)]
    batches = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    batches[-1][0, 0, 0, 0] = 12.0  # in an image of the most frequent size
    batches[4][0, 0, 0, 0] = -13.0  # in the only one of its size
    plan, _ = judged(
        model, (lambda: iter(batches)) if as_stream else batches, tmp_path, observer="minmax"
    )
    found = plan.activations["input"]
    assert (found.low, found.high) == (-13, 12)  # both were seen
    assert len(plan.trials) > 1  # corrections were tried


@pytest.mark.parametrize("shape", [(), (1,)], ids=["a scalar", "one number"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_input_that_is_no_image_is_bound_to_its_value(shape, target, tmp_path):
    s = Sketch((3, 8, 8))
    x = s.op("Mul", [s.relu(s.conv("input", "stem", 3, 8, 3)), "gain"], "scaled")
    s.head(s.relu(s.conv(x, "next", 8, 8, 3)), 8)
    s.inputs.append(onnx.helper.make_tensor_value_info("gain", 1, shape))
    model = s.model()
    gain = np.full(shape, 0.5, np.float32)
    feed = {"input": images(model, 32)["input"], "gain": gain}
    _, written = judged(model, [feed], tmp_path, target)
    assert [value.name for value in written.graph.input] == ["input", "gain"]
    assert compress.lint_onnx(tmp_path / "int8.onnx", target=target) == []
    assert sqnr_db(run(model, feed), run(written, feed, plain=True)) > 20
    with pytest.raises(QuantizationError, match="'gain' is no image and differs from that of"):
        judged(model, [feed, feed | {"gain": gain + 1}], tmp_path, target)


def test_a_batch_that_nodes_inside_fix_is_taken_one_by_one(tmp_path):
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "stem", 3, 8, 3))
    ones = s.constant("ones", np.ones((1, 8, 8, 8), np.float32))
    s.head(s.op("Concat", [x, ones], "joined", axis=1), 16)
    model = s.model()
    with pytest.warns(UserWarning, match="its nodes fix it to 1: images are taken one by one"):
        plan, written = judged(model, [images(model, 16)], tmp_path)
    feed = images(model, 1)
    assert sqnr_db(run(model, feed), run(written, feed, plain=True)) > 20
    assert "weights and biases are not fitted to images: the batch size is fixed" in str(plan.notes)


@pytest.mark.parametrize("target", TARGETS)
def test_channels_are_equalized_where_the_batch_is_fixed_too(target, tmp_path):
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "stem", 3, 8, 3))
    x = s.relu(s.conv(x, "next", 8, 8, 3))
    ones = s.constant("ones", np.ones((1, 8, 8, 8), np.float32))
    s.head(s.op("Concat", [x, ones], "joined", axis=1), 16)
    model = s.model()
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name in ("stem_w", "stem_b"):
            value[0] *= 300
        elif tensor.name == "next_w":
            value[:, 0] /= 300
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    found = {}
    for method in ("plain", "auto"):
        with pytest.warns(UserWarning, match="its nodes fix it to 1"):
            _, written = judged(model, [images(model, 16)], tmp_path, target, method=method)
        got = [run(written, images(model, 1, seed=k), plain=True) for k in range(4)]
        want = [run(model, images(model, 1, seed=k)) for k in range(4)]
        found[method] = sqnr_db(*([np.concatenate([y for (y,) in side])] for side in (want, got)))
    assert found["auto"] > found["plain"] + 6


def test_pixels_that_the_network_scales_are_looked_at_one_by_one_too(tmp_path):
    s = Sketch((3, 8, 8))
    scales = s.constant("scales", np.array([1, 2, 3], np.float32).reshape(1, 3, 1, 1))
    x = s.relu(s.conv(s.op("Mul", ["input", scales], "scaled"), "stem", 3, 8, 3))
    ones = s.constant("ones", np.ones((1, 8, 8, 8), np.float32))
    s.head(s.op("Concat", [x, ones], "joined", axis=1), 16)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 3, 8, 8)).astype(np.float32) / 255
    with pytest.warns(UserWarning, match="its nodes fix it to 1"):
        plan, _ = judged(s.model(), [{"input": pixels}], tmp_path)
    assert any("exact pixels" in note for note in (*plan.notes, *plan.trials))


@pytest.mark.parametrize("count", [8, 9, 10])
def test_eight_images_are_enough_for_a_fixed_batch(count, tmp_path):
    s = Sketch((3, 8, 8), batch=1)
    x = s.relu(s.conv("input", "stem", 3, 8, 3))
    s.head(s.relu(s.conv(x, "next", 8, 8, 3)), 8)
    model = s.model()
    for tensor in model.graph.initializer:  # channels that equalization helps
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.ndim == 4:
            values *= np.logspace(-1.5, 0, len(values), dtype=np.float32)[:, None, None, None]
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    feed = images(model, count)["input"]
    _, written = judged(model, [feed[i : i + 1] for i in range(count)], tmp_path)
    one = {"input": feed[:1]}
    assert sqnr_db(run(model, one), run(written, one, plain=True)) > 15


def shared_head() -> onnx.ModelProto:
    """One head on two levels, as RetinaNet and FCOS have it."""
    s = Sketch((3, 16, 16))
    fine = s.relu(s.conv("input", "body", 3, 8))
    coarse = s.op("MaxPool", [fine], "down", kernel_shape=[2, 2], strides=[2, 2])
    weight = s.floats("head_w", 4, 8, 1, 1, scale=0.3)
    ends = [s.op("Conv", [x, weight], f"head_{i}") for i, x in enumerate((fine, coarse))]
    flat = [s.op("Flatten", [x], f"{x}_flat") for x in ends]
    s.op("Concat", flat, "answer", axis=1)
    return s.model(["answer"])


def test_layers_that_share_a_weight_run_with_exact_kernels(tmp_path):
    model = shared_head()
    feed = images(model)
    _, written = judged(model, [feed], tmp_path, method="plain")
    got = answers(written, feed, target="onnxruntime")
    assert sqnr_db(run(model, feed), got) > 25


def test_a_constant_that_only_the_body_of_a_loop_reads_as_float_stays(tmp_path):
    s = Sketch((3, 8, 8))
    features = s.conv(s.relu(s.conv("input", "a", 3, 4)), "b", 4, 4)
    value = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "b_w"], ["next"], pads=[1] * 4),
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
    ends = [s.constant("trips", np.int64(2)), s.constant("go_on", np.bool_(True)), features]
    s.op("Loop", ends, "answer", body=body)
    model = s.model(["answer"])
    model.graph.output[0].CopyFrom(value("answer", 1, ("batch", 4, 8, 8)))
    feed = images(model)
    _, written = judged(model, [feed], tmp_path, method="plain")
    assert sqnr_db(run(model, feed), run(written, feed, plain=True)) > 25


def test_a_product_with_a_constant_matrix_takes_its_bias():
    """As TensorFlow and Paddle write linear layers; one of three dimensions stays."""
    s = Sketch((3, 8, 8))
    pooled = s.op("GlobalAveragePool", [s.relu(s.conv("input", "stem", 3, 6))], "pool")
    x = s.op("Flatten", [pooled], "flat")
    x = s.op("MatMul", [x, s.floats("w1", 6, 9)], "linear")
    x = s.op("Add", [s.floats("b1", 9), x], "biased")
    y = s.op("MatMul", [s.relu(x), s.floats("w2", 9, 12)], "bare")
    shape = s.constant("shape", np.array([-1, 4, 3]))
    y = s.op("Reshape", [y, shape], "rows")
    s.op("MatMul", [y, s.floats("w3", 3, 2)], "of_rows")
    model = s.model(["of_rows"])
    prepared = prepare(model)
    kinds = {node.name: (node.op_type, len(node.input)) for node in prepared.graph.node}
    assert kinds["linear"] == ("Gemm", 3) and "biased" not in kinds
    assert kinds["bare"] == ("Gemm", 2) and kinds["of_rows"] == ("MatMul", 2)
    feed = images(model, 4)
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("between", [False, True])
def test_onnxruntime_runs_what_lies_around_a_cubic_resize(between, tmp_path):
    """It takes the pairs around one away, and has no cubic Resize of bytes."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "conv", 3, 8))
    half = s.constant("half", np.float32([1, 1, 0.5, 0.5]))
    x = s.op("Resize", [x, "", half], "smaller", mode="cubic")
    if between:
        twice = s.constant("twice", np.float32([1, 1, 2, 2]))
        x = s.op("Resize", [x, "", twice], "larger", mode="nearest")
    s.head(s.relu(s.conv(s.relu(s.conv(x, "behind", 8, 8)), "last", 8, 8)), 8)
    model = s.model()
    onnx.save(model, str(tmp_path / "net.onnx"))
    feed = images(model, 16)
    out = tmp_path / "int8.onnx"
    plan = compress.quantize_onnx(tmp_path / "net.onnx", [feed["input"]], out, method="plain")
    assert "conv" not in plan.float_nodes
    wanted, found = run(model, feed)[0], answers(onnx.load(str(out)), feed, target="onnxruntime")[0]
    assert sqnr_db([wanted], [found]) > 20


def test_what_a_relu_shares_with_others_is_no_defect_before_it(tmp_path):
    """As in the residual units of DPT, whose branch begins with a Relu."""
    s = Sketch((3, 8, 8))
    x = s.conv("input", "conv", 3, 8)
    x = s.op("Add", [s.conv(s.relu(x), "branch", 8, 8), x], "joined")
    s.head(s.relu(s.conv(x, "last", 8, 8)), 8)
    model = s.model()
    onnx.save(model, str(tmp_path / "net.onnx"))
    batch = images(model, 16)["input"]
    for target in TARGETS:
        out = tmp_path / f"{target}.onnx"
        compress.quantize_onnx(tmp_path / "net.onnx", [batch], out, target=target, method="plain")
        assert not compress.lint_onnx(out, target=target)


def behind_a_layer():
    """Return a sketch of two layers, 8 channels of 8 x 8, and the tensor they end in."""
    s = Sketch((3, 8, 8))
    x = s.relu(s.conv("input", "first", 3, 8))
    return s, s.relu(s.conv(x, "second", 8, 8))


def quantized(model, tmp_path, target="onnxruntime", batch=16):
    """Return the int8 model of a file, written and read again."""
    onnx.save(model, tmp_path / "x.onnx")
    feed = images(model, batch)
    compress.quantize_onnx(tmp_path / "x.onnx", [feed], tmp_path / "q.onnx", target, "plain")
    assert not compress.lint_onnx(tmp_path / "q.onnx", target)
    return onnx.load(tmp_path / "q.onnx")


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("op", ["SequenceConstruct", "Optional"])
def test_outputs_that_are_no_tensors_are_kept(op, batch, tmp_path):
    s, x = behind_a_layer()
    s.op(op, [x], "wrapped")
    s.head(x, 8)
    model = s.model()
    if batch is not None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
    tensor = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
    wrap = {"SequenceConstruct": "sequence", "Optional": "optional"}[op]
    kind = getattr(onnx.helper, f"make_{wrap}_type_proto")(tensor)
    model.graph.output.append(onnx.helper.make_value_info("wrapped", kind))
    written = quantized(model, tmp_path)
    assert written.graph.output[1].type.WhichOneof("value") == f"{wrap}_type"
    feed = images(model, batch or 16)
    assert sqnr_db(run(model, feed)[0], run(written, feed)[0]) > 25


def test_scores_by_label_are_refused_with_the_option_that_makes_them_a_tensor(tmp_path):
    """As classifiers of scikit-learn answer."""
    s, x = behind_a_layer()
    s.head(x, 8)
    model = s.model()
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 1))
    zipped = onnx.helper.make_node(
        "ZipMap", ["logits"], ["scores"], domain="ai.onnx.ml", classlabels_int64s=range(10)
    )
    model.graph.node.append(zipped)
    tensor = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [])
    labels = onnx.helper.make_map_type_proto(onnx.TensorProto.INT64, tensor)
    kind = onnx.helper.make_sequence_type_proto(labels)
    model.graph.output.append(onnx.helper.make_value_info("scores", kind))
    with pytest.raises(CompressError, match=r"x\.onnx: .*'scores' is a map.*'zipmap': False"):
        quantized(model, tmp_path)
    with pytest.raises(CompressError, match=r"x\.onnx: .*'scores' is a map.*'zipmap': False"):
        compress.lint_onnx(tmp_path / "x.onnx")


def test_a_weight_that_is_an_output_keeps_its_type(tmp_path):
    s, x = behind_a_layer()
    s.head(x, 8)
    model = s.model(["logits", "fc_w"])
    written = quantized(model, tmp_path)
    for want, got in zip(run(model, images(model)), run(written, images(model)), strict=True):
        assert sqnr_db([want], [got]) > 25


def test_weights_of_another_precision_behind_a_cast_are_read(tmp_path):
    """numpy has no bfloat16, in which the file that is compared with holds them."""
    s, x = behind_a_layer()
    s.head(s.relu(s.conv(x, "last", 8, 64)), 64)
    (weight,) = (tensor for tensor in s.constants if tensor.name == "last_w")
    values = onnx.numpy_helper.to_array(weight)
    halved = onnx.helper.make_tensor("halved", onnx.TensorProto.BFLOAT16, values.shape, values)
    s.constants.remove(weight)
    s.constants.append(halved)
    s.nodes.insert(0, onnx.helper.make_node("Cast", ["halved"], ["last_w"], to=1))
    model = s.model()
    written = quantized(model, tmp_path)
    assert sqnr_db(run(model, images(model)), run(written, images(model))) > 25


@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("rule", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_a_transposed_convolution_says_how_it_pads(rule, kernel):
    """OpenVINO pads by the rule only where it knows the sizes, and gives larger images else."""
    s, x = behind_a_layer()
    w = s.floats("w", 8, 8, kernel, kernel, scale=0.2)
    x = s.op("ConvTranspose", [x, w], "up", strides=[2, 2], auto_pad=rule)
    s.head(s.conv(s.relu(x), "last", 8, 8), 8)
    model = s.model(["logits", "up"])
    prepared = prepare(model)
    (up,) = (node for node in prepared.graph.node if node.op_type == "ConvTranspose")
    assert "auto_pad" not in {item.name for item in up.attribute}
    for got, want in zip(run(prepared, images(model)), run(model, images(model)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_batchnorm_that_trains_is_no_part_of_a_layer():
    """It takes mean and variance of the batch."""
    s, x = behind_a_layer()
    x = norm(s, s.conv(x, "third", 8, 8), "bn", 8)
    s.nodes[-1].attribute.append(onnx.helper.make_attribute("training_mode", 1))
    s.nodes[-1].output.extend(["mean", "variance"])
    s.head(s.relu(x), 8)
    model = s.model()
    np.testing.assert_allclose(
        run(prepare(model), images(model))[0], run(model, images(model))[0], atol=1e-4
    )


def test_weights_of_an_old_file_need_not_be_inputs():
    s, x = behind_a_layer()
    s.head(x, 8)
    model = s.model(opset=8)
    model.ir_version = 3
    np.testing.assert_allclose(
        run(prepare(model), images(model))[0], run(model, images(model))[0], atol=1e-5
    )


def test_a_function_of_another_opset_is_written_out():
    s, x = behind_a_layer()
    s.op("Mean", [x], "mean", domain="own")
    s.op("Flatten", ["mean"], "flat")
    s.op("Gemm", ["flat", s.floats("fc", 8, 10)], "logits")
    model = s.model(opset=18)
    inside = onnx.helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3])
    imports = [onnx.helper.make_opsetid("", 13)]
    model.functions.append(
        onnx.helper.make_function("own", "Mean", ["x"], ["y"], [inside], imports)
    )
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    feed = images(model)
    (want,) = ReferenceEvaluator(model).run(None, feed)  # ONNX Runtime refuses to run it
    np.testing.assert_allclose(run(prepare(model), feed)[0], want, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(4, 1), (4, 10), (1, 10), (10,), (1,), ()])
def test_a_bias_of_a_linear_layer_may_have_any_shape(shape, target, tmp_path):
    s, x = behind_a_layer()
    flat = s.op("Flatten", [s.op("GlobalAveragePool", [x], "pool")], "flat")
    s.op("Gemm", [flat, s.floats("fc", 8, 10), s.floats("rows", *shape)], "logits")
    model = s.model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    feed = images(model, 4)
    written = quantized(model, tmp_path, target)
    assert sqnr_db(run(model, feed), run(written, feed)) > 25


@pytest.mark.parametrize("target", TARGETS)
def test_padding_of_some_axes_is_padding_of_all(target, tmp_path):
    """ONNX Runtime moves transposes through a Pad as if it padded every axis."""
    s, x = behind_a_layer()
    pads, axes = s.constant("pads", np.array([1, 2, 1, 0])), s.constant("axes", np.array([2, -1]))
    x = s.op("Pad", [x, pads, "", axes], "padded", mode="edge")
    s.head(s.relu(s.conv(x, "last", 8, 8)), 8)
    model = s.model(opset=18)
    written = quantized(model, tmp_path, target)
    assert sqnr_db(run(model, images(model)), run(written, images(model))) > 25


def test_batchnorm_of_a_sequence_is_int8_for_onnxruntime(tmp_path):
    s = Sketch((3, 32))
    w, v = s.floats("w", 8, 3, 3, scale=0.4), s.floats("v", 8, 8, 3, scale=0.2)
    x = s.relu(s.op("Conv", ["input", w], "first", pads=[1, 1]))
    x = norm(s, s.op("Add", [x, s.op("Conv", [x, v], "second", pads=[1, 1])], "sum"), "bn", 8)
    s.head(s.relu(x), 8)
    model = s.model()
    written = quantized(model, tmp_path)
    assert sqnr_db(run(model, images(model)), run(written, images(model))) > 25


def test_fewer_images_than_a_fixed_batch_is_a_sentence(tmp_path):
    s, x = behind_a_layer()
    s.head(x, 8)
    model = s.model()
    feed = images(model)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 32
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(QuantizationError, match=r"16 calibration images are too few.*64"):
        compress.quantize_onnx(tmp_path / "x.onnx", [feed], tmp_path / "q.onnx")


def test_a_graph_that_answers_otherwise_than_its_file_is_refused(tmp_path, monkeypatch):
    def wrongly(model):
        prepared = prepare(model)
        for tensor in prepared.graph.initializer:
            value = onnx.numpy_helper.to_array(tensor)
            if value.ndim == 4:
                tensor.CopyFrom(onnx.numpy_helper.from_array(value[::-1].copy(), tensor.name))
        return prepared

    s, x = behind_a_layer()
    s.head(x, 8)
    monkeypatch.setattr("compress.quantize.api.prepare", wrongly)
    with pytest.raises(QuantizationError, match=r"logits has .* dB"):
        quantized(s.model(), tmp_path)
    assert not (tmp_path / "q.onnx").exists()


def test_a_file_without_standard_operators_has_no_opset_to_convert():
    node = onnx.helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml")
    ends = [onnx.helper.make_tensor_value_info(name, 1, ("n", 3)) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("ai.onnx.ml", 3)])
    with pytest.raises(QuantizationError, match="nothing to quantize"):
        prepare(model)


@pytest.mark.parametrize("op", ["GlobalMaxPool", "Tile"])
def test_what_only_moves_values_keeps_their_scale(op, tmp_path):
    s, x = behind_a_layer()
    more = [s.constant("times", np.array([1, 1, 1, 1]))] if op == "Tile" else []
    x = s.op(op, [s.conv(x, "last", 8, 8), *more], "moved")
    size = 8 if op == "GlobalMaxPool" else 512
    flat = s.op("Flatten", [x], "flat")
    s.op("Gemm", [flat, s.floats("fc", size, 10, scale=0.1)], "logits")
    model = s.model()
    written = quantized(model, tmp_path)
    assert sqnr_db(run(model, images(model)), run(written, images(model))) > 25


def test_an_output_that_is_the_input_keeps_its_shape(tmp_path):
    """The output says none: it is one value with the input."""
    s, x = behind_a_layer()
    s.head(x, 8)
    model = s.model(["logits", "input"])
    written = quantized(model, tmp_path)
    assert sqnr_db(run(model, images(model))[:1], run(written, images(model))[:1]) > 25


def test_an_average_of_pixels_apart_stays_in_float_for_onnxruntime(tmp_path):
    """Its int8 kernel knows no dilations."""
    s, x = behind_a_layer()
    pool = {"kernel_shape": [2, 2], "dilations": [2, 2], "strides": [1, 1]}
    s.head(s.relu(s.conv(s.op("AveragePool", [x], "mean", **pool), "last", 8, 8)), 8)
    model = s.model(opset=19)
    written = quantized(model, tmp_path)
    assert sqnr_db(run(model, images(model)), run(written, images(model))) > 25


@pytest.mark.parametrize("given", ["scales", "sizes"])
def test_onnxruntime_runs_what_lies_around_a_resize_of_some_axes(given, tmp_path):
    """Between int8 kernels it reads the sizes of some axes as those of all."""
    s, x = behind_a_layer()
    values = {"scales": np.float32([2, 2]), "sizes": np.array([12, 12])}[given]
    more = (
        ["", s.constant(given, values)]
        if given == "scales"
        else ["", "", s.constant(given, values)]
    )
    x = s.op("Resize", [x, *more], "larger", axes=[2, 3], mode="nearest")
    s.head(s.relu(s.conv(x, "last", 8, 8)), 8)
    model = s.model(opset=18)
    written = quantized(model, tmp_path)
    assert sqnr_db(run(model, images(model)), run(written, images(model))) > 25


def fused(activation: str, numbers: list[float]) -> onnx.ModelProto:
    s, own = Sketch((3, 8, 8)), "com.microsoft"
    w, b = s.floats("w", 8, 3, 3, 3, scale=0.4), s.floats("b", 8)
    given = {"activation_params": numbers} if numbers else {}
    x = s.op(
        "FusedConv",
        ["input", w, b],
        "one",
        pads=[1] * 4,
        domain=own,
        activation=activation,
        **given,
    )
    sums = [x, s.floats("v", 8, 8, 3, 3, scale=0.2), s.floats("c", 8), s.conv(x, "side", 8, 8)]
    x = s.op("FusedConv", sums, "two", pads=[1] * 4, domain=own, activation="Relu")
    flat = s.op("Flatten", [s.op("GlobalAveragePool", [x], "pool")], "flat")
    names = dict(zip(("activation_alpha", "activation_beta"), numbers, strict=False))
    layer = [flat, s.floats("u", 16, 8, scale=0.4), s.floats("d", 16)]
    x = s.op("FusedGemm", layer, "three", transB=1, domain=own, activation=activation, **names)
    s.op("Gemm", [x, s.floats("fc", 16, 10)], "logits")
    model = s.model()
    model.opset_import.append(onnx.helper.make_opsetid(own, 1))
    return model


def check_written_apart(model):
    """Check that the prepared graph has operators of ONNX alone, and answers as the file does."""
    if not any(each.domain == "com.microsoft" for each in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    prepared, feed = prepare(model), images(model)
    assert not any(node.domain for node in prepared.graph.node)
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], atol=1e-4)
    return prepared


@pytest.mark.parametrize(
    ("activation", "numbers"),
    [("Relu", []), ("Sigmoid", []), ("LeakyRelu", [0.2]), ("HardSigmoid", [0.3, 0.4])],
)
def test_what_onnxruntime_fused_is_written_apart(activation, numbers, tmp_path):
    model = fused(activation, numbers)
    prepared, feed = check_written_apart(model), images(model)
    assert {"one", "two", "three"} <= {node.name for node in prepared.graph.node}
    written = quantized(model, tmp_path)
    assert sqnr_db(run(model, feed), run(written, feed)) > 25


def test_limits_that_onnxruntime_fused_are_those_of_a_clip():
    model = fused("Relu", [])
    given = {"pads": [1] * 4, "activation": "Clip", "activation_params": [-0.5, 1.0]}
    del model.graph.node[0].attribute[:]
    made = (onnx.helper.make_attribute(*each) for each in given.items())
    model.graph.node[0].attribute.extend(made)
    check_written_apart(model)


@pytest.mark.parametrize("options", [{"transB": 1}, {"transA": 1, "alpha": 0.5}, {"alpha": 2.0}])
@pytest.mark.parametrize("of_two", [False, True])
def test_products_that_onnxruntime_fused_are_written_apart(of_two, options, tmp_path):
    s, own = Sketch((6, 6)), "com.microsoft"
    weight = "input" if of_two else s.floats("w", 6, 6, scale=0.4)
    s.op("FusedMatMul", ["input", weight], "product", domain=own, **options)
    s.op("MatMul", ["product", s.floats("v", 6, 4)], "logits")
    check_written_apart(s.model())


@pytest.mark.parametrize("op", ["BiasGelu", "Gelu", "QuickGelu"])
def test_gates_that_onnxruntime_fused_are_written_apart(op):
    s, own = Sketch((6, 6)), "com.microsoft"
    s.op("MatMul", ["input", s.floats("w", 6, 6)], "product")
    bias = [s.floats("b", 6)] if op == "BiasGelu" else []
    s.op(op, ["product", *bias], "gate", domain=own)
    s.op("MatMul", ["gate", s.floats("v", 6, 4)], "logits")
    check_written_apart(s.model())


def test_layers_inside_branches_alone_are_said_to_be_out_of_reach():
    def branch(name):
        inside = Sketch((3, 8, 8))
        inside.conv("input", f"{name}_conv", 3, 8)
        end = onnx.helper.make_tensor_value_info(f"{name}_conv", 1, None)
        return onnx.helper.make_graph(inside.nodes, name, [], [end], inside.constants)

    s = Sketch((3, 8, 8))
    mean = s.op("ReduceMean", ["input"], "mean", keepdims=0)
    is_bright = s.op("Greater", [mean, s.constant("half", np.float32(0.5))], "is_bright")
    parts = {"then_branch": branch("day"), "else_branch": branch("night")}
    s.op("If", [is_bright], "logits", **parts)
    with pytest.raises(QuantizationError, match=r"2 layers inside 'logits'.*branches and loops"):
        prepare(s.model())


def test_a_function_may_say_another_version_of_its_own_domain_than_the_file():
    """As jax2onnx writes them; such functions were left as they are, in float."""
    own, opset = "my.blocks", onnx.helper.make_opsetid
    inside = Sketch((3, 8, 8))
    inside.relu(inside.conv("input", "conv", 3, 8))
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in inside.constants
    ]
    block = onnx.helper.make_function(
        own,
        "Block",
        ["input"],
        ["conv_relu"],
        [*constants, *inside.nodes],
        [opset("", 17), opset(own, 17)],
    )
    s = Sketch((3, 8, 8))
    s.head(s.op("Block", ["input"], "block", domain=own), 8)
    model = s.model()
    model.opset_import.append(opset(own, 1))
    model.functions.append(block)
    prepared, feed = prepare(model), images(model)
    assert [node.op_type for node in prepared.graph.node][:2] == ["Conv", "Relu"]
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], atol=1e-5)


@pytest.mark.parametrize("op", ["Sub", "Div"])
def test_a_difference_or_quotient_with_a_constant_is_part_of_the_layer(op):
    """As keras writes BatchNorm: minus the mean, times one factor, plus one offset."""
    s = Sketch((3, 8, 8))
    x = s.conv("input", "conv", 3, 8)
    mean = s.constant("mean", np.linspace(1, 2, 8, dtype=np.float32).reshape(1, 8, 1, 1))
    x = s.op("Mul", [s.op(op, [x, mean], "less"), s.floats("factor", 1, 8, 1, 1)], "times")
    if op == "Sub":
        x = s.op("Sub", [mean, x], "turned")
    s.head(s.relu(x), 8)
    model = s.model()
    prepared, feed = prepare(model), images(model)
    assert [node.op_type for node in prepared.graph.node][:2] == ["Conv", "Relu"]
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], atol=1e-4)


def test_a_size_that_is_known_is_a_constant():
    """So keras reshapes a bias, which then is part of the layer."""
    s = Sketch((3, 8, 8))
    x = s.conv("input", "conv", 3, 8)
    channels = s.constant("channels", np.array([1]))
    picked = s.op("Gather", [s.op("Shape", [x], "shape"), channels], "picked")
    one = s.constant("one", np.array([1]))
    size = s.op("Concat", [one, picked, one, one], "size", axis=0)
    bias = s.op("Reshape", [s.floats("more", 8), size], "bias")
    s.head(s.relu(s.op("Add", [x, bias], "sum")), 8)
    model = s.model()
    prepared, feed = prepare(model), images(model)
    assert [node.op_type for node in prepared.graph.node][:2] == ["Conv", "Relu"]
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_made_of_sizes_is_no_image(target):
    """OpenVINO fails where what a constant is reshaped to is quantized."""
    s, x = behind_a_layer()
    bias = s.op("Expand", [s.floats("more", 8, 1, 1), s.op("Shape", [x], "size")], "bias")
    s.head(s.relu(s.conv(s.op("Add", [x, bias], "sum"), "last", 8, 8)), 8)
    model = s.model()
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "any"
    graph = GraphIndex(prepare(model))
    assert graph.producer["bias"].op_type == "Expand"
    assert "bias" not in place(graph, target).readers


def test_a_file_made_for_one_cpu_is_refused():
    s, x = behind_a_layer()
    s.head(s.op("MaxPool", [x], "pooled", kernel_shape=[2, 2], domain="com.microsoft.nchwc"), 8)
    with pytest.raises(QuantizationError, match=r"'pooled' is a MaxPool for the CPU.*extended"):
        prepare(s.model())


def test_what_cannot_be_converted_names_no_source_of_the_converter(monkeypatch):
    def fails(*_):
        raise RuntimeError("/project/onnx/Base.h:66: look: Assertion `false` failed: No Adapter")

    s, x = behind_a_layer()
    s.head(x, 8)
    monkeypatch.setattr("onnx.version_converter.convert_version", fails)
    with pytest.raises(QuantizationError, match=r"opset 11 cannot be converted to 17: No Adapter"):
        prepare(s.model(opset=11))


def test_lint_compares_texts(tmp_path):
    s, x = behind_a_layer()
    s.head(x, 8)
    best = s.op("ArgMax", ["logits"], "best", axis=1, keepdims=0)
    s.op("Gather", [s.constant("names", np.array(list("abcdefghij"), object)), best], "name")
    model = s.model(["logits", "name"])
    model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.STRING
    quantized(model, tmp_path)
    assert compress.lint_onnx(tmp_path / "q.onnx", target="onnxruntime") == []


def test_a_file_that_answers_by_rounding_is_not_read_wrongly():
    """As detectors that see nothing: ONNX Runtime's own optimizations give other answers."""
    s, x = behind_a_layer()
    weight = s.floats("w", 8, 8, 1, 1, scale=0.3)
    x = s.op("Conv", [x, weight, s.constant("far", np.full(8, 1e7, np.float32))], "last")
    ones, zeros = s.constant("ones", np.ones(8, np.float32)), s.constant("zeros", np.zeros(8, "f"))
    s.op("BatchNormalization", [x, ones, zeros, "far", ones], "logits")
    model = s.model()
    apart = with_outputs(model, ["last"])  # which ONNX Runtime cannot fold
    feed = images(model)
    assert sqnr_db(run(model, feed)[:1], run(apart, feed)[:1]) < 20
    check_prepared(model, apart, feed)


def test_codes_that_are_compared_choose_no_rows(tmp_path):
    """As networks that read bytes begin; what they answer was compared with nothing."""
    s, x = Sketch((3, 8, 8)), "input"
    whole = s.op("Cast", [x], "codes", to=onnx.TensorProto.INT32)
    same = s.op("Equal", [whole, s.constant("one", np.int32(1))], "is_one")
    x = s.op("Cast", [same], "real", to=onnx.TensorProto.FLOAT)
    s.head(s.relu(s.conv(x, "first", 3, 8)), 8)
    model = s.model()
    assert judged_tensors(prepare(model)) == ["logits"]
    feed = images(model)
    assert sqnr_db(run(model, feed), run(quantized(model, tmp_path), feed)) > 25
