"""Half precision: what is converted stays true, what is fragile stays fp32, and engines build."""

import foreign
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sketch import Sketch, run, sqnr_db

from compress.graph.fp16 import to_half

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return foreign.network()


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        found[value.name] = value.type.tensor_type.elem_type
    return found


def large(seed: int = 1, factor: float = 300.0) -> np.ndarray:
    x = np.random.default_rng(seed).uniform(0.5, 1, (2, 3, 8, 8)).astype(np.float32)
    return x * np.float32(factor)


def test_weights_and_activations_are_half_and_the_ends_are_not(network):
    half = to_half(network)
    types = types_of(half)
    convs = [node for node in half.graph.node if node.op_type in ("Conv", "Gemm")]
    assert {types[name] for node in convs for name in [*node.input, *node.output]} == {HALF}
    assert [types[name] for name in ("input", "logits")] == [FLOAT, FLOAT]
    assert [node.op_type for node in half.graph.node].count("Cast") == 2
    x = foreign.images(8)
    assert sqnr_db(run(network, x), run(half, x)) > 55
    assert half.ByteSize() < 0.6 * network.ByteSize()


def test_given_model_is_left_as_it_was(network):
    before = network.SerializeToString(deterministic=True)
    to_half(network)
    assert network.SerializeToString(deterministic=True) == before


def held_nodes(model):
    """Return the names of the nodes that compute in fp32 after conversion, by their types."""
    half = to_half(model)
    types = types_of(half)
    nodes = (node for node in half.graph.node if node.op_type != "Cast")
    return {node.name for node in nodes if any(types.get(name) == FLOAT for name in node.output)}


FRAGILE = {
    "exp": lambda s: s.add("Exp", s.add("Mul", "input", s.constant(0.03))),
    "power": lambda s: s.add("Sqrt", s.add("Pow", "input", s.constant(2.0))),
    "sum": lambda s: s.add("ReduceSum", "input", s.constant([2, 3], np.int64)),
    "mean over channels and space": lambda s: s.add(
        "Mul", s.add("ReduceL2", "input"), s.constant(0.5)
    ),
    "layer norm": lambda s: s.add(
        "LayerNormalization", "input", s.constant(np.ones(8)), s.constant(np.zeros(8))
    ),
    "instance norm": lambda s: s.add(
        "InstanceNormalization", "input", s.constant(np.ones(3)), s.constant(np.zeros(3))
    ),
    "softmax": lambda s: s.add("Softmax", s.add("Mul", "input", s.constant(0.02)), axis=1),
    "large constant": lambda s: s.add("Div", "input", s.constant(1e6)),
}


@pytest.mark.parametrize("name", FRAGILE)
def test_fragile_op_stays_fp32_and_right_for_large_values(name):
    s = Sketch()
    model = s.model(FRAGILE[name](s))
    half = to_half(model)
    held = held_nodes(model)
    fragile = model.graph.node[-2] if name != "power" else model.graph.node[0]
    assert fragile.name in held or model.graph.node[0].name in held
    reference, found = run(model, large()), run(half, large())
    assert np.isfinite(found).all()
    assert sqnr_db(reference, found) > 40


def test_average_of_few_pixels_is_half_and_of_many_is_not():
    for side, held in ((8, False), (64, True)):
        s = Sketch(("batch", 3, side, side))
        model = s.model(s.add("GlobalAveragePool", s.add("Relu", "input"), name="pool"))
        assert ("pool" in held_nodes(model)) is held


def test_inputs_that_must_be_fp32_stay_fp32():
    s = Sketch()
    scales = s.constant([1, 1, 2, 2])
    model = s.model(s.add("Resize", "input", "", scales, mode="nearest", name="resize"))
    half = to_half(model)
    resize = next(node for node in half.graph.node if node.op_type == "Resize")
    types = types_of(half)
    assert [types[resize.input[0]], types[resize.input[2]]] == [HALF, FLOAT]
    assert sqnr_db(run(model, large()), run(half, large())) > 55


def test_outputs_read_inside_the_graph_and_passed_through_keep_name_and_type():
    s = Sketch()
    inner = s.add("Relu", "input", name="inner")
    model = s.model(s.add("Sigmoid", inner))
    for name in (inner, "input_copy"):
        shape = ["batch", 3, 8, 8]
        model.graph.output.append(helper.make_tensor_value_info(name, FLOAT, shape))
    model.graph.node.append(helper.make_node("Identity", ["input"], ["input_copy"], "copy"))
    half = to_half(model)
    assert [v.name for v in half.graph.output] == ["logits", "inner_out", "input_copy"]
    assert {v.type.tensor_type.elem_type for v in half.graph.output} == {FLOAT}
    x = large(factor=2.0)
    assert sqnr_db(run(model, x), run(half, x)) > 50


def test_value_read_by_the_body_of_an_if_stays_fp32():
    s = Sketch()
    seen = s.add("Relu", "input", name="seen")
    bodies = {
        name: helper.make_graph(
            [helper.make_node(op, [seen], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", FLOAT, None)],
        )
        for name, op in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }
    out = s.add("If", s.constant(True, bool), name="choice", **bodies)
    model = s.model(s.add("Neg", out))
    assert {"seen", "choice"} <= set(held_nodes(model))
    x = large(factor=2.0)
    assert sqnr_db(run(model, x), run(to_half(model), x)) > 50


def test_int8_layers_keep_their_scales_and_the_rest_becomes_half(network):
    written = foreign.by_compress(network, "tensorrt")
    half = to_half(written)
    types = types_of(half)
    for node in half.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert types[node.input[1]] == FLOAT
    sigmoid = next(node for node in half.graph.node if node.op_type == "Sigmoid")
    assert types[sigmoid.output[0]] == HALF
    stored = {t.name: numpy_helper.to_array(t) for t in written.graph.initializer}
    kept = {t.name: numpy_helper.to_array(t) for t in half.graph.initializer}
    integers = [name for name, array in stored.items() if array.dtype == np.int8 and array.ndim > 1]
    assert integers
    assert all(np.array_equal(stored[name], kept[name]) for name in integers)
    x = foreign.images(16, seed=5)
    reference = run(network, x)
    assert sqnr_db(reference, run(half, x)) > sqnr_db(reference, run(written, x)) - 1.5


@pytest.mark.parametrize("kind", ["fp16", "int8 and fp16"])
def test_half_graphs_build_in_tensorrt_rtx_without_a_warning(network, kind):
    trt = pytest.importorskip("tensorrt_rtx")
    model = network if kind == "fp16" else foreign.by_compress(network, "tensorrt")
    assert foreign.build_messages(trt, to_half(model)) == []
