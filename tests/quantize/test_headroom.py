"""Longer steps where two products overflow in 16 bits, against the arithmetic of such kernels."""

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch
from onnx import helper
from test_methods import bench_of

from compress.graph.model import GraphIndex
from compress.qdq.plan import unpack_codes
from compress.qdq.writer import write_qdq
from compress.quantize import remedies
from compress.quantize.layerwise import layers
from compress.quantize.notes import decided
from compress.quantize.remedies import (
    LargestCodes,
    in_pairs,
    largest_codes,
    largest_sums,
    seven_bits,
    with_headroom,
)
from compress.quantize.search import auto
from compress.quantize.sessions import mean_db


def saturating(codes, activations):
    """Return what vpmaddubsw and additions in 32 bits make of rows, (O, K), and inputs, (B, K)."""
    products = codes[None].astype(np.int64) * activations[:, None].astype(np.int64)
    if products.shape[-1] % 2:
        products = np.pad(products, ((0, 0), (0, 0), (0, 1)))
    pairs = products[..., ::2] + products[..., 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(-1)


def in_one_row(op, codes):
    """Return the weights of each output, (O, taps, C), in the order in which kernels multiply."""
    return {
        "Conv": lambda: codes.transpose(0, 2, 3, 1).reshape(6, -1, 5),
        "Gemm": lambda: codes[:, None],
        "MatMul": lambda: codes.T[:, None],
        "ConvTranspose": lambda: codes.transpose(1, 2, 3, 0).reshape(6, -1, 5),
    }[op]()


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul", "ConvTranspose"])
def test_no_sum_of_a_pair_is_larger_than_the_largest(op):
    rng = np.random.default_rng(0)
    shape = {"Conv": (6, 5, 3, 3), "Gemm": (6, 7), "MatMul": (7, 6), "ConvTranspose": (5, 6, 2, 2)}
    codes = rng.integers(-127, 128, shape[op]).astype(np.int8)
    seen = rng.integers(0, 256, (50, {"Conv": 5, "ConvTranspose": 5}.get(op, 7)))
    pairs = in_pairs(seen)  # (P, C / 2, 2)
    node = helper.make_node(op, ["x", "w"], ["y"], **({"transB": 1} if op == "Gemm" else {}))
    rows = in_pairs(in_one_row(op, codes).astype(int))  # (O, taps, C / 2, 2)
    products = rows[:, :, None] * pairs
    of_one_sign = rows.prod(-1)[:, :, None] > 0
    real = (np.abs(products.sum(-1)) * of_one_sign).max((1, 2, 3))
    apart = (np.abs(rows * pairs.max(0)).sum(-1) * (rows.prod(-1) > 0)).max((1, 2))

    alone, together = pairs.max(0).astype(float)[None], pairs.sum(2).max(0).astype(float)[None]
    told = largest_sums(node, codes, LargestCodes(alone, together))
    assert (real <= told).all() and (told <= apart).all() and (told < apart).any()
    separate = LargestCodes(alone, alone.sum(-1))
    np.testing.assert_allclose(largest_sums(node, codes, separate), apart)


def of(*codes):
    """Return the largest codes of channels that are all large in one place, by group."""
    alone = in_pairs(np.array(codes, float))
    return LargestCodes(alone, alone.sum(-1))


def test_groups_have_inputs_of_their_own_and_depthwise_layers_no_neighbours():
    codes = np.full((4, 2, 1, 1), 100, np.int8)
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2)
    sums = largest_sums(node, codes, of([1, 2], [30, 40]))
    assert sums.tolist() == [300, 300, 7000, 7000]
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=8)
    channels = of(*[[255]] * 8)
    assert not largest_sums(node, np.full((8, 1, 3, 3), 127, np.int8), channels).any()


def test_the_second_and_the_third_input_are_no_pair():
    codes = np.array([[0, 100, 100, 0], [100, 100, 0, 0]], np.int8).reshape(2, 4, 1, 1)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    assert largest_sums(node, codes, of([255] * 4)).tolist() == [0, 51_000]


def network():
    """Pointwise layers of mostly positive weights, behind activations that all are large."""
    s = Sketch((16, 8, 8))
    x = s.relu(s.conv("input", "first", 16, 16, 1))
    x = s.relu(s.conv(x, "second", 16, 16, 1))
    s.head(x, 16)
    model = s.model()
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.ndim == 4:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.abs(value), tensor.name))
    return model


def integers(bench, plan):
    """Yield codes of the weights, (O, K), and of the inputs, (B, K), of each pointwise layer."""
    written = write_qdq(bench.prepared, plan, float_bias=True)
    graph = GraphIndex(written)
    for layer in layers(written, bench.fitted, ["first", "second"]):
        made = graph.producer[layer.node.input[1]]
        codes = graph.constant(made.input[0])
        activations = graph.producer[layer.node.input[0]]
        scale, zero = (graph.constant(name) for name in activations.input[1:])
        inputs = np.rint(layer.incoming / scale) + zero
        yield codes.reshape(len(codes), -1), inputs.transpose(0, 2, 3, 1).reshape(-1, 16)


