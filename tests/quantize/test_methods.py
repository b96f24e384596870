"""Corrections do what they claim, and auto never makes it worse."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from int8_graphs import GRAPHS, Sketch, images, residual, run
from onnx import ModelProto
from threadpoolctl import threadpool_info

from compress import plugins
from compress.errors import QuantizationError
from compress.graph.model import GraphIndex
from compress.pipeline.cautions import of_stage
from compress.qdq import TARGETS, QuantPlan, prepare, write_qdq
from compress.qdq.rewrite import apply_corrections
from compress.quantize import (
    api,
    calibrate,
    make_quant_plan,
    quantize_onnx,
    quantize_targets,
    rounding,
)
from compress.quantize.api import METHODS, plan_by
from compress.quantize.calibration import activation_of, observed_tensors
from compress.quantize.equalization import equalize, scalable
from compress.quantize.images import CalibrationImages, images_in
from compress.quantize.layerwise import (
    channel_means,
    correct_biases,
    find_shift,
    float_means,
    layers,
    some_positions,
)
from compress.quantize.observers.mse import Noise
from compress.quantize.rounding import _patches, best_scales, fit_codes, improve_rounding
from compress.quantize.sessions import answers, mean_db, sqnr_db, with_outputs
from compress.quantize.workbench import Workbench


def with_channels(prepared, calibration, target="onnxruntime"):
    """Return what is seen of tensors and of the channels that can be rescaled."""
    scaled = scalable(GraphIndex(prepared), observed_tensors(prepared, [target]))
    return calibrate(prepared, calibration, targets=[target], by_channel=scaled)


def bench_of(model, target="onnxruntime", count=32):
    prepared = prepare(model)
    calibration = CalibrationImages(GraphIndex(prepared), [images(model, count)])
    statistics = with_channels(prepared, calibration, target)
    return Workbench(prepared, calibration, statistics, target, None, {})


@pytest.mark.parametrize(("side", "tried", "judging"), [(8, 64, 100), (120, 16, 32)])
def test_of_small_images_more_serve(side, tried, judging):
    sketch = Sketch((3, side, side))
    sketch.head(sketch.conv("input", "c", 3, 4), 4)
    bench = bench_of(sketch.model(), count=200)
    assert images_in(bench.tried) == tried and images_in(bench.judging) == judging


@pytest.mark.parametrize("name", ["residual", "concat", "squeeze_excite", "two_inputs"])
def test_running_layer_by_layer_equals_running_the_whole(name):
    model = GRAPHS[name]()
    plan = make_quant_plan(calibrate(model, [images(model)]), target="tensorrt")
    written = write_qdq(model, plan)
    feed = images(model, 4)
    graph = GraphIndex(written)
    names = [
        n.name for n in graph.nodes if n.op_type == "Conv" and not graph.is_constant(n.input[1])
    ]
    probe = ModelProto()
    probe.CopyFrom(written)
    for layer in names:
        probe.graph.output.append(onnx.helper.make_empty_tensor_value_info(layer))
    wanted = dict(zip(names, run(probe, feed, plain=True, names=names), strict=True))
    for outputs in (False, True):
        for layer in layers(written, feed, names, outputs=outputs):
            assert (layer.output is not None) == outputs
            np.testing.assert_allclose(layer.run(), wanted[layer.node.name], atol=1e-4)


@pytest.mark.parametrize("name", ["residual", "depthwise", "squeeze_excite"])
def test_corrected_biases_restore_the_means_behind_the_activation(name):
    model = prepare(GRAPHS[name]())
    feed = images(model, 16)
    plan = make_quant_plan(calibrate(model, [feed]), target="tensorrt", observer="percentile")
    coarse = {  # a poor plan, so that there is something to correct
        n: type(r)(r.low * 0.4, r.high * 0.4, r.limit * 0.4) for n, r in plan.activations.items()
    }
    plan = plan.changed(activations=coarse)
    graph = GraphIndex(model)
    nodes = [n for n in graph.nodes if n.op_type == "Conv" and n.name not in ("reduce", "excite")]
    tensors = [activation_of(graph, node).output for node in nodes]
    wanted = float_means(model, feed, tensors)

    def distance(found: QuantPlan) -> float:
        means = float_means(write_qdq(model, found), feed, tensors)
        return max(np.abs(means[t] - wanted[t]).max() for t in tensors)

    assert distance(correct_biases(model, plan, feed)) < 0.5 * distance(plan)


@pytest.mark.parametrize("name", ["residual", "separable"])
def test_means_of_a_rescaled_graph_are_those_of_the_graph_rescaled(name):
    model = prepare(with_uneven_channels(GRAPHS[name]()))
    bench = bench_of(model, "tensorrt")
    plan = bench.equalized(bench.ranges(observer="percentile"), 1.0)
    assert plan.equalization
    rescaled = apply_corrections(model, plan)
    graph = GraphIndex(rescaled)
    tensors = [activation_of(graph, n).output for n in graph.nodes if n.op_type == "Conv"]
    wanted = float_means(rescaled, bench.fitted, tensors)
    means = float_means(
        write_qdq(model, bench.corrected(plan), float_bias=True), bench.fitted, tensors
    )
    for tensor in tensors:
        spread = max(np.abs(wanted[tensor]).max(), 1e-3)
        assert np.abs(means[tensor] - wanted[tensor]).max() < 0.05 * spread, tensor


def test_shift_of_a_clipped_channel_is_matched_after_the_clip():
    s = Sketch((3, 8, 8))
    x = s.relu6(s.conv("input", "c", 3, 4))
    s.head(x, 4)
    graph = GraphIndex(prepare(s.model()))
    activation = activation_of(graph, next(n for n in graph.nodes if n.name == "c"))
    output = np.random.default_rng(0).normal(0.5, 2.0, (8, 4, 8, 8)).astype(np.float32)
    wanted = channel_means(activation.value(output + 0.2))
    some = some_positions(output, 8)
    np.testing.assert_allclose(find_shift(some, activation, wanted), 0.2, atol=0.01)


def followed_by(kind: str) -> ModelProto:
    s = Sketch((3, 8, 8))
    x = s.conv("input", "c", 3, 4)
    if kind in ("silu", "hard-swish of two"):
        gate = {"silu": ("Sigmoid", {}), "hard-swish of two": ("HardSigmoid", {"alpha": 1 / 6})}
        op, options = gate[kind]
        x = s.op("Mul", [x, s.op(op, [x], "gate", **options)], "end")
    else:
        x = s.op(kind, [x], "end")
    s.head(s.relu(s.conv(x, "next", 4, 4)), 4)
    return s.model()


@pytest.mark.parametrize(
    "kind", ["Relu", "Sigmoid", "HardSigmoid", "HardSwish", "silu", "hard-swish of two"]
)
def test_activation_is_that_of_the_graph_and_its_slope_the_derivative(kind):
    model = prepare(followed_by(kind))
    graph = GraphIndex(model)
    activation = activation_of(graph, next(n for n in graph.nodes if n.name == "c"))
    assert activation.output == "end"
    names, feed = ["c", "end"], images(model, 8)
    before, after = run(with_outputs(model, names), feed, names=names)
    np.testing.assert_allclose(activation.value(before), after, atol=1e-6)
    z = np.linspace(-7.05, 7.05, 142)
    slope = (activation.value(z + 1e-6) - activation.value(z - 1e-6)) / 2e-6
    np.testing.assert_allclose(activation.slope(z), slope, atol=1e-4)
    seen = calibrate(model, [feed], targets=["onnxruntime"]).tensors
    if kind != "Relu":  # that is part of the convolution: only its output is quantized
        assert np.array_equal(seen["c"].through(z), activation.value(z))
        assert seen["end"].through is None


def with_uneven_channels(model):
    """Return ``model`` with channels of very different sizes in every convolution."""
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.ndim == 4:
            sizes = np.logspace(-1.5, 0, len(value), dtype=np.float32)
            uneven = value * sizes[::-1].reshape(-1, 1, 1, 1)
            tensor.CopyFrom(onnx.numpy_helper.from_array(uneven, tensor.name))
    return model


@pytest.mark.parametrize(
    ("name", "scaled"),
    [
        ("residual", {"stem", "c1", "c2", "c3", "c4", "down", "logits"}),
        ("concat", {"stem", "a", "b", "c", "d", "logits"}),
        ("squeeze_excite", {"reduce"}),
        ("folded", {"c1", "c2"}),
        ("shuffle", set()),
        ("dense", {"c1", "bn1", "bn2", "logits"}),
        ("separable", {"stem", "point", "filter", "up", "last", "logits"}),
        ("shared_constants", {"stem", "a_bn", "a", "b_bn", "b", "logits"}),
    ],
)
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_equalization_goes_through_all_that_only_moves_or_adds(name, scaled, alpha):
    model = prepare(with_uneven_channels(GRAPHS[name]()))
    feed = images(model, 8)
    plan, _ = equalize(model, QuantPlan("tensorrt"), with_channels(model, [feed]), alpha)
    nodes = {step.producer or step.consumer for step in plan.equalization}
    names = {n.name: n.output[0] for n in model.graph.node}
    assert scaled <= nodes | {names[n] for n in nodes}, plan.notes
    rescaled = apply_corrections(model, plan)
    np.testing.assert_allclose(run(rescaled, feed)[0], run(model, feed)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["residual", "depthwise", "separable"])
def test_equalized_graph_computes_the_same_of_much_larger_values(name):
    model = prepare(with_uneven_channels(GRAPHS[name]()))
    feed = images(model, 8)
    small = {name: value / 20 for name, value in feed.items()}
    plan, _ = equalize(model, QuantPlan("tensorrt"), with_channels(model, [small]), 1.0)
    rescaled = apply_corrections(model, plan)
    np.testing.assert_allclose(run(rescaled, feed)[0], run(model, feed)[0], rtol=1e-3, atol=1e-3)


def test_what_equalization_cannot_scale_is_said():
    model = prepare(with_uneven_channels(GRAPHS["squeeze_excite"]()))
    plan, _ = equalize(model, QuantPlan("tensorrt"), with_channels(model, [images(model, 8)]), 0.5)
    (note,) = plan.notes
    assert "Sigmoid" in note and "HardSwish" in note


@pytest.mark.parametrize("name", ["residual", "dead_channels", "separable"])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_equalized_graph_computes_the_same(name, alpha):
    model = prepare(GRAPHS[name]())
    feed = images(model, 64)
    plan, _ = equalize(model, QuantPlan("onnxruntime"), with_channels(model, [feed]), alpha)
    assert plan.equalization
    rescaled = apply_corrections(model, plan)
    assert any(np.ptp(step.factors) > 0.05 for step in plan.equalization)
    np.testing.assert_allclose(run(rescaled, feed)[0], run(model, feed)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_tensors_that_depthwise_layers_alone_read_are_scaled_to_one_range(alpha):
    """Also where nothing lies between the layers; with alpha 0 all others stay as they are."""
    model = prepare(with_uneven_channels(GRAPHS["separable"]()))
    feed = images(model, 2048)
    plan, _ = equalize(model, QuantPlan("tensorrt"), with_channels(model, [feed]), alpha)
    rescaled = apply_corrections(model, plan)
    names = ["point", "stem_relu"]
    ranges = [
        np.abs(value).max(axis=(0, 2, 3))
        for graph in (rescaled, model)
        for value in run(with_outputs(graph, names), feed, names=names)
    ]
    alone, other, alone_before, other_before = ranges
    assert alone.min() > 0.99 * alone.max() > 4 * alone_before.min()
    assert np.array_equal(other, other_before) == (alpha == 0)


@pytest.mark.parametrize(
    "name",
    ["residual", "concat", "dense", "dead_channels", "separable"],
)
def test_ranges_of_the_rescaled_graph_follow_from_the_channels_of_the_graph(name):
    model = prepare(with_uneven_channels(GRAPHS[name]()))
    feed = images(model, 256)
    plan, told = equalize(model, QuantPlan("onnxruntime"), with_channels(model, [feed]), 0.5)
    assert plan.equalization
    seen = calibrate(apply_corrections(model, plan), [feed], targets=["onnxruntime"])
    for tensor, wanted in seen.tensors.items():
        found = told.tensors[tensor]
        ends = (wanted.low, wanted.high)
        assert (found.low, found.high) == pytest.approx(ends, rel=1e-4, abs=1e-6)
        choose = plugins.create("observers", "mse")
        noise = Noise(*wanted.bins(2048), wanted.through)
        least = noise.affine(*map(np.atleast_1d, choose(wanted, symmetric=False)))
        assert noise.affine(*map(np.atleast_1d, choose(found, symmetric=False))) <= 1.1 * least


def test_weight_scales_are_the_best_of_their_grid():
    rows = np.random.default_rng(0).standard_normal((20, 9)).astype(np.float32)
    rows[0] = 0
    rows[1] = np.array([16, -3, 2, 0, 5, 9, -16, 1, 7], np.float32) * 0.1  # on a grid of 16
    found = best_scales(rows)

    def error(row, scale):
        return np.square(np.rint(row / scale) * scale - row).sum()

    for row, scale in zip(rows[1:], found[1:], strict=True):
        brute = min(error(row, np.abs(row).max() / m) for m in range(16, 128))
        assert error(row, scale) == pytest.approx(brute, rel=1e-3, abs=1e-9)
    assert found[0] > 0 and error(rows[1], found[1]) < 1e-9


def test_rounding_with_feedback_answers_better_than_rounding_to_nearest():
    random = np.random.default_rng(0)
    x = random.standard_normal((1, 600, 12)) @ random.standard_normal((12, 12))
    weight = random.standard_normal((1, 5, 12))
    codes, scales = fit_codes(x.transpose(0, 2, 1).astype(np.float32), weight)
    step = np.abs(weight).max(2)[..., None] / 127
    steps = np.abs(weight).max(2) / scales  # from zero to the largest
    assert np.allclose(steps, np.rint(steps), atol=1e-3) and steps.min() > 15
    feedback, nearest = codes * scales[..., None], np.rint(weight / step) * step
    errors = [np.square(x[0] @ (w - weight)[0].T).mean() for w in (feedback, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_rounding_in_blocks_equals_rounding_one_weight_after_the_other(monkeypatch):
    monkeypatch.setattr(rounding, "_PRODUCTS", 1)  # one scale
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 600, 150)).astype(np.float32)
    weight = random.standard_normal((2, 5, 150)).astype(np.float32)
    codes, scales = fit_codes(x.transpose(0, 2, 1), weight)
    for group in range(2):
        gram = (x[group].T @ x[group]).astype(np.float64)
        gram += 0.02 * np.diag(gram).mean() * np.eye(150)
        backwards = gram[::-1, ::-1]  # from the last weight to the first
        upper = np.linalg.cholesky(np.linalg.inv(backwards)).T  # Frantar et al., algorithm 1
        left, expected = weight[group, :, ::-1].astype(float), np.zeros((5, 150))
        for k in range(150):
            step = scales[group]
            expected[:, k] = np.clip(np.rint(left[:, k] / step), -127, 127)
            error = (left[:, k] - expected[:, k] * step) / upper[k, k]
            left[:, k:] -= error[:, None] * upper[k, k:]
        assert (codes[group, :, ::-1] == expected).mean() > 0.995  # ties may fall either way


def test_what_single_precision_cannot_solve_is_solved_in_double(monkeypatch):
    random = np.random.default_rng(0)
    x = random.standard_normal((1, 30, 500)).astype(np.float32)
    weight = random.standard_normal((1, 3, 30)).astype(np.float32)
    expected, _ = fit_codes(x, weight)

    def single(*asked, **options):
        raise np.linalg.LinAlgError("Matrix is not positive definite")

    monkeypatch.setattr(rounding, "cholesky", single)
    codes, _ = fit_codes(x, weight)
    assert (codes == expected).mean() > 0.95


def test_a_plan_does_not_depend_on_the_number_of_cores(tmp_path, monkeypatch):
    """Sums of products come out otherwise, by a bit, where other threads share them."""

    def threads():
        return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

    seen = []
    original = api.calibrate
    monkeypatch.setattr(
        api, "calibrate", lambda *a, **k: seen.append(threads()) or original(*a, **k)
    )
    onnx.save(GRAPHS["residual"](), tmp_path / "float.onnx")
    before = threads()
    feed = images(GRAPHS["residual"](), 16)
    quantize_onnx(tmp_path / "float.onnx", [feed], tmp_path / "int8.onnx", method="plain")
    assert seen == [{1}] and threads() == before


@pytest.mark.parametrize(("group", "stride", "dilation"), [(1, 1, 1), (8, 2, 1), (2, 1, 2)])
def test_patches_times_weights_is_the_convolution(group, stride, dilation, monkeypatch):
    s = Sketch((8, 9, 9))
    s.conv("input", "logits", 8, 8, group=group, strides=[stride] * 2, dilations=[dilation] * 2)
    model = s.model()
    feed = images(model, 2)
    output = run(model, feed)[0]
    node = model.graph.node[0]
    weight, bias = (onnx.numpy_helper.to_array(t) for t in model.graph.initializer)
    seen = _patches(node, weight.shape, feed["input"], np.random.default_rng(0))  # (G, K, P)
    rows = weight.reshape(group, 8 // group, -1)
    found = np.einsum("gkp,gok->gop", seen, rows).reshape(8, -1) + bias[:, None]
    expected = output.transpose(1, 0, 2, 3).reshape(8, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(rounding, "_MOST_ROWS", output.shape[3])  # of a row of an image
    some = _patches(node, weight.shape, feed["input"], np.random.default_rng(0))
    every = seen.reshape(*seen.shape[:2], -1, output.shape[3])
    assert some.shape[2] == output.shape[3]
    assert any(np.array_equal(some, every[:, :, row]) for row in range(every.shape[2]))


@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_rounding_keeps_answers_close(name):
    bench = bench_of(GRAPHS[name](), "tensorrt")
    plan = improve_rounding(bench.prepared, bench.ranges(), bench.fitted)
    assert all(w.codes for w in plan.weights.values()) and plan.weights
    assert mean_db(bench.judge(plan).each_db) > 20
    assert QuantPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
@pytest.mark.parametrize("name", ["depthwise", "two_inputs"])
def test_auto_is_at_least_as_close_as_ranges_alone_and_says_what_it_kept(name, target):
    bench = bench_of(GRAPHS[name](), target)
    plan = plan_by("auto", bench)
    assert mean_db(bench.judge(plan).each_db) >= mean_db(bench.judge(bench.ranges()).each_db) - 1e-3
    assert plan.method == "auto" and plan.trials[0].startswith("mse ranges:")
    tried = [trial for trial in plan.trials[1:] if " dB, " in trial]
    assert len(tried) > 1 and all("kept" in trial for trial in tried)
    kept = [trial.partition(": ")[0] for trial in tried if trial.endswith(", kept")]
    assert plan.notes[0].startswith(", ".join(["mse ranges", *kept]) + ": ")
    assert f"({1 + len(kept)} of {1 + len(tried)} trials kept)" in plan.notes[0]


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("auto", "nncf")])
def test_every_method_writes_a_good_file(method, tmp_path):
    model = residual()
    onnx.save(model, str(tmp_path / "m.onnx"))
    feed = images(model, 24)["input"]
    plan = quantize_onnx(tmp_path / "m.onnx", [feed], tmp_path / "q.onnx", method=method)
    held_out = images(model, 16, seed=9)
    written = onnx.load(str(tmp_path / "q.onnx"))
    assert plan.method == method
    reference = run(model, held_out)
    assert sqnr_db(reference, answers(written, held_out, target="onnxruntime")) > 25


@pytest.mark.parametrize("method", ["auto", "plain"])
def test_a_network_without_a_layer_for_int8_stays_as_it_is_and_says_so(method, tmp_path):
    s = Sketch((4, 3, 3))
    up = s.op("ConvTranspose", ["input", s.floats("a", 4, 6, 2, 2)], "up", strides=[2, 2])
    s.op("ConvTranspose", [s.relu(up), s.floats("b", 6, 1, 2, 2)], "logits", strides=[2, 2])
    model = s.model()
    onnx.save(model, str(tmp_path / "m.onnx"))
    feed = images(model, 16)
    outs = {target: tmp_path / f"{target}.onnx" for target in ("onnxruntime", "tensorrt")}
    plans = quantize_targets(tmp_path / "m.onnx", [feed["input"]], outs, method)
    assert plans["tensorrt"].activations and not plans["onnxruntime"].activations
    assert plans["onnxruntime"].notes[0] == "nothing is int8: all of it stays in float"
    got = run(str(outs["onnxruntime"]), feed)[0]
    np.testing.assert_array_equal(got, run(model, feed)[0])
    (told,) = of_stage({"plans": {name: plan.to_json() for name, plan in plans.items()}})
    assert told.startswith("int8-onnxruntime is a file in float") and "int8 ConvTranspose" in told


def fixed_batch(batch: int, target_shape):
    s = Sketch((3, 8, 8), batch=batch)
    pooled = s.op("GlobalAveragePool", [s.relu(s.conv("input", "c", 3, 4))], "pool")
    flat = s.op("Reshape", [pooled, s.constant("shape", np.array(target_shape))], "flat")
    s.op("Gemm", [flat, s.floats("w", 4, 10), s.floats("b", 10)], "logits")
    return s.model()


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_corrected_like_a_free_one(batch, tmp_path):
    model = fixed_batch(batch, [batch, 4])
    onnx.save(model, str(tmp_path / "m.onnx"))
    feed = images(model, 32)["input"]
    plan = quantize_onnx(tmp_path / "m.onnx", [feed], tmp_path / "q.onnx")
    assert len(plan.trials) > 3
    (got,) = run(str(tmp_path / "q.onnx"), {"input": feed[:batch]})
    np.testing.assert_allclose(got, run(model, {"input": feed[:batch]})[0], atol=0.1)


def test_a_batch_that_cannot_be_freed_is_told(tmp_path):
    model = fixed_batch(2, [-1, 8])  # mixes the images of a batch
    weight = np.random.default_rng(0).standard_normal((8, 10)).astype(np.float32)
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    model.graph.node.append(onnx.helper.make_node("CumSum", ["logits", "zero"], ["sum"], name="s"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "zero"))
    model.graph.output[0].name = "sum"
    onnx.save(model, str(tmp_path / "m.onnx"))
    feed = images(model, 16)["input"]
    plan = quantize_onnx(tmp_path / "m.onnx", [feed], tmp_path / "q.onnx")
    assert any(note.startswith("weights and biases are not fitted") for note in plan.notes)
    with pytest.raises(QuantizationError, match="'rounding' needs a free batch size"):
        quantize_onnx(tmp_path / "m.onnx", [feed], tmp_path / "q.onnx", method="rounding")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nncf_leaves_through_our_writer():
    bench = bench_of(residual(), "tensorrt")
    plan = plan_by("nncf", bench)
    assert {r.observer for r in plan.activations.values()} >= {"nncf"}
    assert mean_db(bench.judge(plan).each_db) > 20


def test_one_pass_serves_all_targets(tmp_path, monkeypatch):
    """Each target gets what it would get alone, and the images are read once."""
    path = tmp_path / "m.onnx"
    onnx.save(residual(), str(path))
    feed = images(residual(), 16)
    alone = {
        target: quantize_onnx(path, [feed], tmp_path / f"{target}.alone.onnx", target, "plain")
        for target in TARGETS
    }
    passes = []
    monkeypatch.setattr(api, "calibrate", lambda *a, **k: passes.append(1) or calibrate(*a, **k))
    outs = {target: tmp_path / f"{target}.onnx" for target in TARGETS}
    plans = quantize_targets(path, [feed], outs, "plain")
    assert passes == [1]
    for target, out in outs.items():
        mine, others = plans[target].activations, alone[target].activations
        assert mine.keys() == others.keys()
        assert all(mine[n].high == pytest.approx(others[n].high, rel=1e-4) for n in mine)
        assert onnx.load(out).graph.node == onnx.load(tmp_path / f"{target}.alone.onnx").graph.node
