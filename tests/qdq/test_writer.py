"""Q/DQ graphs: exact in plain arithmetic, fused by the runtime they are for, valid ONNX."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import pytest
from int8_graphs import GRAPHS, SHAPE, Sketch, images, residual, run

from compress.errors import QuantizationError, UnknownNameError
from compress.graph.model import GraphIndex
from compress.graph.preprocess import finished
from compress.qdq import QuantPlan, WeightScales, placement, prepare, write_qdq
from compress.qdq.lint import lint_model, rules_for
from compress.qdq.placement import place
from compress.qdq.plan import TARGETS, ActivationRange
from compress.quantize import calibrate, make_quant_plan
from compress.quantize.sessions import sqnr_db, with_outputs

CASES = [(name, target) for name in GRAPHS for target in TARGETS]


def plan_of(model, target, observer="mse"):
    return make_quant_plan(calibrate(model, [images(model)]), target=target, observer=observer)


@pytest.mark.parametrize("name", GRAPHS)
def test_prepared_graph_computes_the_same(name):
    model = GRAPHS[name]()
    feed = images(model, 4)
    for want, got in zip(run(model, feed), run(prepare(model), feed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GRAPHS)
def test_preparing_twice_changes_nothing(name):
    once = prepare(GRAPHS[name]())
    bare = onnx.ModelProto()
    bare.CopyFrom(once)
    finished(bare)  # or it would be taken as it is
    for twice in (prepare(once), prepare(bare)):
        assert twice.SerializeToString(deterministic=True) == once.SerializeToString(
            deterministic=True
        )


def test_every_batchnorm_behind_a_weighted_layer_is_folded():
    kinds = {node.op_type for node in prepare(GRAPHS["folded"]()).graph.node}
    assert "BatchNormalization" not in kinds and "ReduceMean" not in kinds


@pytest.mark.parametrize(("name", "target"), CASES)
def test_int8_answers_are_close_to_float(name, target):
    model = GRAPHS[name]()
    written = write_qdq(model, plan_of(model, target))
    feed = images(model, 8, seed=5)
    assert sqnr_db(run(model, feed), run(written, feed, plain=True)) > 22


@pytest.mark.parametrize(("name", "target"), CASES)
def test_written_graph_is_valid_and_keeps_its_batch_free(name, target):
    model = GRAPHS[name]()
    written = write_qdq(model, plan_of(model, target))
    onnx.checker.check_model(written, full_check=True)
    for count in (1, 3):
        assert run(written, images(model, count))[0].shape == (count, 10)
    scales = [
        graph_value
        for graph_value in (
            GraphIndex(written).constant(node.input[1])
            for node in written.graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        )
        if graph_value is not None
    ]
    assert all((scale > 0).all() and np.isfinite(scale).all() for scale in scales)


@pytest.mark.parametrize("name", ["residual", "depthwise"])
@pytest.mark.parametrize("target", TARGETS)
def test_written_graph_equals_its_arithmetic_in_numpy(name, target):
    """Every weighted layer, recomputed from integers: (codes - zero) * scale, summed in float64."""
    model = GRAPHS[name]()
    written = write_qdq(model, plan_of(model, target))
    graph = GraphIndex(written)
    feed = images(model, 3)
    layers = [n for n in written.graph.node if n.op_type in ("Conv", "Gemm")]
    quantized = [(dequantize_before(graph, n.input[0]), n) for n in layers]
    names = [name for dq, n in quantized for name in (dq.input[0], n.input[0], n.output[0])]
    probe = onnx.ModelProto()
    probe.CopyFrom(written)
    for tensor in dict.fromkeys(names):
        if tensor not in graph.outputs:
            probe.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
    names = list(dict.fromkeys(names))
    values = dict(zip(names, run(probe, feed, plain=True, names=names), strict=True))
    for dequantize, node in quantized:
        x = integers_to_real(graph, dequantize, values[dequantize.input[0]])
        read = values[node.input[0]]  # the same, or moved
        np.testing.assert_allclose(x.reshape(read.shape), read, rtol=1e-6, atol=1e-7)
        x = x.reshape(read.shape)
        w = constant_real(graph, node.input[1])
        b = constant_real(graph, node.input[2])
        want = convolve(node, x, w, b) if node.op_type == "Conv" else x @ w.T + b
        np.testing.assert_allclose(values[node.output[0]], want, rtol=1e-4, atol=1e-4)


def chain():
    """conv, MaxPool, conv, linear layer; every tensor has one reader."""
    s = Sketch(SHAPE)
    x = s.relu(s.conv(s.relu(s.conv("input", "stem", 3, 8)), "c1", 8, 8))
    x = s.op("MaxPool", [x], "max", kernel_shape=[2, 2], strides=[2, 2])
    s.head(s.relu(s.conv(x, "c2", 8, 12)), 12)
    return s.model()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("node", "tensors"),
    [("c1", ["stem_relu"]), ("c2", ["c1_relu", "max"]), ("logits", ["pool", "flat"])],
)
def test_float_node_reads_a_tensor_that_was_not_quantized(node, tensors, target):
    """The range of what it reads is made useless: that must not be heard in the answer."""
    model = chain()
    plan = plan_of(model, target)
    useless = {name: ActivationRange(-1e6, 1e6, 1e6) for name in tensors}
    plan = plan.changed(activations={**plan.activations, **useless})
    feed = images(model, 8, seed=5)
    reference = run(model, feed)
    assert sqnr_db(reference, run(write_qdq(model, plan), feed, plain=True)) < 12
    float_node = write_qdq(model, plan.keep_float([node], "a test"))
    assert sqnr_db(reference, run(float_node, feed, plain=True)) > 22


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", GRAPHS)
def test_any_one_layer_can_be_left_float(name, target):
    model = GRAPHS[name]()
    plan = plan_of(model, target)
    feed = images(model, 8, seed=5)
    reference = run(model, feed)
    graph = GraphIndex(prepare(model))
    for node in [n.name for n in graph.nodes if graph.weight(n)]:
        written = write_qdq(model, plan.keep_float([node], "a test"))
        assert sqnr_db(reference, run(written, feed, plain=True)) > 22
        names = {n.name: n for n in written.graph.node}
        made = {end: n for n in written.graph.node for end in n.output}
        if node in names and names[node].input[0] in made:
            assert made[names[node].input[0]].op_type != "DequantizeLinear"


@pytest.mark.parametrize("target", TARGETS)
def test_answer_of_the_last_linear_layer_is_not_quantized(target):
    s = Sketch(SHAPE)
    s.op("Softmax", [s.head(s.relu(s.conv("input", "stem", 3, 8)), 8)], "answer")
    model = s.model(["answer"])
    written = write_qdq(model, plan_of(model, target))
    (softmax,) = (n for n in written.graph.node if n.op_type == "Softmax")
    assert list(softmax.input) == ["logits"]


def dequantize_before(graph, name):
    """The DequantizeLinear that made a tensor, or what a Reshape moved."""
    while (made := graph.producer[name]).op_type in ("Flatten", "Reshape"):
        name = made.input[0]
    assert made.op_type == "DequantizeLinear"
    return made


def integers_to_real(graph, dequantize, codes):
    scale, zero = (graph.constant(name) for name in dequantize.input[1:3])
    axis = next((a.i for a in dequantize.attribute if a.name == "axis"), 1)
    if scale.ndim:
        shape = [1] * codes.ndim
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return (codes.astype(np.float64) - zero.astype(np.float64)) * scale


def constant_real(graph, name):
    if graph.is_constant(name):
        return graph.constant(name).astype(np.float64)
    dequantize = graph.producer[name]
    return integers_to_real(graph, dequantize, graph.constant(dequantize.input[0]))


def convolve(node, x, w, b):
    import torch

    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    pads = options.get("pads", [0] * 4)
    result = torch.nn.functional.conv2d(
        torch.from_numpy(np.pad(x, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))),
        torch.from_numpy(w.copy()),
        torch.from_numpy(b.copy()),
        stride=options.get("strides", [1, 1]),
        groups=options.get("group", 1),
    )
    return result.numpy()


@pytest.mark.parametrize("name", [n for n in GRAPHS if n != "folded"])
def test_onnxruntime_fuses_every_convolution(name, tmp_path):
    import onnxruntime as ort

    model = GRAPHS[name]()
    written = write_qdq(model, plan_of(model, "onnxruntime"))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(written.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(str(tmp_path / "optimized.onnx"))
    kinds = collections.Counter(node.op_type for node in optimized.graph.node)
    wanted = sum(node.op_type == "Conv" for node in written.graph.node)
    assert kinds["QLinearConv"] == wanted and "Conv" not in kinds and "FusedConv" not in kinds
    floats = {"Add", "Concat", "Gemm", "Mul", "Relu", "Clip"} & set(kinds)
    assert floats == {"squeeze_excite": {"Mul"}}.get(name, set())  # hard-swish has no kernel


def test_onnxruntime_leaves_what_lies_between_ops_in_float_alone(tmp_path):
    """The terms of a GELU: each was rounded, for a product in int8 that gained nothing."""
    import onnxruntime as ort

    s = Sketch((16, 8))
    x = s.op(
        "Add", [s.op("MatMul", ["input", s.floats("w1", 8, 32)], "up"), s.floats("b1", 32)], "h"
    )
    erf = s.op("Erf", [s.op("Mul", [x, s.constant("root", np.float32(0.7071))], "scaled")], "erf")
    one, half = s.constant("one", np.float32(1)), s.constant("half", np.float32(0.5))
    gate = s.op("Mul", [x, s.op("Add", [erf, one], "shifted")], "gate")
    x = s.op("MatMul", [s.op("Mul", [gate, half], "gelu"), s.floats("w2", 32, 8)], "down")
    x = s.op("Relu", [s.op("Add", [x, "input"], "joined")], "relu")
    x = s.op("MatMul", [x, s.floats("w3", 8, 4)], "last")
    model = s.model(["last"])
    written = write_qdq(model, plan_of(model, "onnxruntime"))
    rounded = {n.input[0] for n in written.graph.node if n.op_type == "QuantizeLinear"}
    assert rounded == {"input", "gelu", "relu"}
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(written.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 3


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_a_pool_behind_a_float_layer_is_computed_in_float_by_onnxruntime(activation, tmp_path):
    """It moved the Q before the pool, and ran an int8 MaxPool that took ten times as long."""
    import onnxruntime as ort

    s = Sketch(SHAPE)
    x = s.conv("input", "stem", 3, 16)
    x = s.relu(x) if activation == "Relu" else s.relu6(x)
    name = x
    x = s.op("MaxPool", [x], "max", kernel_shape=[3, 3], strides=[2, 2])
    s.head(s.relu(s.conv(x, "c2", 16, 12)), 12)
    model = s.model()
    plan, feed = plan_of(model, "onnxruntime").keep_float(["stem"], "a test"), images(model, 8)
    written = write_qdq(model, plan)
    assert not lint_model(written, rules=rules_for("onnxruntime"))
    rounded = {n.input[0] for n in written.graph.node if n.op_type == "QuantizeLinear"}
    assert "max" in rounded and name not in rounded
    pooled = [run(with_outputs(m, ["max"]), feed, names=["max"])[0] for m in (model, written)]
    np.testing.assert_array_equal(*pooled)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(written.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(str(tmp_path / "optimized.onnx")).graph.node
    made = {end: node.op_type for node in nodes for end in node.output}
    (pool,) = (node for node in nodes if "MaxPool" in node.op_type)
    assert made[pool.input[0]] in ("Conv", "FusedConv", "ReorderOutput")


def test_uint8_for_onnxruntime_and_symmetric_int8_for_tensorrt():
    model = residual()
    for target, kind in (("onnxruntime", np.uint8), ("openvino", np.uint8), ("tensorrt", np.int8)):
        graph = GraphIndex(write_qdq(model, plan_of(model, target)))
        zeros = [graph.constant(n.input[2]) for n in graph.nodes if n.op_type == "QuantizeLinear"]
        assert {zero.dtype for zero in zeros} == {np.dtype(kind)}
        if target == "tensorrt":
            assert all(not zero.any() for zero in zeros)


def test_tensorrt_keeps_biases_in_float_and_one_q_per_tensor():
    for name, build in GRAPHS.items():
        graph = GraphIndex(write_qdq(build(), plan_of(build(), "tensorrt")))
        quantized = [n.input[0] for n in graph.nodes if n.op_type == "QuantizeLinear"]
        assert len(quantized) == len(set(quantized)), name
        for node in graph.nodes:
            if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
                assert graph.is_constant(node.input[2]), name
            if node.op_type == "DequantizeLinear" and graph.is_constant(node.input[0]):
                assert np.abs(graph.constant(node.input[0]).astype(int)).max() <= 127


def test_tensorrt_quantizes_the_identity_side_of_a_residual_add():
    graph = GraphIndex(write_qdq(residual(), plan_of(residual(), "tensorrt")))
    nodes = {node.name: node for node in graph.nodes}
    assert [graph.producer[i].op_type for i in nodes["add"].input] == ["Conv", "DequantizeLinear"]
    # both sides of the second are convolutions: the shortcut is the identity
    sides = [graph.producer[i] for i in nodes["add2"].input]
    assert sides[0].name == "c4" and sides[1].op_type == "DequantizeLinear"
    assert nodes["add"].input[1] == nodes["c1"].input[0]  # one pair for both readers


def test_tensorrt_leaves_squeeze_excite_and_pooling_in_float():
    graph = GraphIndex(
        write_qdq(GRAPHS["squeeze_excite"](), plan_of(GRAPHS["squeeze_excite"](), "tensorrt"))
    )
    nodes = {node.name: node for node in graph.nodes}
    for name in ("reduce", "excite"):
        assert graph.is_constant(nodes[name].input[1])
    assert graph.producer[nodes["squeeze"].input[0]].op_type == "Mul"
    assert not graph.is_constant(nodes["project"].input[1])


@pytest.mark.parametrize("name", GRAPHS)
def test_openvino_has_no_pair_behind_what_only_moves_rounded_values(name, monkeypatch):
    model = GRAPHS[name]()
    plan, feed = plan_of(model, "openvino"), images(model, 8)
    written = write_qdq(model, plan)
    graph = GraphIndex(written)
    for quantize in (n for n in written.graph.node if n.op_type == "QuantizeLinear"):
        moved = graph.producer.get(quantize.input[0])
        if moved is not None and graph.keeps_scale(moved) and moved.op_type != "Resize":
            assert graph.producer[moved.input[0]].op_type != "DequantizeLinear"
    monkeypatch.setattr(placement, "_drop_repeated", lambda graph, found: None)
    for one, other in zip(
        *(run(m, feed, plain=True) for m in (written, write_qdq(model, plan))), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def joined(also_read=False):
    """Two branches of one Concat, as in SqueezeNet; the first is perhaps read by a layer too."""
    s = Sketch(SHAPE)
    x = s.relu(s.conv("input", "squeeze", 3, 4))
    one, other = s.relu(s.conv(x, "one", 4, 8, k=1)), s.relu(s.conv(x, "other", 4, 8))
    x = s.relu(s.conv(s.op("Concat", [one, other], "both", axis=1), "last", 16, 8))
    if also_read:
        x = s.op("Add", [x, s.relu(s.conv(one, "beside", 8, 8))], "sum")
    s.head(x, 8)
    return s.model()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_what_only_a_concat_reads_is_rounded_to_its_steps_at_once(target):
    plan = plan_of(joined(), target)
    written = write_qdq(joined(), plan)
    graph = GraphIndex(written)
    nodes = {node.name: node for node in written.graph.node}
    steps = {
        n.input[0]: float(graph.constant(n.input[1]))
        for n in written.graph.node
        if n.op_type == "QuantizeLinear"
    }
    assert steps["one_relu"] == steps["other_relu"] == steps.get("both", steps["one_relu"])
    assert ("both" in steps) == (target == "onnxruntime")  # whose Concat needs it to be int8
    seen = with_outputs(written, [*nodes["both"].input, nodes["last"].input[0]])
    *parts, read = run(seen, images(joined(), 8), plain=True)[1:]
    np.testing.assert_array_equal(np.concatenate(parts, 1), read)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_what_others_read_too_keeps_its_own_steps(target):
    found = place(GraphIndex(prepare(joined(also_read=True))), target)
    assert found.source("one_relu") == "one_relu" and found.source("other_relu") == "both"
    assert "both" in found.readers


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_openvino_rounds_before_a_pad_and_onnxruntime_behind_float_ops_after_it(mode):
    s = Sketch(SHAPE)
    x = s.op("Elu", [s.conv("input", "first", 3, 8)], "elu")
    x = s.op("Pad", [x, s.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))], "pad", mode=mode)
    s.head(s.relu(s.conv(x, "last", 8, 8, pads=[0] * 4)), 8)
    model = s.model()
    for target, before in (("openvino", "elu"), ("onnxruntime", "pad")):
        written = write_qdq(model, plan_of(model, target))
        quantized = {n.input[0] for n in written.graph.node if n.op_type == "QuantizeLinear"}
        assert quantized & {"elu", "pad"} == {before}
        assert lint_model(written, rules=rules_for(target)) == []


def test_onnxruntime_joins_in_float_what_a_pad_in_float_reads():
    """Bytes would be made floats again at once, and be rounded once more behind the pad."""
    s = Sketch(SHAPE)
    one, other = (s.op("Elu", [s.conv("input", f"conv{i}", 3, 4)], f"elu{i}") for i in (1, 2))
    x = s.op("Concat", [one, other], "both", axis=1)
    x = s.op("Pad", [x, s.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))], "pad", mode="edge")
    s.head(s.relu(s.conv(x, "last", 8, 8, pads=[0] * 4)), 8)
    found = place(GraphIndex(prepare(s.model())), "onnxruntime")
    assert not found.readers.keys() & {one, other, "both"} and "pad" in found.readers


def test_openvino_quantizes_nothing_that_only_float_ops_read():
    model = GRAPHS["preactivated"]()  # Add -> BatchNorm, which stays in float there
    graph = GraphIndex(write_qdq(model, plan_of(model, "openvino")))
    nodes = {node.name: node for node in graph.nodes}
    assert nodes["bn2"].input[0] == "sum" and graph.producer["sum"].input[0] == "stem"
    assert graph.producer[nodes["c1"].input[0]].op_type == "DequantizeLinear"


def test_a_layer_that_reads_no_image_stays_float_and_says_so():
    """A positional encoding, made of the size of the batch alone, weighed by a convolution."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        net (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y)
        <int64[3] size = {3, 8, 8}, float one = {1.0}> {
            batch = Shape <start = 0, end = 1> (x)
            shape = Concat <axis = 0> (batch, size)
            places = Expand (one, shape)
            encoding = Conv (places, w)
            answer = Conv (x, w)
            y = Add (answer, encoding)
        }""")
    weight = np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    graph = GraphIndex(prepare(model))
    (encoding,) = (node.name for node in graph.nodes if "encoding" in node.output)
    assert place(graph, "openvino").left_float == {
        encoding: "what it reads is the same for every image"
    }


def test_a_nearly_dead_channel_does_not_overflow_the_bias():
    model = GRAPHS["dead_channels"]()
    graph = GraphIndex(write_qdq(model, plan_of(model, "onnxruntime")))
    node = next(n for n in graph.nodes if n.name == "c3")
    dequantize = graph.producer[node.input[2]]
    bias = graph.constant("c3_b") if graph.is_constant("c3_b") else None
    original = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}["c3_b"]
    assert bias is None
    np.testing.assert_allclose(
        integers_to_real(graph, dequantize, graph.constant(dequantize.input[0])),
        original,
        atol=2e-3,
    )


def test_a_node_kept_float_reads_and_keeps_its_float_weight():
    plan = plan_of(residual(), "onnxruntime").keep_float(["c3"], "asked for")
    graph = GraphIndex(write_qdq(residual(), plan))
    node = next(n for n in graph.nodes if n.name == "c3")
    assert graph.is_constant(node.input[1])


def test_stored_integers_are_written():
    model = residual()
    from compress.qdq.plan import pack_codes, unpack_codes

    codes = np.arange(8 * 8 * 9).reshape(8, 8, 3, 3) % 5
    plan = plan_of(model, "tensorrt")
    packed = pack_codes(codes.astype(np.int8))
    plan = plan.changed(weights={"c1_w": WeightScales(0, (0.5,) * 8, packed)})
    graph = GraphIndex(write_qdq(model, plan))
    node = next(n for n in graph.nodes if n.name == "c1")
    np.testing.assert_array_equal(constant_real(graph, node.input[1]), codes * 0.5)
    np.testing.assert_array_equal(unpack_codes(packed, codes.shape), codes)


def test_plan_round_trip_and_replay(tmp_path):
    model = residual()
    plan = plan_of(model, "onnxruntime").keep_float(["c4"], "too sensitive")
    plan = plan.changed(biases={"c1": (0.5,) * 8}, notes=("a", "b"))
    plan.save(tmp_path / "plan.json")
    again = QuantPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert write_qdq(model, again).SerializeToString(deterministic=True) == write_qdq(
        model, plan
    ).SerializeToString(deterministic=True)


def test_mistakes_in_a_plan_are_named(tmp_path):
    model, plan = residual(), plan_of(residual(), "tensorrt")
    with pytest.raises(UnknownNameError, match="no such target 'tensorflow'"):
        QuantPlan("tensorflow")
    with pytest.raises(QuantizationError, match="no range for tensor"):
        write_qdq(model, plan.changed(activations={"x": ActivationRange(0, 1, 1)}))
    with pytest.raises(QuantizationError, match="node 'c99', which is not in the graph"):
        write_qdq(model, plan.changed(biases={"c99": (0.0,)}))
    with pytest.raises(QuantizationError, match="3 scales along axis 0"):
        write_qdq(model, plan.changed(weights={"c1_w": WeightScales(0, (1.0,) * 3)}))
    with pytest.raises(QuantizationError, match="is no quantization plan"):
        QuantPlan.from_json({"version": 1, "activations": 3})
    (tmp_path / "plan.json").write_text('{"version": 9}')
    with pytest.raises(QuantizationError, match=r"plan\.json.*version 9"):
        QuantPlan.load(tmp_path / "plan.json")