@pytest.mark.parametrize("rounded", [False, True])
def test_no_pair_of_products_overflows_and_steps_are_shorter_than_with_seven_bits(rounded):
    bench = bench_of(network(), target="openvino")
    plain = bench.rounded(bench.ranges()) if rounded else bench.ranges()

    def overflows(plan):
        found = integers(bench, plan)
        return [
            (saturating(codes, inputs) != inputs @ codes.T.astype(int)).any()
            for codes, inputs in found
        ]

    safe = with_headroom(bench, plain)
    assert any(overflows(plain)) and not any(overflows(safe))
    steps = {
        name: np.mean(plan.weights["second_w"].scales)
        for name, plan in {"safe": safe, "seven": seven_bits(bench, plain)}.items()
    }
    assert steps["safe"] < 0.95 * steps["seven"]


def test_auto_leaves_no_pair_that_overflows_where_it_is_known_to():
    bench = bench_of(network(), target="openvino")
    free = auto(bench)
    bench.overflows = True
    safe = auto(bench)
    sums = [
        any((saturating(c, x) != x @ c.T.astype(int)).any() for c, x in integers(bench, plan))
        for plan in (free, safe)
    ]
    assert sums == [True, False]
    assert safe.notes[-1].startswith("longer steps where products overflow")
    # The figure that is told is that of the file, not of what was tried before.
    told = f"{mean_db(bench.judge(safe.changed(notes=())).each_db):.2f} dB"
    assert f": {told}" in decided(safe.notes)[0] and told in safe.notes[-1]
    assert with_headroom(bench, safe) is safe  # nothing is run for it


def test_channels_that_cannot_overflow_keep_their_step():
    bench = bench_of(network(), target="openvino")
    plan = bench.rounded(bench.ranges())
    safe = with_headroom(bench, plan)
    for name in ("first_w", "second_w"):
        before, after = plan.weights[name], safe.weights[name]
        factors = np.asarray(after.scales) / np.asarray(before.scales)
        assert factors.min() >= 1 and 1.2 < factors.max() < 2.05
        codes = [unpack_codes(each.codes, (16, 16, 1, 1)) for each in (before, after)]
        same = factors == 1
        np.testing.assert_array_equal(codes[0][same], codes[1][same])


def test_longer_steps_are_rounded_with_feedback_too():
    bench = bench_of(network(), target="openvino")
    safe = with_headroom(bench, bench.rounded(bench.ranges()))
    written = write_qdq(bench.prepared, safe, float_bias=True)
    (layer,) = layers(written, bench.fitted, ["second"])
    chosen = safe.weights["second_w"]
    scales = np.asarray(chosen.scales)[:, None, None, None]
    value = GraphIndex(bench.prepared).constant("second_w")
    codes = unpack_codes(chosen.codes, value.shape)
    wanted = layer.run(value)
    noise = [
        np.square(layer.run((each * scales).astype(np.float32)) - wanted).sum()
        for each in (codes, np.rint(value / scales))
    ]
    assert noise[0] < 0.7 * noise[1]


def test_a_network_that_cannot_overflow_keeps_its_plan(monkeypatch):
    monkeypatch.setattr(remedies, "LARGEST_SUM", 2**20)
    bench = bench_of(network(), target="openvino")
    plan = bench.ranges()
    assert with_headroom(bench, plan) is plan


def test_a_layer_that_reads_float_has_no_integers():
    bench = bench_of(network(), target="openvino")
    plan = bench.ranges().keep_float(["first"], "for this test")
    written = write_qdq(bench.prepared, plan, float_bias=True)
    found = {
        x.node.name: largest_codes(x) for x in layers(written, bench.fitted, ["first", "second"])
    }
    assert found["first"] is None
    alone, together = found["second"].alone, found["second"].together
    assert alone.shape == (1, 8, 2) and together.shape == (1, 8) and alone.max() > 200
    assert (together <= alone.sum(2)).all() and (together < 0.98 * alone.sum(2)).any()


def test_a_graph_of_a_fixed_batch_is_asked_for_one():
    s = Sketch((3, 8, 8))
    sizes = s.constant("sizes", np.array([1, 3, 8, 8]))
    x = s.op("Resize", ["input", "", "", sizes], "sized", mode="linear")
    s.head(s.relu(s.conv(x, "conv", 3, 8)), 8)
    model = s.model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    bench = bench_of(model, target="openvino")
    assert not bench.is_free
    assert with_headroom(bench, bench.ranges()).activations
